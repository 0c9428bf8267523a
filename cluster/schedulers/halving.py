"""Successive halving of the trials that reach an age together (Jamieson & Talwalkar 2016)."""

from __future__ import annotations

import dataclasses

import numpy as np

from gradhpo.cluster.schedulers.decision import Decision
from gradhpo.cluster.schedulers.rungs import Rungs
from gradhpo.cluster.schedulers.table import NEW, Table
from gradhpo.cluster.space import SearchSpace


@dataclasses.dataclass(frozen=True)
class SuccessiveHalving(Rungs):
    """Successive halving (Jamieson & Talwalkar 2016), in slots that are never empty.

    A trial that has run `grace·reduction^k` generations goes on if it is among the best
    1/reduction of the trials that reached that age together (of one left over, at random); the
    others' slots, diverged trials'
    and those of trials that ran `longest` generations get new trials, so shapes never change.

    Args:
      reduction: at least 2, the factor between rungs.
      grace: generations that every trial gets.
      longest: generations after which a trial is complete; by default the highest rung that one
        trial of a full population reaches, `grace·reduction^⌊log(slots)/log(reduction)⌋`.

    Raises:
      ValueError: for an argument out of range.
    """

    def __call__(self, table: Table, space: SearchSpace, rng: np.random.Generator) -> Decision:
        """Decide."""
        del space
        parents = np.arange(len(table.score))
        stopped = table.diverged() | (table.age >= self.life(len(parents)))
        order = table.ranking()
        for rung in self.rungs(table.age.max()):
            reached = order[table.age[order] == rung]  # from the best to the worst
            share = len(reached) / self.reduction
            # A part of a trial goes on with that probability; rounded up, survivors of ever
            # smaller cohorts would in time hold every slot.
            stopped[reached[int(share + rng.random() * (share % 1 > 0)) :]] = True
        parents[stopped] = NEW
        return Decision(parents)
