"""What a page says of the best trial, or of one of the front: its numbers, its life, its λ."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gradhpo.checkpoints import DamagedFile
from gradhpo.cluster.front import Found
from gradhpo.cluster.reporting.descent import Tree, life
from gradhpo.cluster.reporting.followed import Followed
from gradhpo.page import packed
from gradhpo.page.leaves import leaves_of

UNSAID = ("programs", "streams")
"""Of a manifest: what says nothing to a person."""

NAMED = ("how.env", "how.runtime_env")
"""Of these a report has the names alone: it is sent around, and values may be secrets."""


def described(followed: Followed, found: Found, tree: Tree) -> dict[str, Any]:
    """Return a kept trial as JSON has it."""
    parents = [one.parent for one in followed.generations]
    lived = life(parents, found.slot, found.generation)
    one = followed.generations[found.generation]
    choices = followed.space.variants()[int(one.variant[found.slot])]
    return {
        "trial": found.trial,
        "generation": found.generation,
        "slot": found.slot,
        "scores": followed.objectives.shown(found.scores),
        "metrics": {n: float(x[found.slot]) for n, x in one.measured.items()},
        "settings": {n: float(x[found.slot]) for n, x in one.ended.items()},
        "choices": choices,
        "lineage": _trials(followed, lived),
        "on": tree.on(lived),
        "life": packed(np.array(lived).ravel(), "<i4"),
    }


def path(followed: Followed, found: Found) -> dict[str, Any]:
    """Return what each metric and setting was along a trial's life, generation by generation."""
    parents = [one.parent for one in followed.generations]
    lived = life(parents, found.slot, found.generation)
    metrics = {n: [followed.column(n, g)[s] for g, s in lived] for n in followed.metrics}
    both = {
        name: {
            when: packed(np.array([followed.setting(name, g, begun=b)[s] for g, s in lived]))
            for when, b in (("begun", True), ("ended", False))
        }
        for name in followed.space.kinds()
    }
    return {"metrics": {n: packed(np.array(x)) for n, x in metrics.items()}, "settings": both}


def leaves(followed: Followed, found: Found) -> dict[str, Any]:
    """Return λ of a kept trial, leaf by leaf; an error where its checkpoint is damaged."""
    try:
        arrays = followed.arrays(found)
    except (DamagedFile, OSError) as error:
        return {"error": str(error)}
    return leaves_of(arrays, ".hyperparams")


def _trials(followed: Followed, lived: Sequence[tuple[int, int]]) -> list[int]:
    numbers = [int(followed.generations[g].trial[s]) for g, s in lived]
    return list(dict.fromkeys(numbers))


def shown_settings(known: Mapping[str, Any]) -> list[list[str]]:
    """Return what a manifest says, as pairs of a name and a text."""
    made: dict[str, Any] = {}
    for name, value in known.items():
        inner: dict[str, Any] = dict(value) if isinstance(value, Mapping) else {"": value}  # pyright: ignore
        made |= {f"{name}.{n}" if n else name: x for n, x in inner.items()}
    made |= {name: list(made[name]) for name in NAMED if made.get(name)}
    said = {n: x for n, x in made.items() if x is not None and n not in UNSAID}
    return [[n, x if isinstance(x, str) else json.dumps(x)] for n, x in said.items()]
