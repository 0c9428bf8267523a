"""Fewer points of long lines: of several in a row the least and the greatest stay."""

from __future__ import annotations

import numpy as np


def thinned(rows: np.ndarray, each: int) -> np.ndarray:
    """Return the least and the greatest of every so many rows of each column, as they come.

    Args:
      rows: `(rows, columns)`; NaN is left out where there is a number.
      each: how many rows become two.
    """
    made: list[np.ndarray] = []
    for start in range(0, len(rows), each):
        part = rows[start : start + each]
        finite = np.isfinite(part)
        least = np.where(finite, part, np.inf).argmin(axis=0)
        greatest = np.where(finite, part, -np.inf).argmax(axis=0)
        both = np.sort([least, greatest], axis=0)
        made += [np.take_along_axis(part, both[i : i + 1], axis=0)[0] for i in range(2)]
    return np.array(made).reshape(-1, rows.shape[1])


def thinned_at(rows: int, each: int) -> np.ndarray:
    """Return the rows at which what `thinned` returns is drawn: the first and the last of each."""
    starts = np.arange(0, rows, each)
    return np.stack([starts, np.minimum(starts + each, rows) - 1], axis=1).ravel()
