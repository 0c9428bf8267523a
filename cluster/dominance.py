"""Non-dominated sorting and crowding, of NSGA-II (Deb et al. 2002): many scores make one order.

Rows are trials and columns are objectives, all of which are minimized. A row dominates another if
it is at least as good in every objective, and better in one.
"""

from __future__ import annotations

import numpy as np


def nondominated(scores: np.ndarray) -> np.ndarray:
    """Return the rows that no other dominates, in their order; of equal rows the first alone.

    Args:
      scores: `(n, objectives)`, finite.
    """
    left, kept = np.lexsort(scores.T[::-1]), list[int]()
    while len(left):  # the first is dominated by none: what could do so would come before it
        first, left = left[0], left[1:]
        kept.append(int(first))
        left = left[(scores[left] < scores[first]).any(axis=1)]
    return np.sort(np.asarray(kept, int))


def fronts(scores: np.ndarray) -> np.ndarray:
    """Return the number of each row's front: 0 where none dominates it, 1 without those, ….

    Args:
      scores: `(n, objectives)`, finite.
    """
    dominates = _dominates(scores)
    found, dominated = np.full(len(scores), -1), dominates.sum(axis=0)
    number, front = 0, dominated == 0
    while front.any():
        found[front] = number
        dominated = dominated - dominates[front].sum(axis=0)
        number, front = number + 1, (dominated == 0) & (found < 0)
    return found


def crowding(scores: np.ndarray) -> np.ndarray:
    """Return how far the neighbours of each row of one front are apart; infinite at its ends.

    Args:
      scores: `(n, objectives)`, finite.
    """
    distance = np.zeros(scores.shape)
    for objective, column in enumerate(scores.T):
        order = np.argsort(column, kind="stable")
        extent = column[order[-1]] - column[order[0]] if len(order) else 0.0
        if extent > 0:
            distance[order[1:-1], objective] = (column[order[2:]] - column[order[:-2]]) / extent
            distance[order[[0, -1]], objective] = np.inf
    return np.sort(distance, axis=1).sum(axis=1)  # sorted: the objectives' order changes no bit


def places(scores: np.ndarray) -> np.ndarray:
    """Return each row's place, from 0 for the best: by its front, and there the loneliest first.

    Args:
      scores: `(n, objectives)`; a row that is not finite has no place, but NaN.
    """
    found = np.full(len(scores), np.nan)
    rows = np.flatnonzero(np.isfinite(scores).all(axis=1))
    front, apart = fronts(scores[rows]), np.zeros(len(rows))
    for number in range(front.max(initial=-1) + 1):
        apart[front == number] = crowding(scores[rows[front == number]])
    found[rows[np.lexsort((-apart, front))]] = np.arange(len(rows))
    return found


def _dominates(scores: np.ndarray) -> np.ndarray:
    """Return in row i, column j whether i dominates j."""
    n = len(scores)
    no_worse, better = np.ones((n, n), bool), np.zeros((n, n), bool)
    for column in scores.T:
        no_worse &= column[:, None] <= column
        better |= column[:, None] < column
    return no_worse & better
