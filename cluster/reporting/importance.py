r"""How much of the differences between trials each searched setting alone explains.

Of each trial its settings and its score at its end are taken; the score as its place among those
of the same generation, so that age counts for nobody. Values of a setting are put into bins of
equal counts. The estimate is the share of the variance of places that lies between the bins,
:math:`\varepsilon^2 = 1 - (1 - \eta^2)(n - 1)/(n - k)` for n trials in k bins (Kelley 1935), which
is 0 on average where a setting does nothing. It sees no interactions, and where settings are
perturbed together with who is copied, cause and effect are not told apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

BINS = 8
FEWEST = 16
"""Trials below which nothing is said."""
MOST = 4000
"""Trials that are looked at: an even sample of all."""
SHUFFLES = 200


class Importance(NamedTuple):
    """Of one setting."""

    share: float
    """The estimate, from 0 to 1."""
    chance: float
    """What 95% of shuffled settings stay below."""
    trials: int
    """That it was estimated from."""


def places(scores: np.ndarray, generation: np.ndarray) -> np.ndarray:
    """Return each score's place in its generation, from 0, the best, to 1.

    Args:
      scores: to be minimized; what is not finite is the worst.
      generation: of each.
    """
    score = np.where(np.isfinite(scores), scores, np.inf)
    order = np.lexsort((score, generation))
    found = np.empty(len(score))
    for part in np.split(order, np.flatnonzero(np.diff(generation[order])) + 1):
        values = score[part]
        low, high = (np.searchsorted(values, values, side) for side in ("left", "right"))
        found[part] = (low + high - 1) / 2 / max(1, len(part) - 1)
    return found


def importance(
    settings: Mapping[str, np.ndarray], place: np.ndarray, labels: tuple[str, ...] = ()
) -> dict[str, Importance]:
    """Return the importance of each setting that enough trials have with more than one value.

    Args:
      settings: by name, `(trials,)`; NaN where a trial has none.
      place: of each trial, see `places`.
      labels: names of those whose numbers are labels, a bin each.
    """
    made: dict[str, Importance] = {}
    rng = np.random.default_rng(0)
    for name, column in settings.items():
        there = np.flatnonzero(np.isfinite(column))
        there = (
            there[np.unique(np.linspace(0, len(there) - 1, MOST).astype(int))]
            if len(there) > MOST
            else there
        )
        if len(there) < FEWEST:
            continue
        of = _bins(column[there], name in labels)
        bins = int(of.max()) + 1
        if bins < 2 or len(there) <= bins:
            continue
        y = place[there]
        shuffled = [_share(rng.permutation(of), y, bins) for _ in range(SHUFFLES)]
        chance = float(np.quantile(shuffled, 0.95))
        made[name] = Importance(max(0.0, _share(of, y, bins)), max(0.0, chance), len(there))
    return made


def _bins(values: np.ndarray, labels: bool) -> np.ndarray:
    different, of = np.unique(values, return_inverse=True)
    if labels or len(different) <= BINS:
        return of
    edges = np.quantile(values, np.linspace(0, 1, BINS + 1)[1:-1])
    return np.unique(np.searchsorted(edges, values, "left"), return_inverse=True)[1]


def _share(of: np.ndarray, y: np.ndarray, bins: int) -> float:
    total = float(((y - y.mean()) ** 2).sum())
    if total == 0:
        return 0.0
    counts = np.bincount(of, minlength=bins)
    means = np.bincount(of, y, minlength=bins) / counts
    explained = float((counts * (means - y.mean()) ** 2).sum()) / total
    return 1 - (1 - explained) * (len(y) - 1) / (len(y) - bins)
