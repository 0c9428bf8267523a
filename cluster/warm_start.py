"""Points for a sweep from what another one found."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from gradhpo.cluster import claim
from gradhpo.cluster import columns as names
from gradhpo.cluster.columns import TRIAL, VARIANT
from gradhpo.cluster.dominance import places
from gradhpo.cluster.numbers_of import number_of
from gradhpo.cluster.points import Point, Taken, inside
from gradhpo.cluster.result import SweepResult
from gradhpo.cluster.settings import folder_of
from gradhpo.errors import check_count
from gradhpo.files import Unreachable, Where


def points_from(storage: Where, best: int) -> list[Point]:
    """Return the settings and choices of another sweep's best trials, for `Sweep(points=…)`.

    Each trial counts as it was after its best generation; of several objectives the first fronts
    are the best. They are numbers, and the sweep that takes them does not depend on this storage:
    when it goes on, what it began with counts, whatever the other has found since.

    Args:
      storage: the other sweep's; no code that it names is run.
      best: how many trials, at most.

    Raises:
      SweepError: if it has no generation.
      ValueError: if all of its trials have diverged.
    """
    check_count("best", best)
    result = SweepResult.from_storage(storage)
    table, space = result.table, result.space
    place = places(result.objectives.scores(table))
    rows = np.argsort(place)[: np.isfinite(place).sum()]
    if not len(rows):
        raise ValueError(f"points_from: every trial in {result.where} has diverged")
    _, first = np.unique(table[TRIAL][rows], return_index=True)
    made: list[Point] = []
    for row in rows[np.sort(first)][:best].tolist():
        choices = space.variants()[int(table[VARIANT][row])]
        own = space.of(choices)
        has = {name: table[names.setting(name)][row] for name in own.settings()}
        known = {n: float(x) for n, x in has.items() if np.isfinite(x)}
        settings = {name: number_of(own.settings()[name], x) for name, x in known.items()}
        made.append({**inside(settings, own), **choices})
    return Taken(made, source(storage, best))


def source(storage: Where, best: int) -> dict[str, Any]:
    """Return what a manifest says of where points were found."""
    return {"storage": str(folder_of(storage)), "best": best}


def read(given: Any) -> Any:
    """Return the points that TOML or a manifest gives: themselves, or where to find them.

    Raises:
      ValueError: for a table with other names than storage and best.
    """
    if not isinstance(given, dict):
        return given
    return points_from(**_asked(given))


def settled(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what TOML says with the points that its storage began with, if it asks for these.

    The other sweep is not looked at then: it may have gone on, or be gone.
    """
    points, storage = given.get("points"), given.get("storage")
    if not isinstance(points, dict) or storage is None:
        return given
    asked = Taken([], source(**_asked(points)))
    with contextlib.suppress(Unreachable, ImportError):  # which the sweep says, when it runs
        return {**given, "points": claim.begun_with(folder_of(storage), asked) or points}
    return given


def _asked(given: Any) -> dict[str, Any]:
    table: dict[str, Any] = dict(given)
    if set(table) != {"storage", "best"}:
        raise ValueError(
            'points must be a list of tables, or {storage = "folder", best = 8}, got '
            f"{sorted(table)}"
        )
    return table
