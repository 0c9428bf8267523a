"""Successive halving of the trials that reach an age together (Jamieson & Talwalkar 2016)."""

from __future__ import annotations

import dataclasses

import numpy as np

from gradhpo.cluster.schedulers.decision import NEW, Decision
from gradhpo.cluster.schedulers.table import Table
from gradhpo.cluster.space import SearchSpace
from gradhpo.errors import check_count


@dataclasses.dataclass(frozen=True)
class SuccessiveHalving:
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

    reduction: int = 3
    grace: int = 1
    longest: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "reduction", check_count("reduction", self.reduction, 2))
        object.__setattr__(self, "grace", check_count("grace", self.grace))
        if self.longest is not None:
            object.__setattr__(self, "longest", check_count("longest", self.longest, self.grace))

    def __call__(self, table: Table, space: SearchSpace, rng: np.random.Generator) -> Decision:
        """Decide."""
        del space
        parents = np.arange(len(table.score))
        longest, slots = self.longest, len(parents)
        if longest is None:
            rungs = int(np.log(slots) / np.log(self.reduction) + 1e-9)
            longest = self.grace * self.reduction**rungs
        stopped = table.diverged() | (table.age >= longest)
        order = table.ranking()
        rung = self.grace
        while rung <= table.age.max():
            reached = order[table.age[order] == rung]  # from the best to the worst
            share = len(reached) / self.reduction
            # A part of a trial goes on with that probability; rounded up, survivors of ever
            # smaller cohorts would in time hold every slot.
            stopped[reached[int(share + rng.random() * (share % 1 > 0)) :]] = True
            rung *= self.reduction
        parents[stopped] = NEW
        return Decision(parents)
