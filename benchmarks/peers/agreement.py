"""Do two peers compute the same: the first hypergradient, and the validation losses it leads to."""

from __future__ import annotations

from typing import Any

import contenders
import numpy as np

TOLERANCE = 1e-3
"""Relative: of the norm of a hypergradient, and of each loss."""


class DisagreementError(Exception):
    """What a peer computes is not what it is said to be."""

    def __init__(self, reason: str, distance: float) -> None:
        super().__init__(reason)
        self.distance = distance


def distance(found: Any, expected: Any) -> float:
    """Return the norm of the difference over the norm of what is expected."""
    a, b = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    length = np.linalg.norm(b)
    return float(np.linalg.norm(a - b) / (length if length > 0 else 1))


def check(peer: str, model: str, case: str, found: Any, expected: Any) -> float:
    """Return how far a peer's hypergradient is from ours.

    Raises:
      DisagreementError: if it should agree and does not, or the losses do not, or it is said to be
        another one and agrees.
    """
    far = distance(found["hypergradient"], expected["hypergradient"])
    count = contenders.checked_losses(peer, case)
    losses = distance(found["losses"][:count], expected["losses"][:count])
    agrees = far <= contenders.ROUGHER.get((peer, case), TOLERANCE)
    another = contenders.why_another(peer, case, model)
    if agrees and another:
        raise DisagreementError(f"its hypergradient agrees, and was said not to: {another}", far)
    if not np.isfinite(far):
        raise DisagreementError("its hypergradient is not finite", far)
    if not (agrees or another):
        raise DisagreementError(f"its hypergradient is {far:.1e} from ours", far)
    if not (losses <= TOLERANCE or another):
        told = f"{found['losses'][:count]}, ours {expected['losses'][:count]}"
        raise DisagreementError(f"its losses do not agree: {told}", far)
    return far
