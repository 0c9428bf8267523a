"""Successive halving of the trials that reach an age together (Jamieson & Talwalkar 2016)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from gradhpo.cluster.schedulers.decision import Decision
from gradhpo.cluster.schedulers.table import NEW, Table
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
        for name, value in check_rungs(self.reduction, self.grace, self.longest).items():
            object.__setattr__(self, name, value)

    def __call__(self, table: Table, space: SearchSpace, rng: np.random.Generator) -> Decision:
        """Decide."""
        del space
        parents = np.arange(len(table.score))
        longest = longest_life(self.longest, len(parents), self.reduction, self.grace)
        stopped = table.diverged() | (table.age >= longest)
        order = table.ranking()
        for rung in rungs(self.reduction, self.grace, table.age.max()):
            reached = order[table.age[order] == rung]  # from the best to the worst
            share = len(reached) / self.reduction
            # A part of a trial goes on with that probability; rounded up, survivors of ever
            # smaller cohorts would in time hold every slot.
            stopped[reached[int(share + rng.random() * (share % 1 > 0)) :]] = True
        parents[stopped] = NEW
        return Decision(parents)


def check_rungs(reduction: int, grace: int, longest: int | None) -> dict[str, int | None]:
    """Return the arguments that place rungs, checked."""
    return {
        "reduction": check_count("reduction", reduction, 2),
        "grace": check_count("grace", grace),
        "longest": None if longest is None else check_count("longest", longest, grace),
    }


def rungs(reduction: int, grace: int, oldest: int) -> Iterator[int]:
    """Yield the ages at which trials are compared, up to that of the oldest."""
    rung = grace
    while rung <= oldest:
        yield rung
        rung *= reduction


def longest_life(longest: int | None, slots: int, reduction: int, grace: int) -> int:
    """Return the age at which a trial is complete: by default the last rung of so many slots."""
    if longest is not None:
        return longest
    return grace * reduction ** int(np.log(slots) / np.log(reduction) + 1e-9)
