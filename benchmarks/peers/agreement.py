"""Do two peers compute the same: the first hypergradient, and the validation losses it leads to."""

from __future__ import annotations

from typing import Any

import contenders
import numpy as np

TOLERANCE = 1e-3
"""Relative: of the norm of a hypergradient, and of each loss."""


def distance(found: Any, expected: Any) -> float:
    """Return the norm of the difference over the norm of what is expected."""
    a, b = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    length = np.linalg.norm(b)
    return float(np.linalg.norm(a - b) / (length if length > 0 else 1))


def check(peer: str, model: str, case: str, found: Any, expected: Any) -> float:
    """Return how far a peer's hypergradient is from ours.

    Raises:
      SystemExit: if it should agree and does not, or the losses do not, or it is said to be
        another one and agrees.
    """
    far = distance(found["hypergradient"], expected["hypergradient"])
    count = contenders.checked_losses(peer, case)
    losses = distance(found["losses"][:count], expected["losses"][:count])
    same = contenders.same_hypergradient(peer, case)
    if (far <= TOLERANCE) != same:
        verb = "agrees" if not same else "does not agree"
        raise SystemExit(f"{peer}'s hypergradient of {case} on {model} {verb}: {far:.1e} from ours")
    if not losses <= TOLERANCE:
        raise SystemExit(
            f"{peer}'s losses of {case} on {model} do not agree: {found['losses'][:count]}, "
            f"ours {expected['losses'][:count]}"
        )
    return far
