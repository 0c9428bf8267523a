"""ASHA's rungs, between synchronous generations (Li et al. 2020)."""

from __future__ import annotations

import dataclasses

import numpy as np

from gradhpo.cluster.dominance import places
from gradhpo.cluster.schedulers.decision import Decision
from gradhpo.cluster.schedulers.rungs import Rungs
from gradhpo.cluster.schedulers.table import NEW, Table
from gradhpo.cluster.space import SearchSpace


@dataclasses.dataclass(frozen=True)
class ASHA(Rungs):
    """ASHA's rungs (Li et al. 2020), decided between generations, in slots that are never empty.

    A trial that has run `grace·reduction^k` generations is on a rung, and goes on if it is among
    the best 1/reduction of all trials that ever reached that rung, in this sweep and population,
    or the best of them. The others' slots, diverged trials' and those of trials that ran `longest`
    generations get new trials.

    `SuccessiveHalving` compares a trial with those that reach the rung in the same generation
    alone: in small populations with one or two others, and of a weak cohort the best goes on.
    Here it is compared with all that came before, and a strong cohort goes on as a whole. Unlike
    the paper's, a trial that was stopped is gone, and not promoted later: its slot is taken.

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
        del space, rng
        parents = np.arange(len(table.score))
        stopped = table.diverged() | (table.age >= self.life(len(parents)))
        for rung in self.rungs(table.age.max()):
            here = (table.age == rung) & ~table.diverged()
            if here.any():
                stopped |= here & ~self._goes_on(table, rung)
        parents[stopped] = NEW
        return Decision(parents)

    def _goes_on(self, table: Table, rung: int) -> np.ndarray:
        """Return which slots' trials on a rung are good enough of all that ever reached it."""
        tables = [table.history(g) for g in range(rung - 1, table.generation + 1)]
        reached = np.concatenate([made.compared()[made.age == rung] for made in tables])
        # Places of different generations could not be compared: they are of all that came here.
        score = reached[:, 0] if reached.shape[1] == 1 else places(reached)
        score = np.where(np.isfinite(score), score, np.inf)
        cut = np.sort(score)[max(1, len(score) // self.reduction) - 1]
        here = table.age == rung
        goes_on = np.zeros(len(here), bool)
        goes_on[here] = score[len(score) - here.sum() :] <= cut
        return goes_on
