"""The requests that an object store is sent, by fsspec."""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import math
import os
import threading
import time
import warnings
from collections.abc import Callable, Collection, Generator
from typing import Any, BinaryIO

from gradhpo.files import PROTOCOLS, Opened, Unreachable

PART = 32 << 20
"""Bytes of a part of a large object: a store takes 10,000 of one."""
TRIES = 5
AGAIN = 60.0
"""Seconds after which a conditional create is not tried again."""
LIMIT = 60.0
"""Seconds that a request may take, all of its client's tries together; and those that more bytes
take at a megabyte a second."""
BRIEF = 5.0
"""Seconds that it may take, at most, while the store is silent: what ends then asks it for more."""
LIMIT_NAME = "GRADHPO_STORE_SECONDS"
"""The variable of the environment that sets other ones."""
SLOW = 30.0
"""Seconds without an answer after which that is told."""
PIECE = 8 << 20
"""Bytes that a read asks for at least."""
LATE = f"no answer in time ({LIMIT_NAME} gives it other seconds than {LIMIT:g})"
S3FS_TRIES, OUR_TRIES = 5, 2
"""How often s3fs sends a request by default, each time five times by botocore; and here."""


class Objects:
    """Objects by their names below an address.

    Errors are `FileNotFoundError`, `FileExistsError` or `Unreachable`, and have a text. A request
    that takes longer than `LIMIT` is one that was not answered.

    Args:
      address: "protocol://bucket/path".

    Raises:
      ImportError: if fsspec or the store's package is not there.
      ValueError: if `GRADHPO_STORE_SECONDS` is no number of seconds.
    """

    def __init__(self, address: str) -> None:
        self.address, self._limit = address, _limit()
        self._fs, self._root = _opened(address, self._limit)
        self._silent = False
        """Whether the last request was not answered in time."""
        # s3fs asks for an object's size before it reads it in parts, and here they are small.
        self._at_once = {"max_concurrency": 1} if self._of("s3") else {}

    def put(self, name: str, content: bytes) -> None:
        """Put an object in one request; one of that name is replaced."""
        with self._told():
            self._within(self._fs.pipe_file, len(content))(self._path(name), content)

    def send(self, name: str, content: Callable[[BinaryIO], None]) -> None:
        """Send an object in parts: it is there when the last has come, and only then."""
        with self._told(watched=False):
            # The client of gs:// takes the seconds here, that of S3 as `_opened` says.
            more = {"timeout": _seconds(self._limit, PART)} if self._of("gs") else {}
            file = self._fs.open(self._path(name), "wb", block_size=PART, **more)
            try:
                content(file)
            except BaseException:
                try:
                    file.discard()
                finally:
                    file.closed = True  # or it would be made an object when it is closed
                raise
            file.close()

    def create(self, name: str, content: bytes) -> bool:
        """Put an object where there is none; whether it is this one that is there.

        A request whose answer was lost may have been the first: the content tells.
        """
        end = time.monotonic() + min(AGAIN, self._limit)
        for left in reversed(range(TRIES)):
            try:
                with self._told():
                    put = self._within(self._fs.pipe_file, len(content))
                    put(self._path(name), content, mode="create")
                return True
            except FileNotFoundError:  # no such bucket
                raise
            except OSError as error:
                if time.monotonic() > end and not isinstance(error, FileExistsError):
                    raise
                refused = error
            try:
                return self.get(name) == content
            except OSError as error:
                if left == 0 or time.monotonic() > end:
                    raise self._unread(refused, error) from refused
        raise AssertionError

    def get(self, name: str) -> bytes:
        """Return an object's content."""
        with self._told():
            return self._within(self._fs.cat_file)(self._path(name), **self._at_once)

    def get_all(self, names: Collection[str]) -> list[bytes]:
        """Return the contents of several, which are asked for at once."""
        with self._told():
            paths = [self._path(name) for name in names]
            get = self._within(self._fs.cat_ranges)
            return get(paths, None, None, on_error="raise", **self._at_once)

    def open(self, name: str) -> Opened:
        """Return a file whose bytes are asked for as they are read."""
        with self._told():
            return io.BufferedReader(_Object(self._fs, self._path(name), self._within), PIECE)

    def exists(self, name: str) -> bool:
        """Whether there is an object of this name."""
        try:
            with self._told():  # fsspec's `isfile` takes every error for a no
                return self._within(self._fs.info)(self._path(name))["type"] == "file"
        except FileNotFoundError:
            return False

    def listed(self, folder: str, kind: str) -> list[str]:
        """Return the last parts of the names below `folder`, of each "file" or "directory"."""
        try:
            with self._told():
                found = self._within(self._fs.ls)(self._path(folder), detail=True)
        except FileNotFoundError:
            return []
        names = [str(one["name"]).rstrip("/") for one in found if one["type"] == kind]
        return sorted(name.rpartition("/")[2] for name in names)

    def remove(self, names: Collection[str]) -> None:
        """Remove those objects that are there."""
        if names:
            with contextlib.suppress(FileNotFoundError), self._told():
                self._within(self._fs.rm)([self._path(name) for name in names])

    def _within(self, request: Callable[..., Any], size: int = 0) -> Callable[..., Any]:
        """Return a request that is given up after a while; one to this process's memory as it is.

        The client's own times are each try's: a server that is silent would be tried for minutes.
        """
        if self._of("memory"):
            return request
        limit = min(self._limit, BRIEF) if self._silent else self._limit
        return functools.partial(request, timeout=_seconds(limit, size))

    def _of(self, protocol: str) -> bool:
        return self.address.startswith(f"{protocol}:")

    @contextlib.contextmanager
    def _told(self, watched: bool = True) -> Generator[None]:
        try:
            with _told(self.address, watched):
                yield
        except OSError as error:
            self._silent = isinstance(error.__cause__, TimeoutError)
            if isinstance(error, Unreachable):  # a client keeps credentials, and that it had none
                self._fs, self._root = _opened(self.address, self._limit)
            raise
        self._silent = False

    def _unread(self, refused: OSError, unread: OSError) -> Unreachable:
        """Return the error of a create that was refused, and then could not be read back."""
        text = f"{refused.strerror}"
        if unread.strerror != text and not isinstance(unread, FileNotFoundError):
            text += f"; and reading it back: {unread.strerror}"
        return Unreachable(errno.EIO, text, self.address)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root


