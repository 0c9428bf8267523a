"""Given points: what the first slots of a sweep begin with, in place of a draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gradhpo.cluster.numbers_of import nearest, stored_of
from gradhpo.cluster.space import SearchSpace
from gradhpo.errors import check_number

Point = dict[str, Any]
"""Numbers of settings and values of choices, by name; what is left out is drawn."""


def checked(points: Any, space: SearchSpace) -> tuple[Point, ...]:
    """Return a sweep's points as plain dictionaries.

    Args:
      points: dictionaries, or trials of another sweep, whose hyperparameters may have left the
        space: they are taken to its edge.
      space: what they are of.

    Raises:
      TypeError, ValueError: naming the point.
    """
    accepted = "a list of dictionaries, or of another sweep's trials"
    if isinstance(points, Mapping | str) or not isinstance(points, Sequence) or not points:
        raise TypeError(f"points must be {accepted}, got {points!r}")
    return tuple(_checked(f"points[{i}]", point, space) for i, point in enumerate(points))  # pyright: ignore


def slots_of(points: Sequence[Point], space: SearchSpace, population: int) -> list[int]:
    """Return the slot that each point is for: the first free one that has its choices.

    Raises:
      ValueError: if there is none left.
    """
    variants = space.variants()
    size, taken = population // len(variants), [0] * len(variants)
    found: list[int] = []
    for i, point in enumerate(points):
        fitting = [v for v, choices in enumerate(variants) if _fits(point, choices)]
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
    slots = slots_of(points, space, population)
    made: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name, about in space.settings().items():
        given = [(s, point[name]) for s, point in zip(slots, points, strict=True) if name in point]
        which, numbers = (np.array([pair[i] for pair in given]) for i in (0, 1))
        made[name] = which.astype(int), stored_of(f"points: {name!r}", about, numbers.astype(float))
    return made


def inside(settings: Mapping[str, float], space: SearchSpace) -> Point:
    """Return a trial's numbers, those that have left the space as near as it goes."""
    known = space.settings()
    return {
        name: nearest(known[name], number) if name in known else number
        for name, number in settings.items()
    }


def _checked(name: str, point: Any, space: SearchSpace) -> Point:
    if hasattr(point, "settings") and hasattr(point, "choices"):
        point = {**inside(point.settings, space), **point.choices}
    if not isinstance(point, Mapping):
        raise TypeError(f"{name} must be a dictionary or a sweep's trial, got {point!r}")
    settings, made = space.settings(), Point()
    for key, value in point.items():  # pyright: ignore[reportUnknownVariableType]
        if key in settings:
            number = check_number(f"{name}[{key!r}]", value, -float("inf"), float("inf"))
            stored_of(f"{name}[{key!r}]", settings[key], np.array([number]))
            made[key] = number
        elif key in space.choices:
            made[key] = _choice(f"{name}[{key!r}]", value, space.choices[key])
        else:
            known = ", ".join(map(repr, [*settings, *space.choices]))
            raise ValueError(f"{name} has {key!r}; the space has {known}")
    return made


def _choice(name: str, value: Any, known: Sequence[Any]) -> Any:
    plain = value.item() if isinstance(value, np.generic) else value
    if not any(type(plain) is type(one) and plain == one for one in known):
        raise ValueError(f"{name} must be one of {list(known)}, got {value!r}")
    return plain


def _fits(point: Point, choices: Mapping[str, Any]) -> bool:
    return all(point.get(name, value) == value for name, value in choices.items())
