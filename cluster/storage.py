"""A sweep's storage: the one keeper of what lasts, which alone knows the names of its files.

Nothing that lasts is written but by `gradhpo.commit` and `Journal.append`. A storage without
renames would be another class with these methods and another `commit`.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from gradhpo import checkpoints
from gradhpo.checkpoints import DamagedFile, Saved
from gradhpo.commit import UNFINISHED, commit
from gradhpo.lock import LOCK

CHECKPOINTS, TABLES = "checkpoints", "tables"
PROBE = ".probe-"
"""How the file begins by which is seen that the folder can be written."""


class Storage:
    """The files of a sweep.

    Args:
      path: the folder, seen by all of the sweep's processes under this name.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.manifest = self.path / "manifest.json"
        """What the sweep is."""
        self.programs = self.path / "programs.json"
        """How its programs are laid out."""
        self.events = self.path / "events.jsonl"
        """What happened, for people; nothing depends on it."""
        self.journal = self.path / "journal.jsonl"
        """What is done."""
        self.incarnations = self.path / "incarnations.json"
        """Which worker owns which shard."""
        self.stop = self.path / "stop.txt"
        """That the driver is asked to end, and by whom."""
        self.logs = self.path / "logs"
        """What workers print."""

    # --- arrays ---------------------------------------------------------------------------------

    def save_checkpoint(
        self,
        generation: int,
        shard: int,
        incarnation: int,
        arrays: Mapping[str, np.ndarray],
        about: Mapping[str, Any],
    ) -> Saved:
        """Write a shard's state after a generation; it survives a crash when this returns."""
        stem = f"{CHECKPOINTS}/{generation:06d}/shard-{shard:04d}-i{incarnation}"
        about = {"shard": shard, "generation": generation, **about}
        return checkpoints.save(self.path, stem, arrays, about)

    def save_winner(
        self, generation: int, shard: int, incarnation: int, arrays: Mapping[str, np.ndarray]
    ) -> Saved:
        """Write the best trial's state alone, after a generation without checkpoints."""
        stem = f"{CHECKPOINTS}/{generation:06d}/winner-{shard:04d}-i{incarnation}"
        return checkpoints.save(self.path, stem, arrays, {"alone": True})

    def save_table(self, generation: int, columns: Mapping[str, np.ndarray]) -> Saved:
        """Write a generation's table, with the decision that was made from it."""
        stem = f"{TABLES}/{generation:06d}"
        return checkpoints.save(self.path, stem, columns, {"generation": generation})

    def load(self, saved: Saved) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Return the arrays of a file that was saved here, and what was remembered with them.

        Raises:
          DamagedFile: if it is missing, cut short or changed.
        """
        return checkpoints.load(self.path, saved)

    def load_table(self, generation: int, saved: Saved | None = None) -> dict[str, np.ndarray]:
        """Return a generation's table; without its line in the journal, by what its name proves.

        Raises:
          DamagedFile: if it is missing, cut short or changed.
        """
        stem = f"{TABLES}/{generation:06d}"
        found = saved or checkpoints.find(self.path, stem)
        if found is None:
            raise DamagedFile(stem, "is missing, and its line is damaged")
        return self.load(found)[0]

    def has(self, saved: Saved) -> bool:
        """Whether a file is there, whatever is in it."""
        return (self.path / saved.file).exists()

    def prune(self, oldest: int, keep: set[str]) -> None:
        """Remove the checkpoints of generations before `oldest`, but for the files in `keep`.

        No link is followed: what lies outside of the storage is not the sweep's to remove.
        """
        root = self.path / CHECKPOINTS
        if root.is_symlink() or not root.is_dir():
            return
        for folder in sorted(os.scandir(root), key=lambda entry: entry.name):
            old = folder.name.isdecimal() and int(folder.name) < oldest
            if old and folder.is_dir(follow_symlinks=False):
                for file in os.scandir(folder.path):
                    name = f"{CHECKPOINTS}/{folder.name}/{file.name}"
                    if name not in keep and not file.is_dir(follow_symlinks=False):
                        Path(file.path).unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # the best trial's is still there
                    os.rmdir(folder.path)

    # --- descriptions ---------------------------------------------------------------------------

    @property
    def begun(self) -> bool:
        """Whether workers have compiled for a sweep here."""
        return self.journal.exists() or self.programs.exists()

    def strangers(self) -> list[str]:
        """Return the names of what is there and no sweep's, where no file of one says otherwise."""
        if self.manifest.exists() or self.begun:
            return []
        names = [path.name for path in self.path.iterdir()]
        return [name for name in sorted(names) if not self._is_ours(name)]

    def probe(self) -> None:
        """Make the folder, and write to it.

        Raises:
          OSError: if that cannot be done.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        probe = self.path / f"{PROBE}{os.getpid()}"
        probe.write_text("")
        probe.unlink(missing_ok=True)

    def clear(self) -> list[str]:
        """Remove what a driver that was killed had not finished; for one that has the lock.

        Returns:
          Which files.
        """
        there = [*self.path.glob(f"*{UNFINISHED}"), *self.path.glob(f"{PROBE}*")]
        unfinished = [path for path in there if self._is_ours(path.name)]
        if not (tables := self.path / TABLES).is_symlink():
            unfinished += tables.glob(f"*{UNFINISHED}")
        if not (root := self.path / CHECKPOINTS).is_symlink():
            folders = [folder for folder in root.glob("*") if not folder.is_symlink()]
            unfinished += [file for folder in folders for file in folder.glob(f"*{UNFINISHED}")]
        for path in unfinished:
            path.unlink(missing_ok=True)
        return sorted(str(path.relative_to(self.path)) for path in unfinished)

    def ask_to_stop(self, who: str) -> None:
        """Ask the driver to end after the generation in flight.

        Raises:
          OSError: if that cannot be written.
        """

        def content(file: BinaryIO) -> None:
            file.write(who.encode())

        commit(self.stop, content)

    def stop_request(self) -> str | None:
        """Return who asked the driver to end; None where nobody did."""
        try:
            return self.stop.read_text(errors="replace") or "a file stop.txt"
        except OSError:
            return None

    def forget_stop(self) -> None:
        """Remove the request."""
        with contextlib.suppress(OSError):
            self.stop.unlink()

    def log(self, facts: Mapping[str, Any]) -> None:
        """Add a line to the events; what cannot be written is left out."""
        line = json.dumps(facts, default=str).encode() + b"\n"
        with contextlib.suppress(OSError), open(self.events, "a+b") as file:
            size = file.seek(0, os.SEEK_END)
            if size:
                file.seek(-1, os.SEEK_END)
            cut = size > 0 and file.read(1) != b"\n"  # a line that was cut short
            file.write(b"\n" + line if cut else line)

    def _is_ours(self, name: str) -> bool:
        """Whether a file can be there before the manifest is."""
        files = (self.manifest, self.programs, self.events, self.journal, self.incarnations)
        names = [path.name for path in files]
        begun = name.endswith(UNFINISHED) and any(name.startswith(f"{n}.") for n in names)
        return begun or name.startswith(".") or name in (*names, LOCK, self.logs.name)
