"""A batch of points of a bandit: upper confidence bounds that know of the points before them."""

from __future__ import annotations

import numpy as np


def exploration(rows: int) -> float:
    """Return √β, by which deviations count: β = 0.2 + log(0.4·rows), as PB2's authors have it."""
    return float(np.sqrt(0.2 + max(0.0, np.log(0.4 * max(1, rows)))))


def batch(
    mean: np.ndarray, covariance: np.ndarray, noise: float, count: int, kappa: float
) -> np.ndarray:
    """Return the indices of `count` candidates, each the best of μ + κ·σ given those before it.

    What a chosen point's reward will be is not known, but how much it will tell is: σ² does not
    depend on rewards (Desautels et al. 2014).

    Args:
      mean: μ of the candidates, `(m,)`.
      covariance: of their rewards, `(m, m)`, noise included.
      noise: the variance of a reward around its mean.
      count: how many.
      kappa: κ.
    """
    left, chosen = covariance.copy(), np.empty(count, np.int64)
    for i in range(count):
        deviation = np.sqrt(np.maximum(left.diagonal() - noise, 0))
        chosen[i] = best = int(np.argmax(mean + kappa * deviation))
        shared = left[best] - noise * (np.arange(len(mean)) == best)
        left -= np.outer(shared, shared) / left[best, best]
    return chosen
