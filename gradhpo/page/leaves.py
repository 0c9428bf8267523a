"""The numbers of λ, leaf by leaf: themselves where they are few, else their range and histogram."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

BARS = 40
"""Of the histogram of a large leaf."""
FEW = 8
"""Numbers of a leaf that are shown as they are."""
LEAVES = 60
"""That are shown at most."""


def leaves_of(arrays: Mapping[str, np.ndarray], begins: str) -> dict[str, Any]:
    """Return the leaves of a tree among arrays by path.

    Args:
      arrays: of a state.
      begins: how the paths of its leaves begin.
    """
    named = {n.removeprefix(begins): x for n, x in arrays.items() if n.startswith(begins)}
    shown = {_dotted(n) or "λ": leaf(x) for n, x in list(named.items())[:LEAVES]}
    return {"leaves": shown, "more": max(0, len(named) - LEAVES)}


def _dotted(path: str) -> str:
    """Return a path as a person names it: "['decay']['w1']" is "decay.w1"."""
    parts = re.findall(r"\['(.*?)'\]|\[(.*?)\]|\.([^.\[]+)", path)
    return ".".join("".join(part) for part in parts)


def leaf(array: np.ndarray) -> dict[str, Any]:
    """Return a leaf's numbers where they are few, their range and histogram where they are many."""
    numbers = np.ravel(array).astype(float)
    made: dict[str, Any] = {"shape": list(array.shape), "dtype": str(array.dtype)}
    if len(numbers) <= FEW:
        return made | {"values": numbers.tolist()}
    finite = numbers[np.isfinite(numbers)]
    if not len(finite):
        return made | {"lost": len(numbers)}
    counts, edges = _histogram(finite)
    return made | {
        "least": float(finite.min()),
        "median": float(np.median(finite)),
        "greatest": float(finite.max()),
        "counts": counts.tolist(),
        "edges": [float(edges[0]), float(edges[-1])],
        "lost": len(numbers) - len(finite),
    }


def _histogram(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return counts and edges; one bar where no range, or none in float64, can be divided."""
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            return np.histogram(numbers, BARS)
    except ValueError:
        return np.array([len(numbers)]), np.array([numbers.min(), numbers.max()])
