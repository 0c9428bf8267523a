"""The search space: what a sweep draws for a new trial, and perturbs when one copies another."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

from gradhpo.errors import check_number

LR_HYPER = "lr_hyper"
"""The name of the outer learning rate among a space's settings."""


class Change(NamedTuple):
    """How a setting of some slots changes: where `mask`, `x ← clip(multiply·x + add)`."""

    mask: np.ndarray
    """Boolean, `(slots,)`."""
    multiply: np.ndarray
    """float64, `(slots,)`."""
    add: np.ndarray
    """float64, `(slots,)`."""


Changes: TypeAlias = dict[str, Change]


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


@dataclasses.dataclass(frozen=True)
class SearchSpace:
    """What differs between trials.

    Args:
      hyperparams: by name, the hyperparameters that a new trial draws: the path of a leaf of λ
        with dots between its parts (`"decay.w1"`), and `""` where λ is a single array. One number
        is drawn for a leaf, and fills it; what `Problem.init` gives stays in all others. An
        optimizer setting is searched by making it a hyperparameter
        (`inner_optimizer=lambda λ: …`).
      lr_hyper: the outer learning rate, where the optimizer has no `outer_optimizer`: a
        distribution, or one number for all trials.
      choices: what changes the program: arguments, by name, of the functions that make the
        problem and the optimizer. Every combination is a population of its own, inside which
        trials copy each other.

    Raises:
      TypeError: if something is not a distribution.
      ValueError: for an empty list of choices.
    """

    hyperparams: Mapping[str, Distribution] = dataclasses.field(default_factory=dict)
    lr_hyper: Distribution | float | None = None
    choices: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.lr_hyper, np.generic):
            object.__setattr__(self, "lr_hyper", self.lr_hyper.item())
        if isinstance(self.lr_hyper, float | int):
            check_number("SearchSpace.lr_hyper", self.lr_hyper, -math.inf, math.inf)
            if not math.isfinite(self.lr_hyper):
                raise ValueError(f"SearchSpace.lr_hyper must be finite, got {self.lr_hyper}")
        accepted = "a distribution: uniform(…), loguniform(…) or choice(…)"
        for name, distribution in self.settings().items():
            if not isinstance(distribution, Uniform | Choice):
                raise TypeError(f"SearchSpace: {name!r} must be {accepted}, got {distribution!r}")
        choices = {name: _plain(values) for name, values in self.choices.items()}
        object.__setattr__(self, "choices", choices)
        for name, values in choices.items():
            if isinstance(values, str) or not isinstance(values, Sequence) or not values:
                raise ValueError(
                    f"SearchSpace.choices[{name!r}] must be a list of values, got {values!r}"
                )
            for value in values:
                if not isinstance(value, str | int | float | bool):
                    raise TypeError(
                        f"SearchSpace.choices[{name!r}] takes strings, numbers and booleans, "
                        f"got {value!r}: let your function make objects of them"
                    )

    def settings(self) -> dict[str, Distribution]:
        """Return all distributions by name, `lr_hyper` among them."""
        rate: dict[str, Any] = {}
        if self.lr_hyper is not None:
            fixed = isinstance(self.lr_hyper, float | int) and not isinstance(self.lr_hyper, bool)
            rate = {LR_HYPER: Choice((float(self.lr_hyper),)) if fixed else self.lr_hyper}  # pyright: ignore
        if LR_HYPER in self.hyperparams and rate:
            raise ValueError("SearchSpace: a hyperparameter named lr_hyper beside lr_hyper=")
        return {**self.hyperparams, **rate}

    def variants(self) -> list[dict[str, Any]]:
        """Return every combination of the choices, in order; one empty one without choices."""
        names = list(self.choices)
        return [
            dict(zip(names, values, strict=True))
            for values in itertools.product(*self.choices.values())
        ]

    def draw(self, rng: np.random.Generator, fresh: np.ndarray) -> Changes:
        """Return the settings of new trials, in the slots where `fresh`."""
        return {
            name: Change(fresh, np.zeros(len(fresh)), distribution.sample(rng, len(fresh)))
            for name, distribution in self.settings().items()
        }

    def explore(
        self,
        rng: np.random.Generator,
        values: Mapping[str, np.ndarray],
        parents: np.ndarray,
        *,
        factors: Sequence[float],
        resample: float,
    ) -> Changes:
        """Return changes to the settings of slots that copy another (`parents[i] ≠ i`).

        Args:
          rng: the decision's generator.
          values: the present settings by name, each `(slots,)`.
          parents: `(slots,)`, the slot that each copies.
          factors: what a number is multiplied by, one of them at random.
          resample: the probability with which a setting is drawn anew instead.
        """
        copies = (parents >= 0) & (parents != np.arange(len(parents)))
        made: Changes = {}
        for name, distribution in self.settings().items():
            current = values[name][np.maximum(parents, 0)]
            multiply, add = distribution.perturb(rng, current, factors)
            drawn = distribution.sample(rng, len(parents))
            anew = rng.random(len(parents)) < resample
            made[name] = Change(copies, np.where(anew, 0, multiply), np.where(anew, drawn, add))
        return made

    def describe(self) -> dict[str, Any]:
        """Return the space as it is written in TOML and in a sweep's manifest."""
        space: dict[str, Any] = {}
        if self.hyperparams:
            space["hyperparams"] = {k: v.describe() for k, v in self.hyperparams.items()}
        if self.lr_hyper is not None:
            rate = self.lr_hyper
            space["lr_hyper"] = rate if isinstance(rate, float | int) else rate.describe()
        if self.choices:
            space["choices"] = {name: list(values) for name, values in self.choices.items()}
        return space

    @classmethod
    def parse(cls, description: Mapping[str, Any]) -> SearchSpace:
        """Return the space that `describe` wrote, or a TOML table with the same keys.

        Raises:
          ValueError: for an unknown key or distribution, by name.
        """
        if unknown := set(description) - {"hyperparams", LR_HYPER, "choices"}:
            accepted = "hyperparams, lr_hyper and choices"
            raise ValueError(f"space takes {accepted}, got {sorted(unknown)[0]!r}")
        given: dict[str, Any] = dict(description)
        hyperparams: dict[str, Any] = given.get("hyperparams", {})
        rate = given.get(LR_HYPER)
        return cls(
            {name: _parse(name, text) for name, text in hyperparams.items()},
            rate if rate is None or isinstance(rate, float | int) else _parse(LR_HYPER, rate),
            given.get("choices", {}),
        )


def _parse(name: str, text: Any) -> Distribution:
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


def _plain(values: Any) -> Any:
    """Return a list of choices with Python's numbers in place of NumPy's."""
    if isinstance(values, np.ndarray):
        return values.tolist()
    if isinstance(values, str) or not isinstance(values, Sequence):
        return values
    return [value.item() if isinstance(value, np.generic) else value for value in values]  # pyright: ignore


def _check_bounds(name: str, low: Any, high: Any) -> None:
    infinity = float("inf")
    check_number(f"{name}: low", low, -infinity, infinity)
    check_number(f"{name}: high", high, -infinity, infinity)
    if not math.isfinite(low) or not math.isfinite(high) or not low < high:
        raise ValueError(f"{name} needs finite low < high, got {low} and {high}")
