"""Numbers that are some of the real ones: choices in an order, whole numbers, categories."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from gradhpo.errors import check_number

LARGEST = 2**24
"""The whole numbers up to here are float32 numbers, as which a change reaches a program."""


@dataclasses.dataclass(frozen=True)
class _Listed:
    """One of some numbers."""

    values: tuple[float, ...]

    @property
    def bounds(self) -> tuple[float, float]:
        """The smallest and the largest."""
        return min(self.values), max(self.values)

    def sample(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """Return n draws."""
        return rng.choice(np.asarray(self.values), n)

    def _index(self, values: np.ndarray) -> np.ndarray:
        """Return the place of the nearest of the numbers, for each."""
        return np.argmin(np.abs(values[:, None] - np.asarray(self.values)), axis=1)


@dataclasses.dataclass(frozen=True)
class Choice(_Listed):
    """One of some numbers, in their order; see `choice`."""

    @property
    def range(self) -> str:
        """What a setting may be, in words."""
        return "from {:g} to {:g}".format(*self.bounds)

    def perturb(
        self, rng: np.random.Generator, current: np.ndarray, factors: Sequence[float]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return `(multiply, add)` that move to a neighbour of the nearest value."""
        del factors
        values = np.asarray(self.values)
        moved = self._index(current) + rng.choice([-1, 1], len(current))
        return np.zeros(len(current)), values[np.clip(moved, 0, len(values) - 1)]

    def unit(self, values: np.ndarray) -> np.ndarray:
        """Return the place of each number in the order, from 0 to 1; `(n, 1)`."""
        return self._index(values)[:, None] / max(1, len(self.values) - 1)

    def accepts(self, multiply: np.ndarray, add: np.ndarray) -> np.ndarray:
        """Return which changes a scheduler may make: it sets what is between the bounds."""
        return (multiply != 0) | within(add, self.bounds)

    def describe(self) -> dict[str, Any]:
        """Return the distribution as it is written in TOML."""
        return {"choice": list(self.values)}


