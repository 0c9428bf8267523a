"""The one rule by which what lasts is written: whole, or not at all.

A file is written beside its place under a temporary name, fsync'd, renamed, and its folder is
fsync'd: after a crash or a power cut it is there whole under its name, or it is not there.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

UNFINISHED = ".tmp"
"""The ending of a file that is being written; after a crash it may be left."""


def commit(path: Path, write: Callable[[BinaryIO], str | None]) -> Path:
    """Write a file whole, or not at all; folders above it are made.

    Args:
      path: the file; one of that name is replaced.
      write: writes the content, and returns the file's name where that follows from the content;
        None for the name in `path`.

    Returns:
      The path that it has. When this returns, it survives a crash.

    Raises:
      OSError: if it cannot be written, a full disk included; nothing is left of it then.
    """
    make_folder(path.parent)
    temporary = path.with_name(f"{path.name}.{os.getpid()}{UNFINISHED}")
    try:
        with open(temporary, "wb") as file:
            name = write(file)
            file.flush()
            os.fsync(file.fileno())
        final = path if name is None else path.with_name(name)
        os.replace(temporary, final)
        sync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    return final


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it, so that they survive a crash."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make what was renamed or made in a folder last through a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
