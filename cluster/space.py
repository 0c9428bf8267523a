"""The search space: what a sweep draws for a new trial, and perturbs when one copies another."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from gradhpo.cluster import distributions
from gradhpo.cluster.discrete import Choice
from gradhpo.cluster.distributions import Distribution
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
        accepted = f"a distribution: {distributions.ACCEPTED}"
        for name, distribution in self.settings().items():
            if not isinstance(distribution, distributions.KINDS):
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

    def searched(self) -> dict[str, Distribution]:
        """Return those of `settings` that can be more than one number."""
        return {n: about for n, about in self.settings().items() if np.ptp(about.bounds) > 0}

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
            {name: distributions.parse(name, text) for name, text in hyperparams.items()},
            rate
            if rate is None or isinstance(rate, float | int)
            else distributions.parse(LR_HYPER, rate),
            given.get("choices", {}),
        )


def _plain(values: Any) -> Any:
    """Return a list of choices with Python's numbers in place of NumPy's."""
    if isinstance(values, np.ndarray):
        return values.tolist()
    if isinstance(values, str) or not isinstance(values, Sequence):
        return values
    return [value.item() if isinstance(value, np.generic) else value for value in values]  # pyright: ignore
