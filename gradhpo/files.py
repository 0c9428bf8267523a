"""Where files are kept: a folder of this machine, or an object store; each by its name below it.

Arrays are written once, under a name that follows from their content (`write`, `open`). The few
texts that change are replaced or added to (`replace`, `append`, `read`).
"""

from __future__ import annotations

import abc
import functools
import io
import os
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, BinaryIO, Protocol
from urllib.parse import unquote, urlsplit

PROTOCOLS = {"s3": "s3fs", "gs": "gcsfs", "memory": "fsspec"}
"""Of stores that grant one of several conditional creates, each with the package that it needs."""
OTHERS = ("abfs", "az", "file", "ftp", "gcs", "hdfs", "http", "https", "s3a", "s3n", "ssh")
"""Of other stores: what begins so and a colon is meant as an address."""
Where = Path | str
"""A folder's path, or an address such as "s3://bucket/run"."""

Opened = io.RawIOBase | io.BufferedIOBase
"""A file that is read."""


class Unreachable(OSError):  # noqa: N818
    """A store did not do what was asked: nothing is known of the file, which may well be whole."""


class Held(Protocol):
    """A lock that this process has."""

    took_over: str | None
    """The holder before, where it had not let go, as text."""

    def release(self) -> None:
        """Let another process have it; twice is once."""
        ...


class Files(abc.ABC):
    """Files by their names, such as "tables/000003-0123456789abcdef.arrays".

    Everything raises `OSError` if it cannot be done.
    """

    address: str
    """Of them all, as a person gives it."""

    @abc.abstractmethod
    def write(self, name: str, content: Callable[[BinaryIO], str | None]) -> str:
        """Write a file whole, or not at all.

        Args:
          name: of the file; one of that name is replaced.
          content: writes the content, the same whenever it is called, and returns the last part
            of the file's name where that follows from the content; None for that in `name`.

        Returns:
          The name that it has. When this returns, it survives a crash.
        """

    @abc.abstractmethod
    def open(self, name: str) -> Opened:
        """Open a file that `write` wrote, to read it."""

    @abc.abstractmethod
    def whole(self, name: str) -> bytes:
        """Return all of a file that `write` wrote, a small one.

        Raises:
          FileNotFoundError: if there is none.
        """

    @abc.abstractmethod
    def exists(self, name: str) -> bool:
        """Whether a file that `write` wrote is there, whatever is in it."""

    @abc.abstractmethod
    def names(self, folder: str = "") -> list[str]:
        """Return the last parts of the names of the files below `folder`; no link is followed."""

    @abc.abstractmethod
    def folders(self, folder: str = "") -> list[str]:
        """Return the same of the folders below it."""

    @abc.abstractmethod
    def remove(self, names: Collection[str], folder: str | None = None) -> None:
        """Remove files, those that are there, and then their folder, where one is given and empty.

        No link is followed.
        """

    @abc.abstractmethod
    def read(self, name: str) -> bytes:
        """Return a text that changes.

        Raises:
          FileNotFoundError: if there is none.
        """

    def since(self, name: str, start: int) -> bytes:
        """Return such a text from its byte `start` on; nothing where it is no longer than that.

        Raises:
          FileNotFoundError: if there is none.
        """
        return self.read(name)[start:]

    @abc.abstractmethod
    def has(self, name: str) -> bool:
        """Whether such a text is there."""

    @abc.abstractmethod
    def replace(self, name: str, text: bytes) -> None:
        """Replace such a text, or not at all; when this returns, it survives a crash."""

    @abc.abstractmethod
    def append(self, name: str, line: bytes, lasting: bool = True) -> None:
        """Add a line to such a text, or nothing; a line before it that was cut short is ended.

        With `lasting`, it survives a crash when this returns.
        """

    @abc.abstractmethod
    def probe(self, name: str) -> None:
        """See that files can be written here, by one of this name, which is removed again."""

    @abc.abstractmethod
    def lock(
        self,
        argument: str,
        user: str,
        texts: Collection[str],
        tell: Callable[[str], None] | None = None,
    ) -> Held:
        """Take the lock that lets one process at a time write here.

        Args:
          argument: the one that gave the address, for messages.
          user: what writes: "sweep", "run".
          texts: those that change: whoever had the lock before can change none of them any more.
          tell: is told why this waits; without it, nothing is waited for.

        Raises:
          StorageInUse: if another process has it.
        """

    @abc.abstractmethod
    def check_held(self) -> None:
        """See that nobody has taken this process's lock over.

        Raises:
          StorageInUse: if somebody has.
        """

    @abc.abstractmethod
    def holder(self) -> str | None:
        """Return who has the lock, as text; None where nobody does."""


def where_of(argument: str, given: Any) -> Where:
    """Return the folder that an argument names ("~" is the home folder), or a store's address.

    Raises:
      TypeError: for what is no path.
      ValueError: for an address of another kind, or the path of a file.
    """
    if not isinstance(given, str | os.PathLike):
        raise TypeError(f"{argument} must be the path of a folder or an address, got {given!r}")
    text = os.fspath(given)
    if not _is_meant_as_address(text):
        return _folder(argument, Path(text).expanduser().absolute())
    if "@" in text:  # the text may have a secret anywhere, so nothing of it is told
        raise ValueError(
            f'{argument} must be an address without credentials, and without any "@": they belong '
            "into the environment, where fsspec finds them"
        )
    if not is_address(text):
        raise ValueError(
            f'{argument} must be "protocol://bucket/path" where it is an address (and a text, as a '
            f"Path loses a slash), got {text!r}"
        )
    if odd := set(text) & set("*?[]#"):
        raise ValueError(f"{argument} must be an address without any of {sorted(odd)}")
    address = urlsplit(text)
    if address.scheme == "file" and not address.netloc:
        return _folder(argument, Path(unquote(address.path)))
    if address.scheme not in PROTOCOLS:
        known = ", ".join(f"{name}://…" for name in PROTOCOLS)
        raise ValueError(
            f"{argument} must be a folder that all processes see under one path, or file:///…, or "
            f"one of {known}, got {text!r}"
        )
    parts = [part for part in (address.netloc + address.path).split("/") if part]
    if len(parts) < (1 if address.scheme == "memory" else 2):
        raise ValueError(f"{argument} must name a folder in a bucket, got {text!r}")
    return f"{address.scheme}://{'/'.join(parts)}"


def _folder(argument: str, path: Path) -> Path:
    if path.is_file():
        raise ValueError(f"{argument} must be the path of a folder, and {str(path)!r} is a file")
    return path


def _is_meant_as_address(text: str) -> bool:
    """Whether it begins as one, though perhaps not rightly: no "C:/runs", no file "run:3"."""
    begins = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):(/|:)?", text)
    return begins is not None and (
        begins[2] is not None or begins[1].lower() in {*PROTOCOLS, *OTHERS}
    )


def is_address(text: str) -> bool:
    """Whether a text is the address of an object store, and no path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", text) is not None


def files_of(where: Where | Files) -> Files:
    """Return the files at a path or an address."""
    if isinstance(where, Files):
        return where
    if isinstance(where, str) and is_address(where):
        return _bucket(where, os.getpid())
    from gradhpo.folder import Folder

    return Folder(Path(where))


@functools.cache
def _bucket(address: str, process: int) -> Files:
    """Return the one view that a process has of a store: it knows of what it holds the lock."""
    del process  # a forked child cannot use its parent's connections
    from gradhpo.bucket import Bucket

    return Bucket(address)
