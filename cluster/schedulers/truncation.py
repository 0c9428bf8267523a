"""Truncation selection: the worst slots copy the best (Jaderberg et al. 2017, §4.1.1)."""

from __future__ import annotations

from typing import Any

import numpy as np

from gradhpo.cluster.schedulers.table import NEW, Table
from gradhpo.errors import check_number


def check_quantile(who: str, quantile: Any) -> float:
    """Return a share that can copy another of its size."""
    return check_number(f"{who}: quantile", quantile, 0, 0.5, open_low=True)


def truncated(table: Table, quantile: float, rng: np.random.Generator) -> np.ndarray:
    """Return from which slot each one comes next: the worst from one of the best, at random.

    Diverged trials count as worst, however many there are; where nothing is left to copy, trials
    start anew.
    """
    slots = np.arange(len(table.score))
    order, diverged = table.ranking(), table.diverged()
    count = min(max(1, int(quantile * len(slots))), len(slots) // 2)
    losers = diverged.copy()
    losers[order[len(slots) - count :]] = True
    best = order[: max(1, count)]
    best = best[~diverged[best]]
    parents = slots.copy()
    parents[losers] = rng.choice(best, losers.sum()) if len(best) else NEW
    return parents
