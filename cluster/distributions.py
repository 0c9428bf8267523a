"""Distributions of the numbers that a sweep searches: drawn, perturbed, written in TOML."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np

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

    def describe(self) -> dict[str, Any]:
        """Return the distribution as it is written in TOML."""
        name = "loguniform" if self.log else "uniform"
        stored = {"stored": "log"} if self.stored == "log" else {}
        return {name: [self.low, self.high], **stored}


@dataclasses.dataclass(frozen=True)
class Choice:
    """One of some numbers, in their order; see `choice`."""

    values: tuple[float, ...]

    @property
    def bounds(self) -> tuple[float, float]:
        """The smallest and the largest."""
        return min(self.values), max(self.values)

    def sample(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """Return n draws."""
        return rng.choice(np.asarray(self.values), n)

    def perturb(
        self, rng: np.random.Generator, current: np.ndarray, factors: Sequence[float]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return `(multiply, add)` that move to a neighbour of the nearest value."""
        del factors
        values = np.asarray(self.values)
        nearest = np.argmin(np.abs(current[:, None] - values), axis=1)
        moved = nearest + rng.choice([-1, 1], len(current))
        return np.zeros(len(current)), values[np.clip(moved, 0, len(values) - 1)]

    def describe(self) -> dict[str, Any]:
        """Return the distribution as it is written in TOML."""
        return {"choice": list(self.values)}


Distribution: TypeAlias = "Uniform | Choice"


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


def choice(values: Sequence[float]) -> Choice:
    """Return one of some numbers, each as likely; a perturbation moves to a neighbour.

    For choices that change the program (a method, a width), see `SearchSpace.choices`.

    Raises:
      ValueError: for fewer than two numbers.
    """
    numbers = tuple(float(value) for value in values)
    if len(numbers) < 2 or not np.isfinite(numbers).all():
        raise ValueError(f"choice takes two or more finite numbers, got {list(values)!r}")
    return Choice(numbers)


def parse(name: str, text: Any) -> Distribution:
    """Return the distribution that `describe` wrote, or a TOML table with the same key.

    Raises:
      ValueError: for what is none; it says `name`.
    """
    accepted = "{uniform = [low, high]}, {loguniform = [low, high]} or {choice = [numbers]}"
    wrong = ValueError(f"space: {name} must be {accepted}, got {text!r}")
    if not isinstance(text, Mapping):
        raise wrong
    table: dict[str, Any] = dict(text)
    options = {key: table.pop(key) for key in ("stored",) if key in table}
    if len(table) != 1:
        raise wrong
    ((kind, numbers),) = table.items()
    if not isinstance(numbers, Sequence) or isinstance(numbers, str):
        raise wrong
    if kind == "choice" and not options:
        return choice(numbers)
    if kind not in ("uniform", "loguniform") or len(numbers) != 2:
        raise wrong
    if kind == "uniform" and not options:
        return uniform(*numbers)
    if kind == "loguniform":
        return loguniform(*numbers, **options)
    raise wrong


def _check_bounds(name: str, low: Any, high: Any) -> None:
    infinity = float("inf")
    check_number(f"{name}: low", low, -infinity, infinity)
    check_number(f"{name}: high", high, -infinity, infinity)
    if not math.isfinite(low) or not math.isfinite(high) or not low < high:
        raise ValueError(f"{name} needs finite low < high, got {low} and {high}")
