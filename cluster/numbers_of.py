"""Settings as a person writes them, and as they are stored in a hyperparameter."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from gradhpo.cluster.discrete import Categorical, Choice, Integer
from gradhpo.cluster.distributions import Distribution, Uniform

__all__ = ["nearest", "numbers_of"]

CLOSE = 1e-6
"""How far a float32 may be from the number that it stands for, relatively."""


def number_of(about: Distribution, stored: float) -> float:
    """Return the number that a stored one stands for; of a choice the value itself."""
    if isinstance(about, Choice | Categorical):
        near = min(about.values, key=lambda known: abs(known - stored))
        return near if np.isclose(near, stored, rtol=CLOSE, atol=0) else stored
    return float(np.exp(stored)) if _holds_logarithm(about) else stored


def numbers_of(about: Distribution, stored: np.ndarray) -> np.ndarray:
    """Return the same of many that were drawn: a logarithm's rounding leads out of no bounds."""
    numbers = np.array([number_of(about, one) for one in stored.astype(float).tolist()])
    return np.clip(numbers, *number_bounds(about))


def column_of(
    kinds: Mapping[int, Distribution], variant: np.ndarray, stored: np.ndarray
) -> np.ndarray:
    """Return a table's column of a setting as the numbers that a person gives.

    Args:
      kinds: the setting's distribution, by number of the combination of choices.
      variant: each row's combination.
      stored: the column.
    """
    numbers = stored.astype(float)
    for combination, about in kinds.items():
        if _holds_logarithm(about):
            here = variant == combination
            numbers[here] = np.exp(numbers[here])
    return numbers


def number_bounds(about: Distribution) -> tuple[float, float]:
    """Return the smallest and the largest number."""
    return (about.low, about.high) if isinstance(about, Uniform) else about.bounds


def nearest(about: Distribution, number: float) -> float:
    """Return the number of the space that is nearest."""
    if isinstance(about, Choice | Categorical):
        return min(about.values, key=lambda known: abs(known - number))
    inside = float(np.clip(number, *number_bounds(about)))
    return float(round(inside)) if isinstance(about, Integer) else inside


def stored_of(name: str, about: Distribution, numbers: np.ndarray) -> np.ndarray:
    """Return how numbers are stored.

    Raises:
      ValueError: for one that is not in the space; it says `name`.
    """
    low, high = number_bounds(about)
    inside = np.isfinite(numbers) & (numbers >= low) & (numbers <= high)
    accepted = f"from {low:g} to {high:g}"
    if isinstance(about, Integer):
        inside, accepted = inside & (numbers == np.round(numbers)), about.range
    if isinstance(about, Choice | Categorical):
        near = np.isclose(numbers[:, None], np.asarray(about.values), rtol=CLOSE, atol=0)
        inside, accepted = near.any(axis=1), f"one of {', '.join(map('{:g}'.format, about.values))}"
    if not inside.all():
        raise ValueError(f"{name} must be {accepted}, got {numbers[~inside][0]:g}")
    return np.log(numbers) if _holds_logarithm(about) else numbers


def _holds_logarithm(about: Distribution) -> bool:
    return isinstance(about, Uniform) and about.stored == "log"
