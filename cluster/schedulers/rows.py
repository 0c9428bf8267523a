"""Slots of several generations, one below the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

ARRAYS = ("trial", "age", "score")
"""What rows have as tables do."""


@dataclasses.dataclass(frozen=True)
class Rows:
    """Slots of several generations; every array has an entry for each."""

    generation: np.ndarray
    """Counted from 0."""
    slot: np.ndarray
    trial: np.ndarray
    age: np.ndarray
    parent: np.ndarray
    score: np.ndarray
    values: Mapping[str, np.ndarray]
    metrics: Mapping[str, np.ndarray]

    def where(self, mask: np.ndarray) -> Rows:
        """Return some of the rows."""
        parts = {
            name: getattr(self, name)[mask] for name in ("generation", "slot", "parent", *ARRAYS)
        }
        values = {name: column[mask] for name, column in self.values.items()}
        return Rows(**parts, values=values, metrics={n: x[mask] for n, x in self.metrics.items()})

    def of_trial(self, trial: int) -> Rows:
        """Return a trial's rows."""
        return self.where(self.trial == trial)

    def of_slot(self, slot: int) -> Rows:
        """Return a slot's rows, whichever trials it held."""
        return self.where(self.slot == slot)
