"""Whether a storage is whole: every file that its journal names, and what can be repaired."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from gradhpo import checkpoints
from gradhpo.checkpoints import Saved
from gradhpo.cluster import front, manifest, programs
from gradhpo.cluster.events import Event
from gradhpo.cluster.failures import SweepError
from gradhpo.cluster.journal import Entry, Journal
from gradhpo.cluster.storage import TABLES, Storage
from gradhpo.files import Unreachable, Where, is_address
from gradhpo.lock import StorageInUse


class Finding(NamedTuple):
    """Something about a storage."""

    whole: bool
    """False for damage that is left."""
    text: str


def check_storage(storage: Where) -> Iterator[Finding]:
    """Verify a sweep's files, and repair what can be; nothing is imported.

    Where a driver holds the storage, nothing is repaired. One that gives no sign of life in a store
    is waited for, as on resuming, and then taken over from.

    Raises:
      SweepError: if there is no sweep.
      Unreachable: if a store does not answer.
    """
    if not Storage(storage).begun:
        manifest.read(storage)  # which says so
    files = Storage(storage).files
    if is_address(files.address) and (who := files.holder()) is not None:
        yield Finding(True, f"{storage} is held by {who}: looking for signs of life, a minute long")
    try:
        lock = Storage(storage).lock(lambda text: None)
    except Unreachable:
        raise
    except (StorageInUse, OSError) as error:  # a driver has it, or it cannot be written
        yield Finding(True, f"{error}. Nothing is repaired")
        yield from _verified(storage, Journal(storage))
        return
    try:
        if lock.took_over is not None:
            yield Finding(True, f"taken over from {lock.took_over}, which had not let go")
        yield from _repaired(storage)
    finally:
        lock.release()


def _repaired(storage: Where) -> Iterator[Finding]:
    for left in Storage(storage).clear():
        yield Finding(True, f"{left}: left by a kill, removed")
    journal = Journal(storage)
    yield from _descriptions(storage)
    damaged = _damaged(storage, _newest(journal))
    before = _before(journal, damaged)
    if not damaged or before is None or _damaged(storage, before.needed):
        yield from _verified(storage, journal)
        return
    for text in damaged:
        yield Finding(True, text)
    last, first = journal.generation + 1, before.generation + 2
    which = f"generation {last} is" if first == last else f"generations {first} to {last} are"
    journal.drop_after(before.generation)
    yield Finding(True, f"{which} dropped, and computed again on resuming")
    yield from _verified(storage, journal)


class _Before(NamedTuple):
    """A generation that a sweep can go on from; -1 for its beginning."""

    generation: int
    needed: list[Saved]


def _before(journal: Journal, damaged: list[str]) -> _Before | None:
    """Return what is gone back to where files are damaged that the next generation needs."""
    durable, names = journal.durable, {text.split(" ")[0] for text in damaged}
    if durable and not names & {saved.file for saved in _needed(durable[-1])}:
        return _Before(durable[-1]["generation"], _needed(durable[-1]))
    if len(durable) > 1:
        return _Before(durable[0]["generation"], _needed(durable[0]))
    return _Before(-1, []) if journal.last and journal.last[0]["generation"] == 0 else None


def _descriptions(storage: Where) -> Iterator[Finding]:
    told: list[Event] = []
    try:
        manifest.read(storage)
        programs.recovered(storage, told.append)
    except SweepError as error:
        yield Finding(False, f"{error}. The program that began the sweep may make it again: run it")
    for event in told:
        yield Finding(True, str(event.line()))


def _verified(storage: Where, journal: Journal) -> Iterator[Finding]:
    entries, good = list(journal.entries()), 0
    for what in journal.damaged:
        yield Finding(True, what)
    newest = {saved.file for saved in _newest(journal)}
    older = [s for entry in journal.durable[:-1] for s in entry["checkpoints"]]
    kept = {file: _whose(file, entries[-1]) for file in _kept(entries)}
    saved = {s.file: s for s in (*_newest(journal), *older, *(e["table"] for e in entries))}
    saved |= _kept(entries)
    for file, one in saved.items():
        if not (found := _damaged(storage, [one])):
            good += 1
        elif file in newest:
            yield Finding(False, f"{found[0]}. Neither this generation nor the one before is whole")
        elif file in kept:
            yield Finding(False, f"{found[0]}. {kept[file]} computes them again")
        elif file.startswith(f"{TABLES}/"):
            yield Finding(False, f"{found[0]}. The numbers of its generation; the sweep goes on")
        else:  # where one was dropped, that of before is long removed
            gone = not Storage(storage).has(one)
            yield Finding(gone, f"{found[0]}. Only needed should the last generation be damaged")
    yield Finding(True, f"{storage}: {len(entries)} generations, {good} files are whole")


def _kept(entries: list[Entry]) -> dict[str, Saved]:
    """Return by name the files of the best trial, or of those of a front."""
    return {found.checkpoint.file: found.checkpoint for found in front.of_journal(entries)}


def _whose(file: str, entry: Entry) -> str:
    """Say whose weights a file has that is kept, and how they are had again."""
    if "front" not in entry:
        return "The winner's weights: replay()"
    trials = {str(found.trial) for found in front.found_in(entry) if found.checkpoint.file == file}
    return f"The front's weights of trial {' and '.join(sorted(trials, key=int))}: replay(trial)"


def _newest(journal: Journal) -> list[Saved]:
    """Return what the next generation starts from: the last checkpoints, and the tables after."""
    durable = journal.durable[-1:]
    first = durable[0]["generation"] if durable else -1
    later = [entry for entry in journal.last if entry["generation"] > first]
    return [saved for entry in (*durable, *later) for saved in _needed(entry)]


def _needed(entry: Entry) -> list[Saved]:
    return [*entry["checkpoints"], entry["table"]]


def _damaged(storage: Where, files: list[Saved]) -> list[str]:
    """Return what is wrong with those that are not whole."""
    wrong: list[str] = []
    for saved in files:
        try:
            right = checkpoints.checksum(storage, saved.file) == saved.sha256
            reason = _of_parts(storage, saved) if right else "was cut short or changed"
        except Unreachable:
            raise
        except OSError as error:
            reason = f"cannot be read ({error.strerror})"
        if reason is not None:
            wrong.append(f"{saved.file} {reason}")
    return wrong


def _of_parts(storage: Where, saved: Saved) -> str | None:
    """Return what is wrong with the parts that a file stands for; None where nothing is."""
    for name in Storage(storage).parts_of(saved):
        try:
            digest = checkpoints.checksum(storage, name)
        except Unreachable:
            raise
        except OSError as error:
            return f"lacks its part {name}: cannot be read ({error.strerror})"
        if not checkpoints.is_named(name, digest):
            return f"lacks its part {name}: was cut short or changed"
    return None
