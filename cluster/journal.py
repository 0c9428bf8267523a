"""The journal: one line for each generation that is done.

A line is the beginning of its SHA-256, a space, and JSON. It is written after the files that it
names, in one write, and fsync'd; a generation is done when its line is whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NotRequired, TypedDict

from gradhpo.checkpoints import Saved
from gradhpo.cluster.storage import Storage
from gradhpo.commit import commit, sync_folder


class Best(TypedDict):
    """The best trial at the end of any generation so far."""

    score: float
    trial: int
    slot: int
    generation: int
    checkpoint: Saved


class Entry(TypedDict):
    """A line of the journal."""

    generation: int
    table: Saved
    """The gathered table, with the decision that was made from it."""
    checkpoints: list[Saved]
    """One for each shard; none where the generation was not to be written (`checkpoint_every`)."""
    best: Best | None
    """None where every trial has diverged."""
    seconds: float
    changes: NotRequired[list[str]]
    """What was allowed to be other than in the generation before: "data", "code"."""
    stopped: NotRequired[str]
    """Why the run ended here, before the sweep's end."""


class Journal:
    """The lines of a storage's journal: the last ones in memory, all of them on disk.

    `damaged` tells what was found when it was opened: a last line cut short is dropped, and a
    line inside is replaced by what its table's own name proves.
    """

    def __init__(self, storage: Path) -> None:
        self.path = Storage(storage).journal
        self.damaged: list[str] = []
        self.last: list[Entry] = []
        """The last entries, from the last but one that has checkpoints on."""
        for number, (entry, line) in enumerate(_read(self.path)):
            if entry is None:
                which = f"{self.path.name}: line {number + 1}"
                self.damaged.append(f"{which} is damaged ({len(line)} bytes), and not used")
            else:
                self.last = _recent([*self.last, entry])

    @property
    def durable(self) -> list[Entry]:
        """Those of the last entries that have checkpoints: two, or fewer at the beginning."""
        return [entry for entry in self.last if entry["checkpoints"]]

    @property
    def generation(self) -> int:
        """The last generation that is done; -1 before the first."""
        return self.last[-1]["generation"] if self.last else -1

    def append(self, entry: Entry) -> None:
        """Add a line; when this returns it will survive a crash.

        Raises:
          OSError: if it cannot be written; a part of a line is then taken back.
        """
        new = not self.path.exists()
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            line = encode(entry)
            if size and not _ends_with_newline(self.path):
                line = b"\n" + line  # after a line that was cut short
            try:
                written = os.write(descriptor, line)
                if written != len(line):
                    raise OSError(28, f"only {written} of {len(line)} bytes written")
                os.fsync(descriptor)
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(descriptor, size)
                raise
        finally:
            os.close(descriptor)
        if new:
            sync_folder(self.path.parent)
        self.last = _recent([*self.last, entry])

    def drop_after(self, generation: int) -> None:
        """Forget the generations after this one, which are computed again."""
        whole = [(entry, line) for entry, line in _read(self.path) if entry is not None]
        kept = [line for entry, line in whole if entry["generation"] <= generation]

        def content(file: BinaryIO) -> None:
            file.writelines(line + b"\n" for line in kept)

        commit(self.path, content)
        self.last = _recent([entry for entry, _ in whole if entry["generation"] <= generation])

    def entries(self) -> Iterator[Entry]:
        """Read all undamaged lines, from the first."""
        return (entry for entry, _ in _read(self.path) if entry is not None)


def _recent(entries: list[Entry]) -> list[Entry]:
    durable = [index for index, entry in enumerate(entries) if entry["checkpoints"]]
    return entries[durable[-2] :] if len(durable) > 1 else entries


def encode(entry: Entry) -> bytes:
    """Return the line of an entry."""
    text = json.dumps(entry, separators=(",", ":")).encode()
    return hashlib.sha256(text).hexdigest()[:16].encode() + b" " + text + b"\n"


def _read(path: Path) -> Iterator[tuple[Entry | None, bytes]]:
    """Read the lines, each with its entry; None for a damaged one."""
    if not path.exists():
        return
    with open(path, "rb") as file:
        for raw in file:
            line = raw.rstrip(b"\n")
            if line:
                yield _decode(line), line


def _decode(line: bytes) -> Entry | None:
    digest, _, text = line.partition(b" ")
    if hashlib.sha256(text).hexdigest()[:16].encode() != digest:
        return None
    entry: Any = json.loads(text)
    entry["table"] = Saved(*entry["table"])
    entry["checkpoints"] = [Saved(*saved) for saved in entry["checkpoints"]]
    if entry["best"] is not None:
        entry["best"]["checkpoint"] = Saved(*entry["best"]["checkpoint"])
    return entry


def _ends_with_newline(path: Path) -> bool:
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
