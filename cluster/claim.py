"""A storage becomes a sweep's, or is seen to be: nothing is written over another run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

from gradhpo.cluster import manifest, programs
from gradhpo.cluster.events import Event, Repaired
from gradhpo.cluster.failures import SweepError
from gradhpo.cluster.journal import Journal
from gradhpo.cluster.manifest import IDENTITY, STREAMS
from gradhpo.cluster.points import Taken, source_of
from gradhpo.cluster.storage import Storage
from gradhpo.files import Where

ALLOWED = {
    "data": ("data",),
    "code": ("problem", "optimizer", "lr_schedule", "validation"),
    "mesh": ("mesh", "rules"),
}
"""What may be named otherwise, by what `allow_changed` has."""


def open_folder(storage: Where) -> None:
    """Make the folder, and see that it can be written and is not of something else.

    Raises:
      OSError: if it cannot, naming it.
      SweepError: if it holds something else.
    """
    files = Storage(storage)
    try:
        files.probe()
    except OSError as error:
        raise type(error)(
            error.errno, f"storage {str(storage)!r} cannot be written: {error.strerror}"
        ) from None
    if there := files.strangers():
        raise SweepError(
            f"storage {str(storage)!r} is not empty and holds no sweep (it has "
            f"{there[0]!r}): give a folder of its own"
        )


def shards(storage: Where, population: int) -> int | None:
    """Return into how many shards a storage's sweep is divided; None where none is known."""
    try:
        known = manifest.read(storage)
    except SweepError:
        durable = Journal(storage).durable
        return len(durable[-1]["checkpoints"]) if durable else None
    return known["shards"] if known["population"] == population else None


def begun_with(storage: Where, asked: Any) -> Taken | None:
    """Return the points that a storage's sweep found where others were found now.

    What was found then counts, whatever the source has found since. None where it began otherwise,
    or has not begun.
    """
    if (source := source_of(asked)) is None:
        return None
    with contextlib.suppress(SweepError):
        known = manifest.read(storage)
        return Taken(known["points"], source) if known["points_from"] == source else None
    return None


def check_allowed(given: Collection[str]) -> None:
    """Raise unless `allow_changed` names what may change."""
    if isinstance(given, str) or not set(given) <= set(ALLOWED):
        accepted = f"a tuple of names, of {tuple(ALLOWED)}"
        raise ValueError(f"allow_changed must be {accepted}, got {given!r}")


def claim(
    storage: Where,
    mine: Mapping[str, Any],
    allowed: Collection[str],
    tell: Callable[[Event], None],
) -> set[str]:
    """Write the manifest, or see that it is this run's; the caller holds the storage's lock.

    What may have changed is not written yet: workers have still to see what the program computes.

    Args:
      storage: the sweep's folder.
      mine: this run's manifest.
      allowed: what may have changed, of `ALLOWED`.
      tell: takes events.

    Returns:
      What of `allowed` has changed by its name, or by the checksum of `data`.

    Raises:
      SweepError: if the storage holds another run that has begun.
    """
    files = Storage(storage)
    files.clear()
    try:
        theirs = manifest.read(storage)
    except SweepError as damaged:
        if files.manifest.exists() or files.begun:
            _prove(storage, mine, damaged)
            tell(Repaired(f"{damaged}: it is made again"))
        manifest.write(files.manifest, mine)
        return set()
    if not files.begun:  # nothing was computed with those settings: they were tried, and refused
        manifest.write(files.manifest, mine)
        return set()
    accepted = {name for what in allowed for name in ALLOWED[what]}
    _compare(storage, mine, theirs, accepted)
    return {what for what in allowed if any(mine[name] != theirs[name] for name in ALLOWED[what])}


def _compare(
    storage: Where, mine: Mapping[str, Any], theirs: Mapping[str, Any], accepted: Collection[str]
) -> None:
    named = f"storage {str(storage)!r}"
    if theirs["streams"] != STREAMS:
        raise SweepError(
            f"{named} was begun by gradhpo {theirs.get('gradhpo')}, whose trials drew their "
            "batches otherwise: its result can be read here; to go on, use the gradhpo that began "
            "it"
        )
    for name in IDENTITY:
        if mine[name] != theirs[name] and name not in accepted:
            raise SweepError(
                f"{named} holds another run: its {name} is {theirs[name]!r}, here "
                f"{mine[name]!r}. Give another storage, or the same settings to go on"
            )
    _compare_order(named, mine, manifest.order(theirs))
    if mine["batching"] in ("auto", theirs["batching"]):
        return
    known = theirs.get("programs") or programs.read(storage) or [theirs]
    if any(entry["batching"] != mine["batching"] for entry in known):
        raise SweepError(
            f"{named} holds another run: its batching is {known[0]['batching']!r}, here "
            f"{mine['batching']!r}"
        )


def _compare_order(named: str, mine: Mapping[str, Any], order: Mapping[str, Any]) -> None:
    for part, names in manifest.order(mine).items():
        if names != order[part]:
            raise SweepError(
                f"{named} holds another run: its space.{part} are in the order "
                f"{', '.join(order[part])}, here in {', '.join(names)}, and trials are drawn in "
                "that order. Give them in the order in which the sweep began"
            )


def _prove(storage: Where, mine: Mapping[str, Any], damaged: SweepError) -> None:
    """Raise unless what is left of a storage says that it is this run's."""
    if not Storage(storage).begun:
        return
    entries = programs.read(storage) or [{}]
    if entries[0].get("identity") != manifest.digest(mine):
        raise SweepError(
            f"{damaged}. Only the settings with which the sweep began make it again, and "
            f"{'these are others' if entries[0].get('identity') else 'none are known'}"
        ) from None
    _compare_order(f"storage {str(storage)!r}", mine, entries[0].get("order", manifest.order(mine)))