@dataclasses.dataclass(frozen=True)
class Integer:
    """A whole number in [low, high]; see `integer`."""

    low: int
    high: int
    log: bool = False

    @property
    def bounds(self) -> tuple[float, float]:
        """The smallest and the largest."""
        return float(self.low), float(self.high)

    @property
    def range(self) -> str:
        """What a setting may be, in words."""
        return f"whole numbers from {self.low} to {self.high}"

    def sample(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """Return n draws; with `log`, a number's share is that of its surroundings' logarithms."""
        if not self.log:
            return rng.integers(self.low, self.high, n, endpoint=True).astype(float)
        draws = rng.uniform(math.log(self.low - 0.5), math.log(self.high + 0.5), n)
        return np.clip(np.round(np.exp(draws)), *self.bounds)

    def perturb(
        self, rng: np.random.Generator, current: np.ndarray, factors: Sequence[float]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return `(multiply, add)` that set the number times a factor, at least one step away."""
        chosen = rng.choice(np.asarray(factors, float), len(current))
        whole = np.round(current)
        moved = np.round(whole * chosen)
        stays = (moved == whole) & (chosen != 1)
        away = np.where(whole < 0, -1, 1) * np.sign(chosen - 1)  # from 0, or towards it
        return np.zeros(len(current)), np.clip(np.where(stays, whole + away, moved), *self.bounds)

    def unit(self, values: np.ndarray) -> np.ndarray:
        """Return where each number is between the bounds, from 0 to 1; `(n, 1)`."""
        low, high = self.bounds
        if self.log:
            values, low, high = np.log(values), math.log(low), math.log(high)
        return ((values - low) / (high - low))[:, None]

    def accepts(self, multiply: np.ndarray, add: np.ndarray) -> np.ndarray:
        """Return which changes a scheduler may make: whole numbers are set, or whole steps made."""
        steps = (multiply == 1) | ((multiply == 0) & within(add, self.bounds))
        return steps & (add == np.round(add))

    def describe(self) -> dict[str, Any]:
        """Return the distribution as it is written in TOML."""
        return {"integer": [self.low, self.high], **({"log": True} if self.log else {})}


@dataclasses.dataclass(frozen=True)
class Categorical(_Listed):
    """One of some numbers that have no order; see `categorical`."""

    @property
    def range(self) -> str:
        """What a setting may be, in words."""
        return f"one of {', '.join(f'{x:g}' for x in self.values)}"

    def perturb(
        self, rng: np.random.Generator, current: np.ndarray, factors: Sequence[float]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return `(multiply, add)` that set any other of the numbers, each as likely."""
        del factors
        step = rng.integers(1, len(self.values), len(current))
        values = np.asarray(self.values)
        return np.zeros(len(current)), values[(self._index(current) + step) % len(values)]

    def unit(self, values: np.ndarray) -> np.ndarray:
        """Return a column for each number, so that any two are at the distance 1; `(n, k)`."""
        return np.eye(len(self.values))[self._index(values)] / math.sqrt(2)

    def accepts(self, multiply: np.ndarray, add: np.ndarray) -> np.ndarray:
        """Return which changes a scheduler may make: it sets one of the numbers."""
        return (multiply == 0) & np.isin(add, self.values)

    def describe(self) -> dict[str, Any]:
        """Return the distribution as it is written in TOML."""
        return {"categorical": list(self.values)}


def choice(values: Sequence[float]) -> Choice:
    """Return one of some numbers, each as likely; a perturbation moves to a neighbour.

    For numbers without an order see `categorical`, and for choices that change the program (a
    method, a width) `SearchSpace.choices`.

    Raises:
      ValueError: for fewer than two numbers.
    """
    numbers = tuple(float(value) for value in values)
    if len(numbers) < 2 or not np.isfinite(numbers).all():
        raise ValueError(f"choice takes two or more finite numbers, got {list(values)!r}")
    return Choice(numbers)


def integer(low: int, high: int, log: bool = False) -> Integer:
    """Return a whole number from low to high, both included.

    A perturbation multiplies it by a factor, rounds, and moves by one at least; it is clipped. The
    hyperparameter is a floating-point leaf that holds whole numbers, as all of λ is, or `lr_hyper`.

    Args:
      low: at least 1 with `log`.
      high: above `low`.
      log: whether its logarithm is drawn uniformly, as far as whole numbers can be.

    Raises:
      TypeError: for what is no whole number.
      ValueError: unless low < high, both between ±2²⁴.
    """
    for name, value in (("low", low), ("high", high)):
        check_number(f"integer: {name}", value, -LARGEST, LARGEST)
        if value != int(value):
            raise TypeError(f"integer: {name} must be a whole number, got {value!r}")
    if not low < high:
        raise ValueError(f"integer needs low < high, got {low} and {high}")
    if log and low < 1:
        raise ValueError(f"integer: low must be at least 1 with log=True, got {low}")
    if not isinstance(log, bool):
        raise TypeError(f"integer: log must be a boolean, got {log!r}")
    return Integer(int(low), int(high), log)


def categorical(values: Sequence[float]) -> Categorical:
    """Return one of some numbers that have no order, each as likely.

    A perturbation takes another one, whichever. The numbers are what the program gets, such as the
    index of a `jax.lax.switch`. For numbers in an order see `choice`.

    Raises:
      ValueError: for fewer than two numbers, or one that is there twice.
    """
    try:
        numbers = () if isinstance(values, str) else tuple(float(value) for value in values)
    except (TypeError, ValueError):
        numbers = ()
    if len(numbers) < 2 or not np.isfinite(numbers).all() or len(set(numbers)) < len(numbers):
        raise ValueError(
            f"categorical takes two or more different finite numbers, such as the index of a "
            f"jax.lax.switch (for what changes the program see choices), got {values!r}"
        )
    return Categorical(numbers)


def within(add: np.ndarray, bounds: tuple[float, float]) -> np.ndarray:
    """Return what is between the bounds, but for what coming through a logarithm rounds off."""
    slack = 1e-9 * max(map(abs, bounds))
    return (add >= bounds[0] - slack) & (add <= bounds[1] + slack)
