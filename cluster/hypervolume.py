"""The hypervolume of a front: how much of the space below a reference point it dominates."""

from __future__ import annotations

import numpy as np

from gradhpo.cluster.dominance import nondominated


def hypervolume(scores: np.ndarray, reference: np.ndarray) -> float:
    """Return the volume that is dominated by some row, and not by the reference; exactly.

    Slices along the last objective, one for each row of the front (While et al. 2006): meant for
    fronts of tens of rows, and few objectives.

    Args:
      scores: `(n, objectives)`, all minimized; what is not finite, or not better than the reference
        in every objective, counts nothing.
      reference: `(objectives,)`.

    Raises:
      ValueError: for shapes that do not fit, or a reference that is not finite.
    """
    rows, corner = np.asarray(scores, float), np.asarray(reference, float)
    if rows.ndim != 2 or corner.shape != rows.shape[1:] or not len(corner):
        raise ValueError(
            f"hypervolume takes (n, k) scores and a (k,) reference, got {rows.shape} and "
            f"{corner.shape}"
        )
    if not np.isfinite(corner).all():
        raise ValueError(f"hypervolume takes a finite reference, got {corner.tolist()}")
    rows = rows[(np.isfinite(rows) & (rows < corner)).all(axis=1)]
    return _volume(rows[nondominated(rows)], corner)


def _volume(rows: np.ndarray, corner: np.ndarray) -> float:
    if not len(rows):
        return 0.0
    if len(corner) == 1:
        return float(corner[0] - rows.min())
    rows = rows[np.argsort(rows[:, -1], kind="stable")]
    depths, total = np.diff(rows[:, -1], append=corner[-1]), 0.0
    for count, depth in enumerate(depths.tolist(), 1):
        if depth > 0:
            slab = rows[:count, :-1]
            total += depth * _volume(slab[nondominated(slab)], corner[:-1])
    return total
