"""The requests that an object store is sent, by fsspec."""

from __future__ import annotations

import contextlib
import errno
import io
from collections.abc import Callable, Collection, Generator
from typing import Any, BinaryIO

from gradhpo.files import PROTOCOLS, Opened, Unreachable

PART = 32 << 20
"""Bytes of a part of a large object: a store takes 10,000 of one."""
TRIES = 5


class Objects:
    """Objects by their names below an address.

    Errors are `FileNotFoundError`, `FileExistsError` or `Unreachable`, and have a text.

    Args:
      address: "protocol://bucket/path".

    Raises:
      ImportError: if fsspec or the store's package is not there.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self._fs, self._root = _opened(address)

    def put(self, name: str, content: bytes) -> None:
        """Put an object in one request; one of that name is replaced."""
        with self._told():
            self._fs.pipe_file(self._path(name), content)

    def send(self, name: str, content: Callable[[BinaryIO], None]) -> None:
        """Send an object in parts: it is there when the last has come, and only then."""
        with self._told():
            file = self._fs.open(self._path(name), "wb", block_size=PART)
            try:
                content(file)
            except BaseException:
                file.discard()
                file.closed = True  # or it would be made an object when it is closed
                raise
            file.close()

    def create(self, name: str, content: bytes) -> bool:
        """Put an object where there is none; whether it is this one that is there.

        A request whose answer was lost may have been the first: the content tells.
        """
        for left in reversed(range(TRIES)):
            try:
                with self._told():
                    self._fs.pipe_file(self._path(name), content, mode="create")
                return True
            except OSError as error:
                with contextlib.suppress(OSError):
                    return self.get(name) == content
                if left == 0 or isinstance(error, FileNotFoundError):  # no such bucket
                    raise
        raise AssertionError

    def get(self, name: str) -> bytes:
        """Return an object's content."""
        with self._told():
            return self._fs.cat_file(self._path(name))

    def get_all(self, names: Collection[str]) -> list[bytes]:
        """Return the contents of several, which are asked for at once."""
        with self._told():
            paths = [self._path(name) for name in names]
            return self._fs.cat_ranges(paths, None, None, on_error="raise")

    def open(self, name: str) -> Opened:
        """Return a file whose bytes are asked for as they are read."""
        with self._told():
            return _Object(self._fs, self._path(name))

    def exists(self, name: str) -> bool:
        """Whether there is an object of this name."""
        with self._told():
            return bool(self._fs.isfile(self._path(name)))

    def listed(self, folder: str, kind: str) -> list[str]:
        """Return the last parts of the names below `folder`, of each "file" or "directory"."""
        try:
            with self._told():
                found = self._fs.ls(self._path(folder), detail=True)
        except FileNotFoundError:
            return []
        names = [str(one["name"]).rstrip("/") for one in found if one["type"] == kind]
        return sorted(name.rpartition("/")[2] for name in names)

    def remove(self, names: Collection[str]) -> None:
        """Remove those objects that are there."""
        if names:
            with contextlib.suppress(FileNotFoundError), self._told():
                self._fs.rm([self._path(name) for name in names])

    def _told(self) -> contextlib.AbstractContextManager[None]:
        return _told(self.address)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root


class _Object(io.RawIOBase):
    """An object that is read from its beginning, in the pieces that are asked for."""

    def __init__(self, fs: Any, path: str) -> None:
        self._fs, self._file, self._at = fs, path, 0
        self._size = int(fs.size(path))

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        wanted = memoryview(buffer).cast("B")
        end = min(self._at + len(wanted), self._size)
        if end <= self._at:
            return 0
        with _told(self._file):
            data = self._fs.cat_file(self._file, start=self._at, end=end)
        wanted[: len(data)] = data
        self._at += len(data)
        return len(data)


def _opened(address: str) -> tuple[Any, str]:
    """Return fsspec's file system and the path there."""
    needed = PROTOCOLS[address.partition("://")[0]]
    install = {"s3fs": "gradhpo[s3]", "fsspec": "gradhpo[cluster]"}.get(needed, needed)
    try:
        import fsspec  # pyright: ignore[reportMissingImports]

        with _told(address):
            fs, root = fsspec.url_to_fs(address, use_listings_cache=False)
    except ImportError as error:
        raise ImportError(f"{address!r} needs {needed}: pip install {install}") from error
    return fs, root.rstrip("/")


@contextlib.contextmanager
def _told(address: str) -> Generator[None]:
    """Let every error be an `OSError` with a text: those of clients are of all kinds."""
    try:
        yield
    except (ImportError, Unreachable):
        raise
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, _short(error), address) from error
    except FileExistsError as error:
        raise FileExistsError(errno.EEXIST, _short(error), address) from error
    except OSError as error:
        text = error.strerror or _short(error)
        raise Unreachable(error.errno or errno.EIO, text, address) from error
    except Exception as error:
        text = f"{type(error).__name__}: {_short(error)}"
        raise Unreachable(errno.EIO, text, address) from error


def _short(error: Exception) -> str:
    return str(error).partition("\n")[0][:500]
