"""A setting that exists only where a choice has a given value."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gradhpo.cluster import distributions
from gradhpo.cluster.discrete import Choice
from gradhpo.cluster.distributions import Distribution

WHEN, VALUE = "when", "value"
"""In TOML, beside the distribution: `{loguniform = [low, high], when = {method = "greedy"}}`; and
in place of one, where a number is given."""


@dataclasses.dataclass(frozen=True)
class Conditional:
    """A distribution, or a number, where choices have these values; see `when`."""

    given: Distribution | float
    conditions: Mapping[str, tuple[Any, ...]]
    """By name of a choice, its values."""

    def holds(self, combination: Mapping[str, Any]) -> bool:
        """Whether the setting exists in a combination of choices."""
        return all(
            any(_same(combination[name], value) for value in values)
            for name, values in self.conditions.items()
        )

    def describe(self) -> dict[str, Any]:
        """Return it as it is written in TOML."""
        given = self.given
        what = {VALUE: given} if isinstance(given, float | int) else given.describe()
        lists = {name: list(values) for name, values in self.conditions.items()}
        return {**what, WHEN: {n: v[0] if len(v) == 1 else v for n, v in lists.items()}}

    def check(self, name: str, choices: Mapping[str, Sequence[Any]]) -> None:
        """Raise unless the space has such choices.

        Raises:
          ValueError: naming the setting.
        """
        for choice, values in self.conditions.items():
            if choice not in choices:
                raise ValueError(
                    f"SearchSpace: {name!r} depends on {choice!r}; the choices are "
                    f"{', '.join(map(repr, choices)) or 'none'}"
                )
            for value in values:
                if not any(_same(value, known) for known in choices[choice]):
                    raise ValueError(
                        f"SearchSpace: {name!r} depends on {choice}={value!r}; its values are "
                        f"{', '.join(map(repr, choices[choice]))}"
                    )


def when(given: Distribution | float, /, **conditions: Any) -> Conditional:
    """Return a setting that exists only where choices of the space have these values.

    `when(loguniform(1e-3, 0.3), method="greedy")`; several values of one choice in a list, several
    choices hold together. A setting may have several, `[when(…), when(…)]`, in a list, of which at
    most one may hold in any combination.

    Args:
      given: a distribution; for `lr_hyper` a number, too.
      **conditions: by name of a choice, a value of it or a list of them.

    Raises:
      ValueError: without a condition, or for a value that no choice can have.
    """
    number = isinstance(given, float | int | np.generic) and not isinstance(given, bool | np.bool_)
    if not conditions:
        raise ValueError('when needs the value of a choice, as in when(…, method="greedy")')
    values = {name: _listed(name, value) for name, value in conditions.items()}
    return Conditional(float(given) if number else given, values)  # pyright: ignore


def parse(name: str, text: Any) -> Distribution | Conditional | tuple[Conditional, ...]:
    """Return what `describe` wrote of a setting, or what TOML says in its way.

    Raises:
      ValueError: for what is none; it says `name`.
    """
    if isinstance(text, list):
        made = tuple(parse(name, one) for one in text)  # pyright: ignore[reportUnknownVariableType]
        if not made or not all(isinstance(one, Conditional) for one in made):
            raise ValueError(f"space: {name} has several, each of which needs when = {{…}}")
        return made  # pyright: ignore[reportReturnType]
    if not isinstance(text, Mapping) or WHEN not in text:
        return distributions.parse(name, text)
    table: dict[str, Any] = dict(text)  # pyright: ignore[reportUnknownArgumentType]
    conditions = table.pop(WHEN)
    if not isinstance(conditions, Mapping) or not conditions:
        raise ValueError(f'space: {name}: when must be {{method = "…"}}, got {conditions!r}')
    number = table.get(VALUE)
    plain = set(table) == {VALUE} and isinstance(number, float | int)
    given: Any = number if plain else distributions.parse(name, table)
    return when(given, **conditions)  # pyright: ignore[reportUnknownArgumentType]


def kind(given: Any) -> Any:
    """Return a distribution: itself, or the one of a number."""
    plain = isinstance(given, float | int) and not isinstance(given, bool)
    return Choice((float(given),)) if plain else given


def _listed(name: str, value: Any) -> tuple[Any, ...]:
    values = value.tolist() if isinstance(value, np.ndarray) else value
    listed = values if isinstance(values, list | tuple) else [values]
    plain = tuple(x.item() if isinstance(x, np.generic) else x for x in listed)  # pyright: ignore
    if not plain or not all(isinstance(x, str | int | float | bool) for x in plain):  # pyright: ignore
        raise ValueError(f"when: {name} must be a value of the choice, or a list, got {value!r}")
    return plain


def _same(one: Any, other: Any) -> bool:
    """Whether two values of a choice are one: `True` is not 1."""
    return one == other and isinstance(one, bool) == isinstance(other, bool)
