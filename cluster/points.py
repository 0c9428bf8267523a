"""Given points: what the first slots of a sweep begin with, in place of a draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gradhpo.cluster.distributions import Distribution
from gradhpo.cluster.numbers_of import nearest, stored_of
from gradhpo.cluster.space import SearchSpace, said
from gradhpo.errors import check_number

Point = dict[str, Any]
"""Numbers of settings and values of choices, by name; what is left out is drawn."""


class Taken(list[Point]):
    """Points that were found in another sweep, which may go on meanwhile: what was found counts.

    Args:
      points: what was found.
      source: where, and how many were asked for.
    """

    def __init__(self, points: Sequence[Point], source: Mapping[str, Any]) -> None:
        super().__init__(points)
        self._found, self._source = tuple(points), dict(source)

    @property
    def source(self) -> dict[str, Any] | None:
        """Where they were found; None where the list was changed since."""
        return self._source if self._found == tuple(self) else None


def source_of(points: Any) -> dict[str, Any] | None:
    """Return where points were found; None for points of one's own."""
    return points.source if isinstance(points, Taken) else None


def checked(points: Any, space: SearchSpace) -> Sequence[Point]:
    """Return a sweep's points as plain dictionaries.

    Args:
      points: dictionaries, or trials of another sweep, whose hyperparameters may have left the
        space: they are taken to its edge. Those with the same settings and choices are one point.
      space: what they are of.

    Raises:
      TypeError, ValueError: naming the point.
    """
    accepted = "a list of dictionaries, or of another sweep's trials"
    if isinstance(points, Mapping | str) or not isinstance(points, Sequence) or not points:
        raise TypeError(f"points must be {accepted}, got {points!r}")
    given: list[Any] = list(points)  # pyright: ignore[reportUnknownArgumentType]
    made, of_trials = list[Point](), list[Point]()
    for i, point in enumerate(given):
        one = _checked(f"points[{i}]", point, space)
        if _is_trial(point):  # a front has a trial as it was after several generations
            if one in of_trials:
                continue
            of_trials.append(one)
        made.append(one)
    source = source_of(points)
    return tuple(made) if source is None else Taken(made, source)


def slots_of(points: Sequence[Point], space: SearchSpace, population: int) -> list[int]:
    """Return the slot that each point is for: the first free one that has what it gives.

    Raises:
      ValueError: if there is none left.
    """
    variants = space.variants()
    size, taken = population // len(variants), [0] * len(variants)
    found: list[int] = []
    for i, point in enumerate(points):
        fitting = [v for v, choices in enumerate(variants) if _has(point, space, choices)]
        free = [v for v in fitting if taken[v] < size]
        if not free:
            raise ValueError(f"points[{i}]: all {size * len(fitting)} slots for it are taken")
        found.append(free[0] * size + taken[free[0]])
        taken[free[0]] += 1
    return found


def stored(
    points: Sequence[Point], space: SearchSpace, population: int
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return what points set, by name of a setting: slots, and the numbers as they are stored."""
    slots, variants = slots_of(points, space, population), space.variants()
    made: dict[str, list[tuple[int, float]]] = {name: [] for name in space.names()}
    for slot, point in zip(slots, points, strict=True):
        settings = space.of(variants[slot * len(variants) // population]).settings()
        for name in settings.keys() & point.keys():
            number = np.array([float(point[name])])
            made[name].append((slot, stored_of(f"points: {name!r}", settings[name], number)[0]))
    return {
        name: (np.array([s for s, _ in pairs], int), np.array([x for _, x in pairs], float))
        for name, pairs in made.items()
    }


def inside(settings: Mapping[str, float], space: SearchSpace) -> Point:
    """Return a trial's numbers, those that have left its combination's space as near as it goes."""
    known = space.settings()
    return {
        name: nearest(known[name], number) if name in known else number
        for name, number in settings.items()
    }


def _checked(name: str, point: Any, space: SearchSpace) -> Point:
    if _is_trial(point):
        point = _of_trial(point, space)
    if not isinstance(point, Mapping):
        raise TypeError(f"{name} must be a dictionary or a sweep's trial, got {point!r}")
    settings, made = space.names(), Point()
    for key, value in point.items():  # pyright: ignore[reportUnknownVariableType]
        if key in settings:
            made[key] = check_number(f"{name}[{key!r}]", value, -float("inf"), float("inf"))
        elif key in space.choices:
            made[key] = _choice(f"{name}[{key!r}]", value, space.choices[key])
        else:
            known = ", ".join(map(repr, [*settings, *space.choices]))
            raise ValueError(f"{name} has {key!r}; the space has {known}")
    _check_together(name, made, space)
    return made


def _is_trial(point: Any) -> bool:
    return hasattr(point, "settings") and hasattr(point, "choices")


def _of_trial(trial: Any, space: SearchSpace) -> Point:
    """Return a trial of another sweep as a point of the first combination that has its choices."""
    for choices in space.variants():
        if _fits(trial.choices, choices):
            return {**inside(trial.settings, space.of(choices)), **trial.choices}
    return {**trial.settings, **trial.choices}


def _check_together(name: str, point: Point, space: SearchSpace) -> None:
    """Raise unless some combination of choices has all that a point gives.

    Raises:
      ValueError: naming what none has.
    """
    fitting = [space.of(choices).settings() for choices in _combinations(point, space)]
    for key in (key for key in point if key not in space.choices):
        having = [settings[key] for settings in fitting if key in settings]
        if not having:
            given = said({n: x for n, x in point.items() if n in space.choices})
            raise ValueError(f"{name} has {key!r}, which trials of {given} have not")
        number = np.array([point[key]])
        if not any(_holds(about, number) for about in having):
            stored_of(f"{name}[{key!r}]", having[0], number)
    if not any(_has(point, space, choices) for choices in space.variants()):
        raise ValueError(f"{name}: no combination of choices has all of {', '.join(point)} so")


def _combinations(point: Point, space: SearchSpace) -> list[dict[str, Any]]:
    return [choices for choices in space.variants() if _fits(point, choices)]


def _has(point: Point, space: SearchSpace, choices: Mapping[str, Any]) -> bool:
    """Whether a combination of choices has all that a point gives."""
    settings = space.of(choices).settings()
    numbers = {key: value for key, value in point.items() if key not in space.choices}
    return _fits(point, choices) and all(
        key in settings and _holds(settings[key], np.array([number]))
        for key, number in numbers.items()
    )


def _holds(about: Distribution, number: np.ndarray) -> bool:
    try:
        stored_of("", about, number)
    except ValueError:
        return False
    return True


def _choice(name: str, value: Any, known: Sequence[Any]) -> Any:
    plain = value.item() if isinstance(value, np.generic) else value
    if not any(type(plain) is type(one) and plain == one for one in known):
        raise ValueError(f"{name} must be one of {list(known)}, got {value!r}")
    return plain


def _fits(point: Point, choices: Mapping[str, Any]) -> bool:
    return all(point.get(name, value) == value for name, value in choices.items())
