"""What a scheduler sees: one population after a generation, a row for each slot."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np


@dataclasses.dataclass(frozen=True)
class Table:
    """One population after a generation; every array has one entry for each slot."""

    generation: int
    """Counted from 0."""
    score: np.ndarray
    """What is minimized; NaN for a trial that has diverged."""
    trial: np.ndarray
    """The trial in each slot, by its number."""
    age: np.ndarray
    """Generations that each trial has run."""
    values: Mapping[str, np.ndarray]
    """The present settings of the search space, by name."""
    metrics: Mapping[str, np.ndarray]
    """The five metrics of the last step, and the problem's own, by name."""

    def ranking(self) -> np.ndarray:
        """Return the slots from the best to the worst; diverged ones last."""
        return np.argsort(np.where(np.isfinite(self.score), self.score, np.inf), kind="stable")

    def diverged(self) -> np.ndarray:
        """Return which slots' trials have diverged."""
        return ~np.isfinite(self.score)
