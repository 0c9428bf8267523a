"""A storage's manifest: what it says of the sweep that it holds."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shlex
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from gradhpo._version import __version__
from gradhpo.checksums import of_arrays
from gradhpo.cluster import importing, points
from gradhpo.cluster.failures import SweepError
from gradhpo.cluster.objectives import Objectives, parsed
from gradhpo.cluster.settings import Identity, Place
from gradhpo.cluster.space import SearchSpace
from gradhpo.cluster.storage import Storage, Text
from gradhpo.files import Where
from gradhpo.state import PyTree

IDENTITY = (
    *(field.name for field in dataclasses.fields(Identity) if field.name != "batching"),
    "x64",
)
"""What makes a run this very run; the rest of a manifest may differ when it is resumed."""
OBJECTS = ("problem", "optimizer", "data", "lr_schedule", "validation")
"""What may be a reference, or an object of a program."""
OLDER = {
    "episode_length": None,
    "lr_reptile": 1.0,
    "episode_init": "reptile",
    "lr_schedule": None,
    "record": None,
    "validation": None,
    "sampler": None,
    "points": None,
    "points_from": None,
    "first_seed": None,
    "rules": None,
    "streams": None,
}
"""What a manifest says that does not have these names yet."""
FIRST = ("sampler", "points", "first_seed")
"""What decides the first generation beside the seed; its first table then says what was drawn."""
NEWER = ("record", "validation", "rules", *FIRST)
"""What identifies a sweep only where it is given: older storages were digested without."""
STREAMS = "by trial and step"
"""How randomness is drawn; runs that drew it otherwise can be read, and not resumed."""


def describe(
    identity: Identity, place: Place, data: PyTree, folders: Iterable[str]
) -> dict[str, Any]:
    """Return the manifest of a sweep.

    Args:
      identity: what decides its numbers, `shards` included.
      place: where it runs.
      data: the arrays that `data` gives.
      folders: where references are looked up.
    """
    made: dict[str, Any] = {
        "gradhpo": __version__,
        **identity.describe(),
        "data": _identified(identity.data, data),
        "points_from": points.source_of(identity.points),
        "x64": x64(),
        "streams": STREAMS,
        "generations": place.generations,
        "sys_path": list(folders),
        "how": place.describe(),
    }
    return json.loads(json.dumps(made))


def read(storage: Where) -> dict[str, Any]:
    """Return a storage's manifest.

    Raises:
      SweepError: if there is none, or it is damaged.
    """
    text = Storage(storage).manifest
    try:
        manifest = json.loads(text.read_text())
        if not isinstance(manifest, dict):
            raise ValueError("not a table")
        made: dict[str, Any] = OLDER | manifest
        if missing := [
            name for name in (*IDENTITY, "generations", "how", "sys_path") if name not in made
        ]:
            raise ValueError(f"it has no {missing[0]!r}")
        return made
    except FileNotFoundError:
        raise SweepError(f"there is no sweep in {str(storage)!r}: no {text.name}") from None
    except ValueError as error:
        raise SweepError(f"{text} is damaged: {error}") from None


def write(text: Text, content: Any) -> None:
    """Write a small text of a storage, whole or not at all.

    Raises:
      OSError: if it cannot be written, naming the storage.
    """
    try:
        text.write_json(content)
    except OSError as error:
        raise OSError(
            error.errno, f"storage {text.files.address!r} cannot be written: {error.strerror}"
        ) from None


def settings(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a sweep that a manifest gives, as TOML has them.

    What was an object of a program, and no reference, is left out.
    """
    fields = (*IDENTITY, "batching", "generations")
    given = {name: manifest.get(name) for name in fields if name != "x64"} | manifest["how"]
    for name in OBJECTS:
        given[name] = importing.reference_of(given[name])
    if (source := manifest.get("points_from")) is not None:
        given["points"] = points.Taken(given["points"], source)
    return {name: value for name, value in given.items() if value is not None}


def of_references(storage: Where) -> dict[str, Any]:
    """Return a manifest from which the sweep can be made again without its program.

    Raises:
      SweepError: if there is none, or it was made from objects.
    """
    known = read(storage)
    if given := objects(known):
        raise SweepError(
            f"{storage} was made by a program, with {' and '.join(given)} given as objects: "
            "run that program again, and it goes on. (With references such as "
            f"{importing.ACCEPTED} the command line can.)"
        )
    return known


def objects(manifest: Mapping[str, Any]) -> list[str]:
    """Return what only the program that made a storage can make again."""
    given = {name: manifest[name] for name in OBJECTS if manifest[name] is not None}
    made = [name for name, value in given.items() if "reference" not in value]
    for name in ("scheduler", "sampler"):
        function = str((manifest[name] or {}).get("function", ""))
        made += [] if importing.findable(function) else [name]
    return made


def how_to_resume(storage: Where, identity: Identity) -> str:
    """Return the sentence that says how to go on with a sweep."""
    quoted, data = shlex.quote(str(storage)), identity.data
    if objects(identity.describe() | {"data": None if data is None else importing.named(data)}):
        return f"To go on, run this program again (storage {quoted})"
    return f"To go on: gradhpo resume {quoted}"


def space(manifest: Mapping[str, Any]) -> SearchSpace:
    """Return the search space of a manifest."""
    return SearchSpace.parse(manifest["space"])


def compared(manifest: Mapping[str, Any]) -> Objectives:
    """Return what the trials of a manifest are compared by."""
    return Objectives.of(parsed(manifest["metric"]), manifest["mode"])


def digest(manifest: Mapping[str, Any]) -> str:
    """Return what identifies the sweep of a manifest, in a few characters."""
    known = {name: manifest[name] for name in IDENTITY}
    known = {name: x for name, x in known.items() if name not in NEWER or x is not None}
    text = json.dumps(known, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def order(manifest: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the order of a space's names: draws, and combinations' numbers, follow it.

    It is no part of `digest`, nor of what an identity's tables are equal by.
    """
    return {part: list(manifest["space"].get(part, ())) for part in ("hyperparams", "choices")}


def x64() -> bool:
    """Whether JAX computes in 64 bits."""
    return bool(jax.config.jax_enable_x64)  # pyright: ignore


def _identified(given: Any, data: PyTree) -> Any:
    """Return what identifies `data`: its reference, or a checksum of the arrays."""
    if given is None or isinstance(given, str):
        return given and importing.named(given)
    return {"sha256": of_arrays(data)}
