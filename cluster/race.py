"""The race between combinations of a space's choices: successive halving, by the table alone.

A combination that ends hands its shards over to those that go on: the number of slots of a shard,
and with it every compiled program, stays as it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from gradhpo.errors import check_count


@dataclasses.dataclass(frozen=True)
class Race:
    """Successive halving (Jamieson & Talwalkar 2016) over the combinations of a space's choices.

    After `grace·reduction^k` generations, for k = 0, 1, …, the best 1/reduction^(k+1) of all
    combinations (rounded up) go on, and the others end. A combination is as good as its best trial
    at the end of that very generation; of several objectives that trial is as good as its place
    among all trials, by non-dominated sorting and crowding. The slots of those that end get new
    trials of those that go on, which share them as equally as whole shards allow, the best one
    first: a generation costs as much as before, and ever more trials of ever fewer combinations run
    in it.

    The metric must mean the same in all combinations. Where no trial of any has a finite one, none
    ends.

    Args:
      reduction: at least 2: of how many combinations one goes on.
      grace: generations that every combination gets.

    Raises:
      ValueError: for an argument out of range.
    """

    reduction: int = 2
    grace: int = 1

    def __post_init__(self) -> None:
        for name, least in (("reduction", 2), ("grace", 1)):
            value = check_count(f"Race: {name}", getattr(self, name), least)
            object.__setattr__(self, name, value)

    def left(self, done: int, combinations: int) -> int | None:
        """Return how many of all combinations go on after so many generations.

        None where that is no rung, and all do that are left.
        """
        rung, share = self.grace, self.reduction
        while rung < done:
            rung, share = rung * self.reduction, share * self.reduction
        return -(-combinations // share) if rung == done else None

    def describe(self) -> dict[str, int]:
        """Return it as it is written in TOML."""
        return dataclasses.asdict(self)

    @classmethod
    def parse(cls, description: Any) -> Race:
        """Return the race that `describe` wrote, or a TOML table with some of its keys.

        Raises:
          ValueError: for anything else.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(description, Mapping) or not set(description) <= set(known):  # pyright: ignore
            accepted = f"a table with some of {' and '.join(known)}"
            raise ValueError(f"space.race must be {accepted}, got {description!r}")
        given: dict[str, Any] = dict(description)  # pyright: ignore
        return cls(**given)


class Ended(NamedTuple):
    """A combination that ended."""

    variant: int
    score: float | None
    """Of its best trial, smaller is better; None where all had diverged."""
    place: int
    """Among those that were left, from 1."""
    of: int
    """How many were left."""


class Rung(NamedTuple):
    """What a race decides after a generation."""

    variant: np.ndarray
    """`(shards,)`: which combination holds each shard from now on."""
    ended: tuple[Ended, ...] = ()
    """From the best to the worst."""


def rung(race: Race, done: int, combinations: int, variant: np.ndarray, score: np.ndarray) -> Rung:
    """Return who holds which shard after so many generations.

    Args:
      race: the rules.
      done: generations, this one included.
      combinations: how many began.
      variant: `(shards,)`, the combination that holds each shard now.
      score: `(shards, slots)`, smaller is better; not finite for trials that have diverged.
    """
    left = race.left(done, combinations)
    order, best = _standing(variant, score)
    if left is None or left >= len(order) or not np.isfinite(best[order[0]]):
        return Rung(variant)
    ended = tuple(
        Ended(one, best[one] if np.isfinite(best[one]) else None, place, len(order))
        for place, one in enumerate(order[left:], left + 1)
    )
    return Rung(_handed_over(variant, order[:left]), ended)


def _standing(variant: np.ndarray, score: np.ndarray) -> tuple[list[int], dict[int, float]]:
    """Return the combinations from the best to the worst, and the best score of each.

    Of equal ones that is first whose best trial is in the first slot, as for the best of all.
    """
    finite = np.where(np.isfinite(score), score, np.inf)
    best: dict[int, float] = {}
    first: dict[int, int] = {}
    for one in np.unique(variant).tolist():
        own = np.where((variant == one)[:, None], finite, np.inf)
        best[one] = float(own.min())
        first[one] = int(own.argmin()) if np.isfinite(best[one]) else one
    return sorted(best, key=lambda one: (best[one], first[one])), best


def _handed_over(variant: np.ndarray, going_on: list[int]) -> np.ndarray:
    """Give each shard of those that ended to the one with the fewest, the best one first."""
    made = variant.copy()
    held = {one: int((variant == one).sum()) for one in going_on}
    for shard in np.flatnonzero(~np.isin(variant, going_on)):
        made[shard] = heir = min(going_on, key=held.__getitem__)
        held[heir] += 1
    return made
