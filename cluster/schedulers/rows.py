"""Slots of several generations, one below the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from gradhpo.cluster.schedulers.table import Table

ARRAYS = ("trial", "age", "parent", "score")
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

    @classmethod
    def of(cls, tables: Sequence[Table]) -> Rows:
        """Return the rows of tables; of metrics those that all have."""
        sizes = [len(table.score) for table in tables]
        metrics = [n for n in tables[0].metrics if all(n in table.metrics for table in tables)]
        return cls(
            generation=np.repeat([table.generation for table in tables], sizes),
            slot=np.concatenate([np.arange(size) for size in sizes]),
            **{name: np.concatenate([getattr(table, name) for table in tables]) for name in ARRAYS},
            values={n: np.concatenate([t.values[n] for t in tables]) for n in tables[0].values},
            metrics={n: np.concatenate([t.metrics[n] for t in tables]) for n in metrics},
        )

    def where(self, mask: np.ndarray) -> Rows:
        """Return some of the rows."""
        parts = {name: getattr(self, name)[mask] for name in ("generation", "slot", *ARRAYS)}
        values = {name: column[mask] for name, column in self.values.items()}
        return Rows(**parts, values=values, metrics={n: x[mask] for n, x in self.metrics.items()})

    def of_trial(self, trial: int) -> Rows:
        """Return a trial's rows."""
        return self.where(self.trial == trial)

    def of_slot(self, slot: int) -> Rows:
        """Return a slot's rows, whichever trials it held."""
        return self.where(self.slot == slot)
