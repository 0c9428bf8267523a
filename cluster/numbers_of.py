"""Settings as a person writes them, and as they are stored in a hyperparameter."""

from __future__ import annotations

import numpy as np

from gradhpo.cluster.discrete import Categorical, Choice
from gradhpo.cluster.distributions import Distribution

CLOSE = 1e-6
"""How far a float32 may be from the choice that it stands for, relatively."""


def holds_logarithm(about: Distribution) -> bool:
    """Whether the hyperparameter holds the number's logarithm."""
    return getattr(about, "stored", "value") == "log"


def number_of(about: Distribution, stored: float) -> float:
    """Return the number that a stored one stands for; of a choice the value itself."""
    if isinstance(about, Choice | Categorical):
        near = min(about.values, key=lambda known: abs(known - stored))
        return near if np.isclose(near, stored, rtol=CLOSE, atol=0) else stored
    return float(np.exp(stored)) if holds_logarithm(about) else stored


def stored_of(about: Distribution, number: float) -> float:
    """Return how a number is stored."""
    return float(np.log(number)) if holds_logarithm(about) else float(number)
