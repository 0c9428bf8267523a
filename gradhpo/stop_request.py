"""A file that asks what runs in a place to end after what is in flight: anybody may write it."""

from __future__ import annotations

import contextlib
from typing import BinaryIO

from gradhpo.files import Files

STOP = "stop.txt"
"""It says who asks."""


def ask(files: Files, who: str) -> None:
    """Ask whoever runs there to end.

    Raises:
      OSError: if that cannot be written.
    """

    def content(file: BinaryIO) -> None:
        file.write(who.encode())

    files.write(STOP, content)


def asked(files: Files) -> str | None:
    """Return who asks; None where nobody does. A store is sent one request.

    Raises:
      OSError: if it cannot be read, or a store does not answer.
    """
    try:
        text = files.whole(STOP)
    except FileNotFoundError:
        return None
    return text.decode(errors="replace").strip() or f"a file {STOP}"


def forget(files: Files) -> None:
    """Remove the request, now that it is obeyed, or is not of this run."""
    with contextlib.suppress(OSError):
        files.remove([STOP])
