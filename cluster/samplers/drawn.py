"""What a sampler is told: the new trials of a population so far, and what came of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np


@dataclasses.dataclass(frozen=True)
class Drawn:
    """The trials that were drawn for one population, in the order of their numbers, a row each.

    Trials that copied others are not among them.
    """

    values: Mapping[str, np.ndarray]
    """By name of a setting, `(trials,)`: the numbers with which they began."""
    scores: np.ndarray
    """`(trials, objectives)`, the last ones, all minimized; NaN for a trial that has diverged, or
    has not run yet."""
    born: np.ndarray
    """The generation in which each began."""
    age: np.ndarray
    """Generations that each has run so far."""
    ended: np.ndarray
    """Whether another trial has taken its slot."""
    given: np.ndarray
    """Whether it came from the sweep's `points`."""
    seed: int
    """For generators that must go on from ask to ask: the same in all of a sweep."""

    def __len__(self) -> int:
        """Return how many trials there are."""
        return len(self.born)
