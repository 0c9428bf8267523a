"""What is shown of a sweep's tables, generation by generation, in arrays that grow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from gradhpo.cluster import columns as names
from gradhpo.cluster.columns import PARENT, TRIAL, VARIANT, Columns
from gradhpo.cluster.distributions import Distribution
from gradhpo.cluster.numbers_of import column_of
from gradhpo.cluster.objectives import Objectives
from gradhpo.cluster.schedulers import NEW
from gradhpo.cluster.space import LR_HYPER, Change, SearchSpace

QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)


class Generation(NamedTuple):
    """One generation of all slots; every column `(population,)`."""

    trial: np.ndarray
    parent: np.ndarray
    """The slot that it came from before; `NEW`, -1, for a new trial."""
    variant: np.ndarray
    diverged: np.ndarray
    """The step at which it diverged, 0 for none."""
    measured: Columns
    """The metrics after it."""
    begun: Columns
    """Each searched setting before its first step, as a person writes it."""
    ended: Columns
    """The same after its last."""


class Reader:
    """Makes generations of tables, in their order.

    Args:
      space: what is searched.
      beginning: each slot's combination of choices at first.
      first: what the first trials drew.
    """

    def __init__(
        self, space: SearchSpace, beginning: np.ndarray, first: Mapping[str, Change]
    ) -> None:
        self._kinds, self._beginning, self._first = space.kinds(), beginning, first
        self._before: Columns | None = None
        """The table before, as it is stored."""

    def read(self, table: Columns) -> Generation:
        """Return the next generation."""
        parent = table[PARENT].astype(np.int64)
        variant = table.get(VARIANT, self._beginning).astype(np.int64)
        before, changes = self._before, self._first
        if before is not None:
            changes = names.decision_of(before).changes
        begun, ended = Columns(), Columns()
        for name, kinds in self._kinds.items():
            stored = _column(table, name)
            source = np.full(len(parent), np.nan)
            if before is not None:
                source = np.where(parent == NEW, np.nan, _column(before, name)[parent])
            moved = _moved(source, changes.get(name), kinds, variant)
            moved = stored if name == LR_HYPER else moved  # which no step moves
            begun[name], ended[name] = (_written(x, kinds, variant) for x in (moved, stored))
        self._before = table
        hidden = (names.DIVERGED,)
        measured = {
            n: _single(table[n])
            for n in names.measured(table)
            if n not in hidden and not n.startswith(names.HYPERPARAMS)
        }
        diverged = table.get(names.DIVERGED, np.zeros(len(parent), int))
        about = (table[TRIAL].astype(np.int64), parent, variant, diverged)
        return Generation(*about, measured, begun, ended)


def quantiles(column: np.ndarray) -> np.ndarray:
    """Return the quantiles of the finite numbers, `(5,)`; NaN where there is none."""
    finite = column[np.isfinite(column)].astype(float)
    return np.quantile(finite, QUANTILES) if len(finite) else np.full(len(QUANTILES), np.nan)


def best_so_far(column: np.ndarray, sign: int, before: float) -> float:
    """Return the best number there was yet; NaN where there is none.

    Args:
      column: the metric of each slot.
      sign: 1 if it is minimized, -1 if maximized.
      before: the best until then, or NaN.
    """
    there = np.append(column[np.isfinite(column)].astype(float), before) * sign
    return float(np.fmin.reduce(there) * sign)


def scores(objectives: Objectives, generation: Generation) -> np.ndarray:
    """Return `(population, objectives)`, all to be minimized; NaN where it diverged."""
    nothing = np.full(len(generation.trial), np.nan)
    found = [generation.measured.get(n, nothing) * s for n, s in objectives.signs.items()]
    return np.stack(found, axis=1).astype(float)


def _column(table: Columns, name: str) -> np.ndarray:
    """Return a setting as it is stored; NaN where a table has none, as all combinations ended."""
    nothing = np.full(len(table[TRIAL]), np.nan)
    return table.get(names.setting(name), nothing).astype(float)


def _moved(
    source: np.ndarray,
    change: Change | None,
    kinds: Mapping[int, Distribution],
    variant: np.ndarray,
) -> np.ndarray:
    """Return a setting after the scheduler's change, as a worker makes it."""
    if change is None:
        return source
    low, high = np.full(len(source), -np.inf), np.full(len(source), np.inf)
    for number, about in kinds.items():
        low[variant == number], high[variant == number] = about.bounds
    multiplied = np.where(change.multiply == 0, 0, change.multiply * source)
    moved = np.clip(multiplied + change.add, low, high)
    return np.where(change.mask, moved.astype(np.float32), source)


def _written(
    stored: np.ndarray, kinds: Mapping[int, Distribution], variant: np.ndarray
) -> np.ndarray:
    """Return numbers as a person writes them, of some that may be stored as logarithms."""
    with np.errstate(over="ignore"):
        return _single(column_of(kinds, variant, stored))


def _single(numbers: np.ndarray) -> np.ndarray:
    """Return them as the page has them: what is too large there is infinite."""
    with np.errstate(over="ignore"):
        return numbers.astype(np.float32)
