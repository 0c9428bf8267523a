"""A storage becomes a sweep's, or is seen to be: nothing is written over another run."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from gradhpo import checkpoints
from gradhpo.cluster import manifest, programs
from gradhpo.cluster.event_log import EVENTS
from gradhpo.cluster.events import Event, Repaired
from gradhpo.cluster.failures import SweepError
from gradhpo.cluster.incarnations import FILE as INCARNATIONS
from gradhpo.cluster.journal import FILE as JOURNAL
from gradhpo.cluster.journal import Journal
from gradhpo.cluster.manifest import IDENTITY, MANIFEST, STREAMS
from gradhpo.cluster.programs import PROGRAMS
from gradhpo.lock import LOCK

OURS = {MANIFEST, PROGRAMS, EVENTS, INCARNATIONS, JOURNAL, LOCK}
"""Files by which a folder is known as a sweep's, or as one that was about to be."""
ALLOWED = {"data": ("data",), "code": ("problem", "optimizer", "lr_schedule")}
"""What may be named otherwise, by what `allow_changed` has."""


def open_folder(storage: Path) -> None:
    """Make the folder, and see that it can be written and is not of something else.

    Raises:
      OSError: if it cannot, naming it.
      SweepError: if it holds something else.
    """
    try:
        storage.mkdir(parents=True, exist_ok=True)
        probe = storage / f".probe-{os.getpid()}"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise type(error)(
            error.errno, f"storage {str(storage)!r} cannot be written: {error.strerror}"
        ) from None
    if not (storage / MANIFEST).exists() and not begun(storage):
        names = sorted(path.name for path in storage.iterdir())
        if there := [name for name in names if not _is_ours(name)]:
            raise SweepError(
                f"storage {str(storage)!r} is not empty and holds no sweep (it has "
                f"{there[0]!r}): give a folder of its own"
            )


def shards(storage: Path, population: int) -> int | None:
    """Return into how many shards a storage's sweep is divided; None where none is known."""
    try:
        known = manifest.read(storage)
    except SweepError:
        last = Journal(storage).last
        return len(last[-1]["checkpoints"]) if last else None
    return known["shards"] if known["population"] == population else None


def claim(
    storage: Path,
    mine: Mapping[str, Any],
    allowed: Collection[str],
    tell: Callable[[Event], None],
) -> None:
    """Write the manifest, or see that it is this run's; the caller holds the storage's lock.

    Args:
      storage: the sweep's folder.
      mine: this run's manifest.
      allowed: what may have changed, "data" and "code".
      tell: takes events.

    Raises:
      SweepError: if the storage holds another run.
    """
    path = storage / MANIFEST
    for left in unfinished(storage):
        left.unlink(missing_ok=True)
    try:
        theirs = manifest.read(storage)
    except SweepError as damaged:
        if path.exists() or begun(storage):
            _prove(storage, mine, damaged)
            tell(Repaired(f"{damaged}: it is made again"))
        manifest.write(path, mine)
        return
    accepted = {name for what in allowed for name in ALLOWED[what]}
    _compare(storage, mine, theirs, accepted)
    renamed = any(mine[name] != theirs[name] for name in accepted)
    if renamed or mine["generations"] > theirs["generations"]:
        kept = {"programs": theirs["programs"]} if "programs" in theirs else {}
        manifest.write(path, {**mine, **kept})


def unfinished(storage: Path) -> list[Path]:
    """Return the files that a process was writing beside the manifest when it was killed."""
    there = sorted(storage.glob(f"*{checkpoints.UNFINISHED}"))
    return [path for path in there if _is_unfinished(path.name)]


def _compare(
    storage: Path, mine: Mapping[str, Any], theirs: Mapping[str, Any], accepted: Collection[str]
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
    if mine["batching"] in ("auto", theirs["batching"]):
        return
    known = theirs.get("programs") or programs.read(storage) or [theirs]
    if any(entry["batching"] != mine["batching"] for entry in known):
        raise SweepError(
            f"{named} holds another run: its batching is {known[0]['batching']!r}, here "
            f"{mine['batching']!r}"
        )


def _prove(storage: Path, mine: Mapping[str, Any], damaged: SweepError) -> None:
    """Raise unless what is left of a storage says that it is this run's."""
    if not begun(storage):
        return
    entries = programs.read(storage) or [{}]
    if entries[0].get("identity") != manifest.digest(mine):
        raise SweepError(
            f"{damaged}. Only the settings with which the sweep began make it again, and "
            f"{'these are others' if entries[0].get('identity') else 'none are known'}"
        ) from None


def begun(storage: Path) -> bool:
    """Whether workers have compiled for a sweep here."""
    return (storage / JOURNAL).exists() or (storage / PROGRAMS).exists()


def _is_ours(name: str) -> bool:
    return name.startswith(".") or name in OURS or _is_unfinished(name)


def _is_unfinished(name: str) -> bool:
    ending = checkpoints.UNFINISHED
    return name.endswith(ending) and any(name.startswith(f"{file}.") for file in OURS)