class _Object(io.RawIOBase):
    """An object that is read from its beginning, in the pieces that are asked for."""

    def __init__(self, fs: Any, path: str, within: Callable[..., Callable[..., Any]]) -> None:
        self._fs, self._file, self._within, self._at = fs, path, within, 0
        self._size = int(within(fs.size)(path))

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
            get = self._within(self._fs.cat_file, end - self._at)
            data = get(self._file, start=self._at, end=end)
        wanted[: len(data)] = data
        self._at += len(data)
        return len(data)


def _limit() -> float:
    given = os.environ.get(LIMIT_NAME) or LIMIT
    with contextlib.suppress(ValueError):
        if 0 < (seconds := float(given)) < math.inf:
            return seconds
    raise ValueError(f"{LIMIT_NAME} must be a number of seconds, got {given!r}")


def _seconds(limit: float, size: int) -> float:
    """Return the seconds that a request of so many bytes may take."""
    return limit + size / 1e6


def _opened(address: str, limit: float) -> tuple[Any, str]:
    """Return fsspec's file system and the path there."""
    needed = PROTOCOLS[address.partition("://")[0]]
    install = {"s3fs": "gradhpo[s3]", "fsspec": "gradhpo[cluster]"}.get(needed, needed)
    try:
        import fsspec  # pyright: ignore[reportMissingImports]

        with _told(address):
            options = {"use_listings_cache": False, "skip_instance_cache": True}
            fs, root = fsspec.url_to_fs(address, **options)
    except ImportError as error:
        raise ImportError(f"{address!r} needs {needed}: pip install {install}") from error
    if needed == "s3fs":
        _bound(fs)
    call = {"s3fs": "call_s3", "gcsfs": "call"}.get(needed)
    if call is not None:  # by which a file that is sent in parts sends each of them
        setattr(fs, call, functools.partial(getattr(fs, call), timeout=_seconds(limit, PART)))
    return fs, root.rstrip("/")


def _bound(fs: Any) -> None:
    """Let requests to S3 be tried less often, and be given up where nothing answers.

    Before a put, botocore waits for the server's leave (`Expect: 100-continue`), for which aiohttp
    has no limit of time: it is not asked for.
    """
    from aiobotocore.session import AioSession  # pyright: ignore[reportMissingImports]
    from botocore.handlers import add_expect_header  # pyright: ignore[reportMissingImports]

    if fs.retries == S3FS_TRIES:  # else a user has set them
        fs.retries = OUR_TRIES
    fs.session = AioSession(**fs.kwargs)  # as s3fs makes it
    fs.session.unregister("before-call.s3", add_expect_header)


@contextlib.contextmanager
def _told(address: str, watched: bool = True) -> Generator[None]:
    """Let every error be an `OSError` with a text: those of clients are of all kinds."""
    try:
        with _watched(address) if watched else contextlib.nullcontext():
            yield
    except (ImportError, Unreachable):
        raise
    except FileNotFoundError as error:
        text = error.strerror or _sentence(error) or os.strerror(errno.ENOENT)
        raise FileNotFoundError(errno.ENOENT, text, address) from error
    except FileExistsError as error:
        raise FileExistsError(errno.EEXIST, _short(error), address) from error
    except OSError as error:
        late = LATE if isinstance(error, TimeoutError) else type(error).__name__
        text = error.strerror or _short(error) or late  # fsspec's error of time has none
        raise Unreachable(error.errno or errno.EIO, text, address) from error
    except Exception as error:
        text = f"{type(error).__name__}: {_short(error)}"
        raise Unreachable(errno.EIO, text, address) from error


@contextlib.contextmanager
def _watched(address: str) -> Generator[None]:
    """Warn if this takes longer; the client itself says nothing while it tries again."""
    text = f"no answer from {address!r} since {time.strftime('%H:%M:%S')}: waiting, trying again"
    watch = threading.Timer(SLOW, warnings.warn, (text, RuntimeWarning))
    watch.daemon = True
    with contextlib.suppress(RuntimeError):  # none begins while the interpreter ends
        watch.start()
    try:
        yield
    finally:
        watch.cancel()


def _short(error: Exception) -> str:
    """Return the first line, and the second where that says what is wrong."""
    lines = str(error).strip().splitlines() or [""]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])[:500]


def _sentence(error: Exception) -> str:
    """Return what an error says; nothing where that is only a path."""
    return text if " " in (text := _short(error)) else ""
