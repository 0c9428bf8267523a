"""The journal: one line for each generation that is done.

A line is the beginning of its SHA-256, a space, and JSON. It is written after the files that it
names, in one write, and fsync'd; a generation is done when its line is whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any, NotRequired, TypedDict

from gradhpo.checkpoints import Saved
from gradhpo.cluster.storage import Storage, Text
from gradhpo.files import Where


class Best(TypedDict):
    """The best trial at the end of any generation so far."""

    score: float
    trial: int
    slot: int
    generation: int
    checkpoint: Saved


class Member(TypedDict):
    """A trial of the front, as it was after a generation."""

    scores: list[float]
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
    """None where every trial has diverged, and where there are several objectives."""
    front: NotRequired[list[Member]]
    """Of several objectives: the trials that no other dominates."""
    seconds: float
    changes: NotRequired[list[str]]
    """What was allowed to be other than in the generation before: "data", "code"."""
    ended: NotRequired[list[dict[str, Any]]]
    """The combinations of choices that ended after it, as `race.Ended`."""
    stopped: NotRequired[str]
    """Why the run ended here, before the sweep's end."""


class Journal:
    """The lines of a storage's journal: the last ones in memory, all of them on disk.

    `damaged` tells what was found when it was opened: a last line cut short is dropped, and a
    line inside is replaced by what its table's own name proves.
    """

    def __init__(self, storage: Where) -> None:
        self._text = Storage(storage).journal
        self.damaged: list[str] = []
        self.last: list[Entry] = []
        """The last entries, from the last but one that has checkpoints on."""
        expected = 0  # at most: a damaged line may be of a generation
        for number, (entry, line) in enumerate(_read(self._text)):
            which = f"{self._text.name}: line {number + 1}"
            if entry is None:
                self.damaged.append(f"{which} is damaged ({len(line)} bytes), and not used")
                expected += 1
            else:
                if entry["generation"] > expected:
                    self.damaged.append(f"{which}: the generations before it are missing")
                expected = entry["generation"] + 1
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
          StorageInUse: if another driver has taken the storage over.
        """
        self._text.files.append(self._text.name, encode(entry))
        self.last = _recent([*self.last, entry])

    def drop_after(self, generation: int) -> None:
        """Forget the generations after this one, which are computed again."""
        whole = [(entry, line) for entry, line in _read(self._text) if entry is not None]
        kept = [line for entry, line in whole if entry["generation"] <= generation]
        self._text.files.replace(self._text.name, b"".join(line + b"\n" for line in kept))
        self.last = _recent([entry for entry, _ in whole if entry["generation"] <= generation])

    def entries(self) -> Iterator[Entry]:
        """Read all undamaged lines, from the first."""
        return (entry for entry, _ in _read(self._text) if entry is not None)


def _recent(entries: list[Entry]) -> list[Entry]:
    durable = [index for index, entry in enumerate(entries) if entry["checkpoints"]]
    return entries[durable[-2] :] if len(durable) > 1 else entries


def encode(entry: Entry) -> bytes:
    """Return the line of an entry."""
    text = json.dumps(entry, separators=(",", ":")).encode()
    return hashlib.sha256(text).hexdigest()[:16].encode() + b" " + text + b"\n"


def _read(text: Text) -> Iterator[tuple[Entry | None, bytes]]:
    """Read the lines, each with its entry, None for a damaged one; of a generation's the last."""
    try:
        lines = [line for line in text.read_bytes().split(b"\n") if line]
    except FileNotFoundError:
        return
    entries = [decode(line) for line in lines]
    last = {entry["generation"]: index for index, entry in enumerate(entries) if entry}
    for index, (entry, line) in enumerate(zip(entries, lines, strict=True)):
        if entry is None or last[entry["generation"]] == index:
            yield entry, line


def decode(line: bytes) -> Entry | None:
    """Return the entry of a line, without its end; None if it is damaged."""
    digest, _, text = line.partition(b" ")
    if hashlib.sha256(text).hexdigest()[:16].encode() != digest:
        return None
    entry: Any = json.loads(text)
    entry["table"] = Saved(*entry["table"])
    entry["checkpoints"] = [Saved(*saved) for saved in entry["checkpoints"]]
    if entry["best"] is not None:
        entry["best"]["checkpoint"] = Saved(*entry["best"]["checkpoint"])
    for member in entry.get("front", ()):
        member["checkpoint"] = Saved(*member["checkpoint"])
    return entry
