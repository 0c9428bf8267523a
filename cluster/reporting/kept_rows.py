"""The numbers of all trials over all generations, as a page has them; fewer where they are many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gradhpo.cluster.reporting.followed import Followed
from gradhpo.cluster.reporting.generations import quantiles
from gradhpo.cluster.schedulers import NEW
from gradhpo.page import packed
from gradhpo.page.thinning import thinned, thinned_at

MOST_NUMBERS = 1_700_000
"""Of a file: 4 bytes each, a third more in base64."""


def rows_of(followed: Followed, first: int, most: int | None = None) -> dict[str, Any]:
    """Return the rows of the generations from `first` on.

    Args:
      followed: the sweep.
      first: the first generation.
      most: numbers, above which some generations alone are kept of each slot: the least and the
        greatest of several in a row. Quantiles are of all.
    """
    done = range(first, len(followed.generations))
    names, settings = followed.objectives.names, list(followed.space.kinds())
    columns = {n: _stacked(followed, [followed.column(n, g) for g in done]) for n in names}
    about = [followed.generations[g] for g in done]
    kept: dict[str, Any] = {
        "first": first,
        "count": len(done),
        "slots": followed.layout.population,
        "best": packed(np.array(followed.best[first:])),
        "seconds": packed(np.array(followed.seconds[first:])),
        "diverged": packed(np.array([(x.diverged > 0).sum() for x in about]), "<i4"),
        "quantiles": {n: packed(q) for n, q in _quantiles(followed, done).items()},
    }
    ended = {n: _stacked(followed, [followed.setting(n, g) for g in done]) for n in settings}
    if most is not None and (len(columns) + 2 * len(ended) + 2) * _size(columns) > most:
        each = _each(len(done), (len(columns) + len(ended)) * _size(columns), most)
        kept |= {
            "thinned": each,
            "at": packed(thinned_at(len(done), each), "<u4"),
            "columns": {n: packed(thinned(x, each)) for n, x in columns.items()},
            "settings": {n: packed(thinned(x, each)) for n, x in ended.items()},
        }
        return kept
    parents = _stacked(followed, [x.parent for x in about]).astype(int)
    return kept | {
        "trial": packed(_stacked(followed, [x.trial for x in about]), "<i4"),
        "parent": packed(parents, "<i4"),
        "columns": {n: packed(x) for n, x in columns.items()},
        "settings": {n: packed(x) for n, x in ended.items()},
        "moved": {n: _moved(followed, n, ended[n], parents, done) for n in settings},
    }


def _each(generations: int, numbers: int, most: int) -> int:
    """Return of how many generations two are kept."""
    return max(3, int(np.ceil(2 * numbers / most))) if generations > 2 else 2


def _size(columns: dict[str, np.ndarray]) -> int:
    return next(iter(columns.values())).size


def _stacked(followed: Followed, rows: Sequence[np.ndarray]) -> np.ndarray:
    return np.array(rows).reshape(-1, followed.layout.population)


def _quantiles(followed: Followed, done: range) -> dict[str, np.ndarray]:
    """Return quantiles of every metric and setting, `(generations, 5)` each."""
    metrics = {n: [followed.column(n, g) for g in done] for n in followed.metrics}
    settings = {n: [followed.setting(n, g) for g in done] for n in followed.space.kinds()}
    found = metrics | {f"setting {n}": rows for n, rows in settings.items()}
    return {n: np.array([quantiles(x) for x in rows]).reshape(-1, 5) for n, rows in found.items()}


def _moved(
    followed: Followed, name: str, ended: np.ndarray, parents: np.ndarray, done: range
) -> dict[str, Any]:
    """Return where a setting began a generation elsewhere than it had ended the one before."""
    begun = _stacked(followed, [followed.setting(name, g, begun=True) for g in done])
    before = np.full_like(ended, np.nan)
    before[1:] = ended[:-1]
    if done.start and len(done):
        before[0] = followed.setting(name, done.start - 1)
    source = np.take_along_axis(before, np.maximum(parents, 0), axis=1)
    source[parents == NEW] = np.nan
    there = np.isfinite(begun) & ~np.isclose(begun, source, rtol=1e-6, atol=0)
    at = np.flatnonzero(there)
    return {"at": packed(at + done.start * ended.shape[1], "<u4"), "to": packed(begun[there])}
