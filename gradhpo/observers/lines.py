"""Text files that grow by lines, each of a number, and are cut short by what is killed."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from gradhpo.folder import Folder
from gradhpo.observers.tracker import OtherRunError

MOST_SHOWN = 80
"""Bytes of a file's first line that an error shows."""


class Found(NamedTuple):
    """Where the lines of a file end, all in bytes but for the numbers."""

    last: int
    """The last number; 0 for none."""
    before: int
    """The last number that is whole, and to stay."""
    start: int
    """Where its lines end."""


def check_beginning(who: object, path: Path, ours: str) -> None:
    """Raise if a file, whose first line may be cut short, does not begin as ours do.

    Raises:
      OtherRunError: if so.
    """
    if path.exists():
        with open(path, "rb") as file:
            first = file.readline(MOST_SHOWN)
        if not (first.startswith(ours.encode()) or ours.encode().startswith(first)):
            raise OtherRunError(f"{who} must begin with {ours!r}, has {first!r}")


def ends(
    path: Path, number_of: Callable[[bytes], int], most: int = sys.maxsize, header: bool = False
) -> Found:
    """Return what the last whole line is of; what follows it was cut short.

    Args:
      path: the file.
      number_of: returns the number of a whole line.
      most: the last number that is to stay; those after it count as cut short.
      header: whether the first line is none of them.
    """
    if not path.exists():
        return Found(0, 0, 0)
    position = start = number = before = 0
    with open(path, "rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            if header and position == 0:
                start = len(line)
            elif (found := number_of(line)) != number:
                if number <= most:
                    start, before = position, number
                number = found
            position += len(line)
    return Found(number, before, start)


def trim(path: Path, found: Found) -> int:
    """Remove the lines of the last number, which may not all be there, and what was given up."""
    if path.exists():
        os.truncate(path, found.start)
    return found.before


def append(path: Path, lines: bytes) -> None:
    """Add lines, in one write, or none.

    Raises:
      OSError: if they cannot be written whole.
    """
    Folder(path.parent).append(path.name, lines, lasting=False)
