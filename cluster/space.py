"""The search space: what a sweep draws for a new trial, and perturbs when one copies another."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from gradhpo.cluster import conditional, distributions
from gradhpo.cluster.conditional import Conditional
from gradhpo.cluster.distributions import Distribution
from gradhpo.cluster.race import Race
from gradhpo.errors import check_finite

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
Setting: TypeAlias = "Distribution | Conditional | Sequence[Conditional]"
"""Of all combinations of choices, of some of them, or one for each of some."""


@dataclasses.dataclass(frozen=True)
class SearchSpace:
    """What differs between trials.

    Args:
      hyperparams: by name, the hyperparameters that a new trial draws: the path of a leaf of λ
        with dots between its parts (`"decay.w1"`), and `""` where λ is a single array. One number
        is drawn for a leaf, and fills it; what `Problem.init` gives stays in all others. An
        optimizer setting is searched by making it a hyperparameter
        (`inner_optimizer=lambda λ: …`). One that only some combinations of choices have is
        `when(loguniform(…), method="greedy")`, or a list of such.
      lr_hyper: the outer learning rate, where the optimizer has no `outer_optimizer`: a
        distribution, or one number for all trials; `when(…)`, or a list of such, where only some
        combinations have one, or others.
      choices: what changes the program: arguments, by name, of the functions that make the
        problem and the optimizer. Every combination is a population of its own, inside which
        trials copy each other.
      race: `Race(…)` lets the worse combinations end, and the others have their slots; without it
        each keeps an equal share.

    Raises:
      TypeError: if something is not a distribution, or no table by name.
      ValueError: for an empty list, a choice that is NaN, a condition on what is none of them, or a
        race between fewer than two combinations.
    """

    hyperparams: Mapping[str, Setting] = dataclasses.field(default_factory=dict)
    lr_hyper: Setting | float | None = None
    choices: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)
    race: Race | None = None

    def __post_init__(self) -> None:
        for part in ("hyperparams", "choices"):
            _check_table(f"SearchSpace.{part}", getattr(self, part))
        if isinstance(self.lr_hyper, np.generic):
            object.__setattr__(self, "lr_hyper", self.lr_hyper.item())
        if isinstance(self.lr_hyper, list):
            object.__setattr__(self, "lr_hyper", tuple(self.lr_hyper))
        listed = {n: tuple(x) if isinstance(x, list) else x for n, x in self.hyperparams.items()}
        object.__setattr__(self, "hyperparams", listed)
        accepted = f"a distribution: {distributions.ACCEPTED}"
        for name in self.names():
            if not self.alternatives(name):
                raise ValueError(f"SearchSpace: {name!r} must be {accepted}, got an empty list")
            for one in self.alternatives(name):
                given = conditional.kind(one.given) if name == LR_HYPER else one.given
                if not isinstance(given, distributions.KINDS):
                    raise TypeError(f"SearchSpace: {name!r} must be {accepted}, got {given!r}")
                if name == LR_HYPER and isinstance(one.given, float | int):
                    check_finite("SearchSpace.lr_hyper", one.given)
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
                if isinstance(value, float) and math.isnan(value):
                    raise ValueError(f"SearchSpace.choices[{name!r}] has a NaN, which equals none")
        self._check_conditions()
        if self.race is not None and not isinstance(self.race, Race):  # pyright: ignore
            raise TypeError(f"SearchSpace.race must be a Race, got {self.race!r}")
        if self.race is not None and len(self.variants()) < 2:
            raise ValueError("SearchSpace.race needs choices, of two or more combinations")

    def names(self) -> list[str]:
        """Return the names of all settings, `lr_hyper` among them, in whatever combination."""
        rate = [] if self.lr_hyper is None else [LR_HYPER]
        if LR_HYPER in self.hyperparams and rate:
            raise ValueError("SearchSpace: a hyperparameter named lr_hyper beside lr_hyper=")
        return [*self.hyperparams, *rate]

    def alternatives(self, name: str) -> tuple[Conditional, ...]:
        """Return a setting's distributions, of which one at most holds in any combination."""
        given: Any = self.lr_hyper if name == LR_HYPER else None
        given = self.hyperparams.get(name, given)
        listed = given if isinstance(given, tuple) else (given,)
        return tuple(x if isinstance(x, Conditional) else Conditional(x, {}) for x in listed)  # pyright: ignore

    def of(self, combination: Mapping[str, Any]) -> SearchSpace:
        """Return the space of one combination of choices: its settings, without conditions."""
        if not any(one.conditions for name in self.names() for one in self.alternatives(name)):
            return self
        there: dict[str, Any] = {}
        for name in self.names():
            there |= {n: one.given for n, one in self._holding(name, combination)}
        rate = there.pop(LR_HYPER, None) if self.lr_hyper is not None else None
        return dataclasses.replace(self, hyperparams=there, lr_hyper=rate)

    def settings(self) -> dict[str, Distribution]:
        """Return all distributions by name, `lr_hyper` among them.

        Raises:
          ValueError: if some depend on choices: ask the space `of` one combination.
        """
        made: dict[str, Distribution] = {}
        for name in self.names():
            one, *others = self.alternatives(name)
            if one.conditions or others:
                text = f"SearchSpace: {name!r} depends on choices: ask space.of(combination)"
                raise ValueError(text)
            made[name] = conditional.kind(one.given)
        return made

    def kinds(self) -> dict[str, dict[int, Distribution]]:
        """Return each setting's distributions, by number of a combination that has it."""
        of = [self.of(one).settings() for one in self.variants()]
        return {
            name: {number: known[name] for number, known in enumerate(of) if name in known}
            for name in self.names()
        }

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

    def draw_first(self, rng: np.random.Generator, variant: np.ndarray) -> Changes:
        """Return the settings of the first trials: `variant` is each slot's combination."""
        combinations, n = self.variants(), len(variant)
        made: Changes = {}
        for name in self.names():
            mask, drawn = np.zeros(n, bool), np.zeros(n)
            for one in self.alternatives(name):
                holding = [i for i, known in enumerate(combinations) if one.holds(known)]
                here = np.isin(variant, holding)
                drawn = np.where(here, conditional.kind(one.given).sample(rng, n), drawn)
                mask |= here
            made[name] = Change(mask, np.zeros(n), drawn)
        return made

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
            space["hyperparams"] = {k: _described(v) for k, v in self.hyperparams.items()}
        if self.lr_hyper is not None:
            space["lr_hyper"] = _described(self.lr_hyper)
        if self.choices:
            space["choices"] = {name: list(values) for name, values in self.choices.items()}
        if self.race is not None:
            space["race"] = self.race.describe()
        return space

    @classmethod
    def parse(cls, description: Mapping[str, Any]) -> SearchSpace:
        """Return the space that `describe` wrote, or a TOML table with the same keys.

        Raises:
          ValueError: for an unknown key or distribution, by name.
        """
        _check_table("space", description)
        if unknown := set(description) - {"hyperparams", LR_HYPER, "choices", "race"}:
            accepted = "hyperparams, lr_hyper, choices and race"
            raise ValueError(f"space takes {accepted}, got {sorted(unknown)[0]!r}")
        given: dict[str, Any] = dict(description)
        hyperparams: dict[str, Any] = given.get("hyperparams", {})
        _check_table("space.hyperparams", hyperparams)
        rate, race = given.get(LR_HYPER), given.get("race")
        plain = rate is None or isinstance(rate, float | int)
        return cls(
            {name: conditional.parse(name, text) for name, text in hyperparams.items()},
            rate if plain else conditional.parse(LR_HYPER, rate),
            given.get("choices", {}),
            None if race is None else Race.parse(race),
        )

    def _holding(self, name: str, combination: Mapping[str, Any]) -> list[tuple[str, Conditional]]:
        return [(name, one) for one in self.alternatives(name) if one.holds(combination)]

    def _check_conditions(self) -> None:
        for name in self.names():
            for one in self.alternatives(name):
                one.check(name, self.choices)
            for combination in self.variants():
                if len(self._holding(name, combination)) > 1:
                    raise ValueError(
                        f"SearchSpace: {name!r} has several distributions for {said(combination)}"
                    )


def said(combination: Mapping[str, Any]) -> str:
    """Return a combination of choices in words."""
    return ", ".join(f"{name}={value}" for name, value in combination.items())


def _described(setting: Any) -> Any:
    if isinstance(setting, tuple):
        return [one.describe() for one in setting]  # pyright: ignore[reportUnknownVariableType]
    return setting if isinstance(setting, float | int) else setting.describe()


def _check_table(name: str, given: Any) -> None:
    if not isinstance(given, Mapping) or not all(isinstance(key, str) for key in given):  # pyright: ignore
        raise TypeError(f"{name} must be a table by name, got {given!r}")


def _plain(values: Any) -> Any:
    """Return a list of choices with Python's numbers in place of NumPy's."""
    if isinstance(values, np.ndarray):
        return values.tolist()
    if isinstance(values, str) or not isinstance(values, Sequence):
        return values
    return [value.item() if isinstance(value, np.generic) else value for value in values]  # pyright: ignore
