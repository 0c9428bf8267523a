"""What a scheduler sees: one population after a generation, and after every one before it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from gradhpo.cluster.schedulers.rows import ARRAYS, Rows
from gradhpo.errors import check_count

NEW = -1
"""In `Decision.parents`: the slot gets a new trial, drawn from the search space."""


@dataclasses.dataclass(frozen=True)
class Table:
    """One population after a generation; every array has one entry for each slot."""

    generation: int
    """Counted from 0."""
    score: np.ndarray
    """What is minimized; NaN for a trial that has diverged. Of several objectives, a trial's place
    among the slots, from 0: by non-dominated sorting, and the crowding distance within a front."""
    trial: np.ndarray
    """The trial in each slot, by its number."""
    age: np.ndarray
    """Generations that each trial has run."""
    values: Mapping[str, np.ndarray]
    """The present settings of the search space, by name."""
    metrics: Mapping[str, np.ndarray]
    """The five metrics of the last step, and the problem's own, by name."""
    parent: np.ndarray = dataclasses.field(default_factory=lambda: np.empty(0, np.int64))
    """From which slot each trial came before this generation: its own, or `NEW`."""
    earlier: Callable[[int], Table] | None = dataclasses.field(
        default=None, repr=False, compare=False
    )
    """Returns the table of a generation before this one; see `history`."""
    objectives: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    """By name, what the sweep compares, each as it is minimized."""
    slots: np.ndarray = dataclasses.field(default_factory=lambda: np.empty(0, np.int64))
    """The numbers of the slots in the whole sweep, ascending: in a race a population may have more
    than a generation before."""

    def __post_init__(self) -> None:
        if not len(self.parent):
            own = np.where(self.age > 1, np.arange(len(self.age)), NEW)
            object.__setattr__(self, "parent", own)
        if not len(self.slots):
            object.__setattr__(self, "slots", np.arange(len(self.age)))

    def ranking(self) -> np.ndarray:
        """Return the slots from the best to the worst; diverged ones last."""
        return np.argsort(np.where(np.isfinite(self.score), self.score, np.inf), kind="stable")

    def compared(self) -> np.ndarray:
        """Return `(slots, objectives)`, all minimized: one column where there is one metric."""
        return np.stack([*self.objectives.values()] or [self.score], axis=1)

    def diverged(self) -> np.ndarray:
        """Return which slots' trials have diverged."""
        return ~np.isfinite(self.score)

    def history(self, generation: int) -> Table:
        """Return the same population's table after an earlier generation, counted from 0.

        A sweep that goes on sees what it would have seen: it is read from the storage, once.

        Raises:
          ValueError: for a generation after this one, or if the table was made without earlier
            ones.
        """
        number = check_count("history: generation", generation, 0)
        if number == self.generation:
            return self
        if number > self.generation:
            raise ValueError(
                f"history: generation must be from 0 to {self.generation}, got {number}"
            )
        if self.earlier is None:
            raise ValueError("history: this table was made without Table(earlier=…)")
        return self.earlier(number)

    def improvement(self) -> np.ndarray:
        """Return how far the score fell in the generation, below that of the slot it came from.

        NaN for trials that are new, or have diverged.
        """
        if self.generation == 0:
            return np.full(len(self.score), np.nan)
        before = self.history(self.generation - 1)
        source = np.searchsorted(before.slots, self.slots[np.maximum(self.parent, 0)])
        with np.errstate(invalid="ignore"):
            fell = before.score[source] - self.score
        return np.where((self.parent == NEW) | ~np.isfinite(fell), np.nan, fell)

    def rows(self, generations: int | None = None) -> Rows:
        """Return all slots of all generations up to this one, the oldest first.

        `rows().of_trial(number)` is a trial's life, `rows().of_slot(slot)` that of a slot; slots
        are counted as in this table.

        Args:
          generations: only so many of the last ones.
        """
        count = self.generation + 1
        if generations is not None:
            count = min(count, check_count("rows: generations", generations))
        return stacked([self.history(self.generation - i) for i in reversed(range(count))])


def stacked(tables: Sequence[Table]) -> Rows:
    """Return the rows of tables; of metrics those that all have, slots as the last counts them."""
    sizes = [len(table.score) for table in tables]
    metrics = [n for n in tables[0].metrics if all(n in table.metrics for table in tables)]
    return Rows(
        generation=np.repeat([table.generation for table in tables], sizes),
        slot=np.concatenate([_counted(tables[-1], table.slots) for table in tables]),
        parent=np.concatenate([_parents(tables[-1], table) for table in tables]),
        **{name: np.concatenate([getattr(table, name) for table in tables]) for name in ARRAYS},
        values={n: np.concatenate([t.values[n] for t in tables]) for n in tables[0].values},
        metrics={n: np.concatenate([t.metrics[n] for t in tables]) for n in metrics},
    )


def _counted(last: Table, slots: np.ndarray) -> np.ndarray:
    """Return slots as a later table counts them, which has them all."""
    return np.searchsorted(last.slots, slots)


def _parents(last: Table, table: Table) -> np.ndarray:
    there = table.slots[np.maximum(table.parent, 0)]
    return np.where(table.parent == NEW, NEW, _counted(last, there))
