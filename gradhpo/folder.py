"""Files in a folder of this machine, or in one that is mounted here."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import BinaryIO

from gradhpo.commit import commit, sync_folder
from gradhpo.files import Files, Opened
from gradhpo.lock import FolderLock, holder


class Folder(Files):
    """See `Files`; what lasts is written by `gradhpo.commit`.

    Args:
      path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.address = path, str(path)

    def write(self, name: str, content: Callable[[BinaryIO], str | None]) -> str:
        """Write beside its place, and rename."""
        return str(commit(self.path / name, content).relative_to(self.path))

    def open(self, name: str) -> Opened:
        """Open it."""
        return open(self.path / name, "rb")

    def whole(self, name: str) -> bytes:
        """Read it."""
        return (self.path / name).read_bytes()

    def exists(self, name: str) -> bool:
        """Look."""
        return (self.path / name).exists()

    def names(self, folder: str = "") -> list[str]:
        """List what is no folder, links too."""
        return [e.name for e in self._entries(folder) if not e.is_dir(follow_symlinks=False)]

    def folders(self, folder: str = "") -> list[str]:
        """List folders, and no links to such."""
        return [e.name for e in self._entries(folder) if e.is_dir(follow_symlinks=False)]

    def remove(self, names: Collection[str], folder: str | None = None) -> None:
        """Remove links themselves, and nothing behind one."""
        for name in names:
            if not self._behind_link(name):
                (self.path / name).unlink(missing_ok=True)
        if folder is not None and not self._behind_link(folder):
            with contextlib.suppress(OSError):  # something is left in it
                os.rmdir(self.path / folder)

    def read(self, name: str) -> bytes:
        """Read it."""
        return (self.path / name).read_bytes()

    def since(self, name: str, start: int) -> bytes:
        """Read what is behind, and nothing before it."""
        with open(self.path / name, "rb") as file:
            file.seek(start)
            return file.read()

    def has(self, name: str) -> bool:
        """Look."""
        return (self.path / name).exists()

    def replace(self, name: str, text: bytes) -> None:
        """Write beside its place, and rename."""

        def content(file: BinaryIO) -> None:
            file.write(text)

        commit(self.path / name, content)

    def append(self, name: str, line: bytes, lasting: bool = True) -> None:
        """Write in one write; a part of a line is taken back."""
        path = self.path / name
        new = not path.exists()
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            if size and not _ends_with_newline(path):
                line = b"\n" + line
            try:
                written = os.write(descriptor, line)
                if written != len(line):
                    raise OSError(28, f"only {written} of {len(line)} bytes written")
                if lasting:
                    os.fsync(descriptor)
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(descriptor, size)
                raise
        finally:
            os.close(descriptor)
        if new and lasting:
            sync_folder(path.parent)

    def probe(self, name: str) -> None:
        """Make the folder, and write to it."""
        self.path.mkdir(parents=True, exist_ok=True)
        probe = self.path / name
        probe.write_text("")
        probe.unlink(missing_ok=True)

    def lock(
        self,
        argument: str,
        user: str,
        texts: Collection[str],
        tell: Callable[[str], None] | None = None,
    ) -> FolderLock:
        """Take the operating system's lock, which ends with its process: nothing is waited for."""
        del texts, tell
        return FolderLock(self.path, argument, user)

    def check_held(self) -> None:
        """Nobody can take it over."""

    def holder(self) -> str | None:
        """Ask the operating system."""
        return holder(self.path)

    def _entries(self, folder: str) -> list[os.DirEntry[str]]:
        path = self.path / folder
        return sorted(os.scandir(path), key=lambda entry: entry.name) if path.is_dir() else []

    def _behind_link(self, name: str) -> bool:
        return any((self.path / folder).is_symlink() for folder in Path(name).parents)


def _ends_with_newline(path: Path) -> bool:
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
