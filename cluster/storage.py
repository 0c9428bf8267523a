"""A sweep's storage: the one keeper of what lasts, which alone knows the names of its files.

Nothing that lasts is written but by `Files`: in a folder by `gradhpo.commit`, in an object store
as `gradhpo.bucket` says.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gradhpo import checkpoints, parts, stop_request
from gradhpo.checkpoints import DamagedFile, Saved
from gradhpo.commit import UNFINISHED
from gradhpo.files import Files, Held, Where, files_of, is_address
from gradhpo.lock import ALIVE, LOCK, StorageInUse
from gradhpo.parallel import layout_cache
from gradhpo.parts import Divided
from gradhpo.saved_diagnosis import DIAGNOSIS
from gradhpo.stop_request import STOP

CHECKPOINTS, TABLES = "checkpoints", "tables"
LOGS = "logs"
PROBE = ".probe-"
"""How the file begins by which is seen that the folder can be written."""


class Text(NamedTuple):
    """A text that changes."""

    files: Files
    name: str

    def __str__(self) -> str:
        """Return where it is."""
        return f"{self.files.address}/{self.name}"

    def exists(self) -> bool:
        """Whether it was ever written."""
        return self.files.has(self.name)

    def read_bytes(self) -> bytes:
        """Return it; `FileNotFoundError` if there is none."""
        return self.files.read(self.name)

    def since(self, start: int) -> bytes:
        """Return it from this byte on; `FileNotFoundError` if there is none."""
        return self.files.since(self.name, start)

    def read_text(self, errors: str = "strict") -> str:
        """Return it; `FileNotFoundError` if there is none."""
        return self.read_bytes().decode(errors=errors)

    def write_json(self, content: Any) -> None:
        """Replace it, whole or not at all."""
        checkpoints.write_json(self.files, self.name, content)


class Storage:
    """The files of a sweep.

    Args:
      where: the folder, seen by all of the sweep's processes under this name, or the address of an
        object store.
    """

    def __init__(self, where: Where) -> None:
        self.files = files_of(where)
        self.manifest = Text(self.files, "manifest.json")
        """What the sweep is."""
        self.programs = Text(self.files, "programs.json")
        """How its programs are laid out."""
        self.events = Text(self.files, "events.jsonl")
        """What happened, for people; nothing depends on it."""
        self.journal = Text(self.files, "journal.jsonl")
        """What is done."""
        self.incarnations = Text(self.files, "incarnations.json")
        """Which worker owns which shard."""
        self._texts = [
            text.name
            for text in (
                self.manifest,
                self.programs,
                self.events,
                self.journal,
                self.incarnations,
            )
        ]

    def __str__(self) -> str:
        """Return where it is."""
        return self.files.address

    @property
    def logs(self) -> Path:
        """The folder of what workers print; an object store's is each worker's own machine."""
        if not is_address(self.files.address):
            return Path(self.files.address) / LOGS
        which = hashlib.sha256(self.files.address.encode()).hexdigest()[:16]
        return (layout_cache.folder() or Path(tempfile.gettempdir()) / "gradhpo") / LOGS / which

    def lock(self, tell: Callable[[str], None] | None = None) -> Held:
        """Take the lock that one driver at a time has; see `Files.lock`.

        Raises:
          StorageInUse: if another one has it.
        """
        return self.files.lock("storage", "sweep", self._texts, tell)

    # --- arrays ---------------------------------------------------------------------------------

    def save_checkpoint(
        self,
        generation: int,
        shard: int,
        incarnation: int,
        arrays: Mapping[str, np.ndarray] | Divided,
        about: Mapping[str, Any],
    ) -> Saved:
        """Write a shard's state after a generation; it survives a crash when this returns.

        Of one that several processes hold each writes its parts; what the first one returns stands
        for all.
        """
        stem = f"{CHECKPOINTS}/{generation:06d}/shard-{shard:04d}-i{incarnation}"
        about = {"shard": shard, "generation": generation, **about}
        return self._save(stem, arrays, about)

    def save_winner(
        self,
        generation: int,
        shard: int,
        incarnation: int,
        arrays: Mapping[str, np.ndarray] | Divided,
        slots: Sequence[int],
    ) -> Saved:
        """Write the states of the trials that are kept, apart from the shard's others."""
        stem = f"{CHECKPOINTS}/{generation:06d}/winner-{shard:04d}-i{incarnation}"
        about = {"alone": True} | ({"slots": list(slots)} if len(slots) > 1 else {})
        return self._save(stem, arrays, about)

    def save_table(self, generation: int, columns: Mapping[str, np.ndarray]) -> Saved:
        """Write a generation's table, with the decision that was made from it.

        Raises:
          StorageInUse: if another driver has taken the storage over.
        """
        self.files.check_held()
        stem = f"{TABLES}/{generation:06d}"
        return checkpoints.save(self.files, stem, columns, {"generation": generation})

    def load(self, saved: Saved) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Return the arrays of a file that was saved here, and what was remembered with them.

        Those that were written in parts are whole.

        Raises:
          DamagedFile: if it, or a part, is missing, cut short or changed.
        """
        arrays, about = checkpoints.load(self.files, saved)
        if parts.PARTS not in about:
            return arrays, about
        del arrays
        boxes, about = parts.gather(self.files, saved, parts.whole)
        return {name: array for name, one in boxes.items() for array in one.values()}, about

    def load_slot(self, saved: Saved, slot: int) -> dict[str, np.ndarray]:
        """Return one slot's arrays from a checkpoint, or from some that were written apart.

        Raises:
          DamagedFile: if it, or a part, is missing, cut short or changed.
        """

        def row(
            name: str, shape: tuple[int, ...], dtype: np.dtype[Any], about: Mapping[str, Any]
        ) -> list[parts.Box]:
            slots = about.get("slots", [slot])  # one alone is all that there is
            first = slots.index(slot) if about.get("alone") else slot
            return [((first, first + 1), *parts.whole(name, shape[1:], dtype)[0])]

        boxes, _ = parts.gather(self.files, saved, row)
        return {name: array[0] for name, one in boxes.items() for array in one.values()}

    def parts_of(self, saved: Saved) -> list[str]:
        """Return the other files that a checkpoint has, of its worker's other processes.

        Raises:
          DamagedFile: if it is missing, cut short or changed.
        """
        return parts.others_of(self.files, saved)

    def _save(
        self, stem: str, arrays: Mapping[str, np.ndarray] | Divided, about: Mapping[str, Any]
    ) -> Saved:
        if isinstance(arrays, Divided):
            return arrays.save(self.files, stem, about)
        return checkpoints.save(self.files, stem, arrays, about)

    def load_table(self, generation: int, saved: Saved | None = None) -> dict[str, np.ndarray]:
        """Return a generation's table; without its line in the journal, by what its name proves.

        Raises:
          DamagedFile: if it is missing, cut short or changed.
        """
        stem = f"{TABLES}/{generation:06d}"
        found = saved or checkpoints.find(self.files, stem)
        if found is None:
            raise DamagedFile(stem, "is missing, and its line is damaged")
        return self.load(found)[0]

    def has(self, saved: Saved) -> bool:
        """Whether a file is there, whatever is in it."""
        return self.files.exists(saved.file)

    def prune(self, oldest: int, keep: set[str]) -> None:
        """Remove the checkpoints of generations before `oldest`, but for the files in `keep`.

        Parts stay with the file that stands for them.

        No link is followed: what lies outside of the storage is not the sweep's to remove.
        """
        stems = {parts.stem_of(name) for name in keep}
        for number in self.files.folders(CHECKPOINTS):
            if number.isdecimal() and int(number) < oldest:
                folder = f"{CHECKPOINTS}/{number}"
                names = [f"{folder}/{name}" for name in self.files.names(folder)]
                kept = keep | {name for name in names if parts.is_of(name, stems)}
                self.files.remove([name for name in names if name not in kept], folder)

    # --- descriptions ---------------------------------------------------------------------------

    @property
    def begun(self) -> bool:
        """Whether workers have compiled for a sweep here."""
        return self.journal.exists() or self.programs.exists()

    def strangers(self) -> list[str]:
        """Return the names of what is there and no sweep's, where no file of one says otherwise."""
        if self.manifest.exists() or self.begun:
            return []
        names = [*self.files.names(), *self.files.folders()]
        return [name for name in sorted(names) if not self._is_ours(name)]

    def probe(self) -> None:
        """Make the folder, and write to it.

        Raises:
          OSError: if that cannot be done.
        """
        self.files.probe(f"{PROBE}{os.getpid()}")

    def clear(self) -> list[str]:
        """Remove what a driver that was killed had not finished; for one that has the lock.

        Returns:
          Which files.
        """
        top = [name for name in self.files.names() if self._is_ours(name)]
        left = [name for name in top if name.endswith(UNFINISHED) or name.startswith(PROBE)]
        folders = [f"{CHECKPOINTS}/{number}" for number in self.files.folders(CHECKPOINTS)]
        for folder in (TABLES, *folders):
            names = self.files.names(folder)
            left += [f"{folder}/{name}" for name in names if name.endswith(UNFINISHED)]
        self.files.remove(left)
        return sorted(left)

    def ask_to_stop(self, who: str) -> None:
        """Ask the driver to end after the generation in flight.

        Raises:
          OSError: if that cannot be written.
        """
        stop_request.ask(self.files, who)

    def stop_request(self) -> str | None:
        """Return who asked the driver to end; None where nobody did.

        Raises:
          OSError: if that cannot be read, or a store does not answer.
        """
        return stop_request.asked(self.files)

    def forget_stop(self) -> None:
        """Remove the request."""
        stop_request.forget(self.files)

    def log(self, facts: Mapping[str, Any]) -> None:
        """Add a line to the events; what cannot be written is left out."""
        line = json.dumps(facts, default=str).encode() + b"\n"
        with contextlib.suppress(OSError, StorageInUse):
            self.files.append(self.events.name, line, lasting=False)

    def _is_ours(self, name: str) -> bool:
        """Whether a file can be there before the manifest is."""
        texts = (*self._texts, STOP, DIAGNOSIS)
        begun = name.endswith(UNFINISHED) and any(name.startswith(f"{n}.") for n in texts)
        return begun or name.startswith(".") or name in (*self._texts, LOCK, ALIVE, LOGS, DIAGNOSIS)
