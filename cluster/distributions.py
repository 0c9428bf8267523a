"""Distributions of the numbers that a sweep searches: drawn, perturbed, written in TOML."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np

from gradhpo.cluster.discrete import (
    Categorical,
    Choice,
    Integer,
    categorical,
    choice,
    integer,
    within,
)
from gradhpo.errors import check_number


@dataclasses.dataclass(frozen=True)
class Uniform:
    """A number in [low, high]; see `uniform` and `loguniform`."""

    low: float
    high: float
    log: bool = False
    stored: Literal["value", "log"] = "value"

    @property
    def bounds(self) -> tuple[float, float]:
        """The bounds of what is stored in the hyperparameter."""
        if self.stored == "log":
            return math.log(self.low), math.log(self.high)
        return self.low, self.high

    @property
    def range(self) -> str:
        """What a setting may be, in words."""
        return "from {:g} to {:g}".format(*self.bounds)

    def sample(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """Return n draws, as they are stored."""
        if not self.log:
            return rng.uniform(self.low, self.high, n)
        draws = rng.uniform(math.log(self.low), math.log(self.high), n)
        return draws if self.stored == "log" else np.exp(draws)

    def perturb(
        self, rng: np.random.Generator, current: np.ndarray, factors: Sequence[float]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return `(multiply, add)`: a factor for each, chosen at random."""
        chosen = rng.choice(np.asarray(factors, float), len(current))
        if self.stored == "log":
            return np.ones(len(current)), np.log(chosen)
        return chosen, np.zeros(len(current))

    def unit(self, values: np.ndarray) -> np.ndarray:
        """Return where each number is between the bounds, from 0 to 1; `(n, 1)`."""
        low, high = self.bounds
        if self.log and self.stored == "value":
            values, low, high = np.log(values), math.log(low), math.log(high)
        return ((values - low) / (high - low))[:, None]

    def accepts(self, multiply: np.ndarray, add: np.ndarray) -> np.ndarray:
        """Return which changes a scheduler may make: it sets what is between the bounds."""
        return (multiply != 0) | within(add, self.bounds)

    def describe(self) -> dict[str, Any]:
        """Return the distribution as it is written in TOML."""
        name = "loguniform" if self.log else "uniform"
        stored = {"stored": "log"} if self.stored == "log" else {}
        return {name: [self.low, self.high], **stored}


Distribution: TypeAlias = "Uniform | Choice | Integer | Categorical"
KINDS = (Uniform, Choice, Integer, Categorical)
ACCEPTED = "uniform(…), loguniform(…), choice(…), integer(…) or categorical(…)"


def uniform(low: float, high: float) -> Uniform:
    """Return a number drawn uniformly from [low, high]; perturbed by a factor, and clipped.

    Raises:
      ValueError: unless low < high, both finite.
    """
    _check_bounds("uniform", low, high)
    return Uniform(float(low), float(high))


def loguniform(low: float, high: float, *, stored: Literal["value", "log"] = "value") -> Uniform:
    """Return a number whose logarithm is drawn uniformly; perturbed by a factor, and clipped.

    Args:
      low: above 0.
      high: above `low`.
      stored: "log" where the hyperparameter holds the logarithm, as in
        `inner_optimizer=lambda λ: optax.sgd(jnp.exp(λ["log_rate"]))`; the bounds stay those of the
        number itself.

    Raises:
      ValueError: for an argument out of range.
    """
    _check_bounds("loguniform", low, high)
    if low <= 0:
        raise ValueError(f"loguniform: low must be above 0, got {low}")
    if stored not in ("value", "log"):
        raise ValueError(f'loguniform: stored must be "value" or "log", got {stored!r}')
    return Uniform(float(low), float(high), log=True, stored=stored)


def parse(name: str, text: Any) -> Distribution:
    """Return the distribution that `describe` wrote, or a TOML table with the same key.

    Raises:
      ValueError: for what is none; it says `name`.
    """
    kinds = ("uniform", "loguniform", "integer")
    accepted = (
        f"{', '.join(f'{{{kind} = [low, high]}}' for kind in kinds)}, {{choice = [numbers]}} or "
        "{categorical = [numbers]}"
    )
    wrong = ValueError(f"space: {name} must be {accepted}, got {text!r}")
    if not isinstance(text, Mapping):
        raise wrong
    table: dict[str, Any] = dict(text)
    options = {key: table.pop(key) for key in ("stored", "log") if key in table}
    if len(table) != 1:
        raise wrong
    ((kind, numbers),) = table.items()
    make, known, many = _WRITTEN.get(kind, (None, (), False))
    listed = isinstance(numbers, Sequence) and not isinstance(numbers, str)
    if make is None or not listed or not set(options) <= set(known):
        raise wrong
    if many:
        return make(numbers, **options)
    if len(numbers) != 2:
        raise wrong
    return make(*numbers, **options)


_WRITTEN: dict[str, tuple[Callable[..., Distribution], tuple[str, ...], bool]] = {
    "uniform": (uniform, (), False),
    "loguniform": (loguniform, ("stored",), False),
    "integer": (integer, ("log",), False),
    "choice": (choice, (), True),
    "categorical": (categorical, (), True),
}
"""By its name in TOML: what makes it, its options, and whether from a list of any length."""


def _check_bounds(name: str, low: Any, high: Any) -> None:
    infinity = float("inf")
    check_number(f"{name}: low", low, -infinity, infinity)
    check_number(f"{name}: high", high, -infinity, infinity)
    if not math.isfinite(low) or not math.isfinite(high) or not low < high:
        raise ValueError(f"{name} needs finite low < high, got {low} and {high}")
