"""What a sweep compares its trials by: one metric, or several objectives with a direction each."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from gradhpo.cluster.dominance import places
from gradhpo.cluster.failures import SweepError

Metric: TypeAlias = str | Mapping[str, str]
"""A name, or by name "min" or "max" of each objective."""
MODES = {"min": 1, "max": -1}


@dataclasses.dataclass(frozen=True)
class Objectives:
    """The columns that are compared, with 1 for each that is minimized, -1 for each maximized."""

    signs: Mapping[str, int]

    @classmethod
    def of(cls, metric: Metric, mode: str) -> Objectives:
        """Return what the checked arguments of a sweep say."""
        given = {metric: mode} if isinstance(metric, str) else metric
        return cls({name: MODES[one] for name, one in given.items()})

    @property
    def names(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(self.signs)

    @property
    def several(self) -> bool:
        """Whether there is more than one."""
        return len(self.signs) > 1

    def only(self, what: str, instead: str) -> tuple[str, int]:
        """Return the name and the sign of the only one.

        Raises:
          SweepError: if there are several, of which `what` makes no sense.
        """
        if self.several:
            raise SweepError(f"the objectives are {', '.join(self.names)}: {what}. {instead}")
        return next(iter(self.signs.items()))

    @property
    def compared(self) -> tuple[str, int]:
        """What `score` is of, and its sign: the metric, or a trial's place among all, from 0."""
        return ("place", 1) if self.several else next(iter(self.signs.items()))

    def scores(self, table: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return `(slots, objectives)`, all to be minimized."""
        return np.stack([table[name] * sign for name, sign in self.signs.items()], axis=1)

    def score(self, table: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return one number a slot, to be minimized: the metric, or its place among the slots."""
        scores = self.scores(table)
        return places(scores) if self.several else scores[:, 0]

    def shown(self, scores: Sequence[float]) -> dict[str, float]:
        """Return scores by name, as the metrics themselves are."""
        return {n: x * sign for (n, sign), x in zip(self.signs.items(), scores, strict=True)}

    def __str__(self) -> str:
        """Return the names, with what is not minimized."""
        return ", ".join(n if sign > 0 else f"{n} (max)" for n, sign in self.signs.items())


def written(metric: Metric) -> Any:
    """Return a metric as a manifest has it: in order, which decides what a front's scores are."""
    return metric if isinstance(metric, str) else [[name, mode] for name, mode in metric.items()]


def parsed(given: Any) -> Any:
    """Return what `written` wrote, or what TOML gives as it is."""
    pairs = isinstance(given, list) and all(
        isinstance(one, list) and len(one) == 2 for one in given
    )  # pyright: ignore
    return dict(given) if pairs and given else given  # pyright: ignore


def checked(metric: Any, mode: Any) -> Metric:
    """Return a sweep's `metric` as it is written: a name, or a mapping of two names or more.

    Raises:
      TypeError, ValueError: naming the argument.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {tuple(MODES)}, got {mode!r}")
    if isinstance(metric, str):
        return metric
    accepted = 'a name, a list of names, or a mapping of names to "min" or "max"'
    if isinstance(metric, Mapping):
        named: dict[Any, Any] = dict(metric)  # pyright: ignore[reportUnknownArgumentType]
        if mode != "min":
            raise ValueError(f"mode is of one metric or of a list; metric={named!r} says its own")
    elif isinstance(metric, Sequence):
        if not all(isinstance(name, str) for name in metric):  # pyright: ignore[reportUnknownVariableType]
            raise ValueError(f"metric must be {accepted}, got {metric!r}")
        named = dict.fromkeys(metric, mode)  # pyright: ignore[reportUnknownVariableType]
        if len(named) < len(metric):  # pyright: ignore[reportUnknownArgumentType]
            raise ValueError(f"metric names an objective twice: {metric!r}")
    else:
        raise TypeError(f"metric must be {accepted}, got {metric!r}")
    if not all(isinstance(n, str) and one in [*MODES] for n, one in named.items()):
        raise ValueError(f"metric must be {accepted}, got {metric!r}")
    if len(named) < 2:
        raise ValueError(f"metric takes two objectives or more, or one name; got {metric!r}")
    return named
