"""Files in an object store, by fsspec: "s3://bucket/run", "gs://bucket/run", "memory://run".

A put is whole or not at all, and nothing can be renamed, added to or locked. So an object is put
once and never changed, under a name that nobody else puts: what follows from its content, or the
next number of a series, by a conditional create (`If-None-Match: *`), of which a store grants one.
A text that changes is a series: "journal.jsonl/000012" is one line more, or all of the text anew
(see `_Part`). Whoever has the lock knows the last number of each series and goes on from there
without looking, so that a process whose lock was taken over finds its number taken.
"""

from __future__ import annotations

import contextlib
import errno
import io
import uuid
from collections.abc import Callable, Collection, Generator
from typing import Any, BinaryIO, NamedTuple

from gradhpo.bucket_lock import BucketLock, holder_of_lock, taken_over
from gradhpo.files import PROTOCOLS, Files, Opened, Unreachable

ONE_PUT = 64 << 20
"""Bytes up to which an object is put in one request; a larger one is sent in parts."""
PART = 32 << 20
"""Bytes of a part: a store takes 10,000 of an object."""
TRIES = 5


class Bucket(Files):
    """See `Files`.

    Args:
      address: "protocol://bucket/path". Credentials and the server's address are those that fsspec
        and the store's own package find in the environment.

    Raises:
      ImportError: if fsspec or the store's package is not there.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self._fs, self._root = _opened(address)
        self._ends: dict[str, int] = {}
        """Of each series, the last number that this process knows of while it has the lock."""
        self._held: BucketLock | None = None

    # --- files that are written once ------------------------------------------------------------

    def write(self, name: str, content: Callable[[BinaryIO], str | None]) -> str:
        """Put it in one request, or in parts that are an object when the last has come."""
        draft = _Draft(None if self.address.startswith("memory:") else ONE_PUT)
        last = content(draft)
        folder, slash, given = name.rpartition("/")
        name = f"{folder}{slash}{given if last is None else last}"
        with self._told():
            if draft.whole:
                self._fs.pipe_file(self._path(name), draft.getvalue())
            else:
                self._send(name, content, last)
        return name

    def open(self, name: str) -> Opened:
        """Ask for its bytes as they are read."""
        with self._told():
            return _Object(self._fs, self._path(name))

    def exists(self, name: str) -> bool:
        """Ask for it."""
        with self._told():
            return bool(self._fs.isfile(self._path(name)))

    def names(self, folder: str = "") -> list[str]:
        """List objects."""
        return self._listed(folder, "file")

    def folders(self, folder: str = "") -> list[str]:
        """List what names have in common up to a slash."""
        return self._listed(folder, "directory")

    def remove(self, names: Collection[str], folder: str | None = None) -> None:
        """Remove objects; a folder goes with its last one."""
        if names:
            with self._told(), contextlib.suppress(FileNotFoundError):
                self._fs.rm([self._path(name) for name in names])

    def probe(self, name: str) -> None:
        """See that the store grants one of two conditional creates."""
        given = f"{name}-{uuid.uuid4().hex}"
        both = [self._create(given, content) for content in (b"first", b"second")]
        self.remove([given])
        if both != [True, False]:
            raise OSError(
                errno.ENOTSUP,
                "the store does not obey conditional creates (If-None-Match: *), which keep a "
                "second driver away",
            )

    # --- texts that change ----------------------------------------------------------------------

    def read(self, name: str) -> bytes:
        """Read the objects from the last one with all of the text on."""
        if text := self._text(name)[1]:
            return text
        raise FileNotFoundError(errno.ENOENT, "there is no such text", f"{self.address}/{name}")

    def has(self, name: str) -> bool:
        """Read it."""
        return bool(self._text(name)[1])

    def replace(self, name: str, text: bytes) -> None:
        """Put all of it as the series' next object."""
        self._put_next(name, _Part(True, text))

    def append(self, name: str, line: bytes, lasting: bool = True) -> None:
        """Put it as the series' next object."""
        del lasting
        self._put_next(name, _Part(False, line))

    # --- the lock -------------------------------------------------------------------------------

    def lock(
        self,
        argument: str,
        user: str,
        texts: Collection[str],
        tell: Callable[[str], None] | None = None,
    ) -> BucketLock:
        """Create the next lock, see `BucketLock`, and put every text anew."""
        held = BucketLock(self, argument, user, tell)
        self._ends, self._held = {}, held
        try:
            for name in texts:
                self._take_over(name)
        except BaseException:
            held.release()
            raise
        return held

    def check_held(self) -> None:
        """Look whether there is a later lock."""
        if self._held is not None and self._held.lost():
            raise taken_over(self, self._held)

    def holder(self) -> str | None:
        """Read the last lock, and its sign of life."""
        return holder_of_lock(self)

    def forget(self, held: BucketLock) -> None:
        """Know that a lock is released."""
        if self._held is held:
            self._ends, self._held = {}, None

    # --- series: what is put once, under the next number ----------------------------------------

    def last(self, name: str) -> int:
        """Return the last number of a series; 0 for one that has not begun."""
        return max(self._numbers(name), default=0)

    def create(self, name: str, number: int, content: bytes) -> bool:
        """Put an object of a series; whether it is this one that has the number."""
        return self._create(f"{name}/{number:06d}", content)

    def get(self, name: str, number: int) -> bytes:
        """Return an object of a series; nothing where there is none."""
        with contextlib.suppress(FileNotFoundError):
            return self._got(f"{name}/{number:06d}")
        return b""

    def put(self, name: str, number: int, content: bytes) -> None:
        """Put an object that is this process's alone, again and again."""
        with self._told():
            self._fs.pipe_file(self._path(f"{name}/{number:06d}"), content)

    def _put_next(self, name: str, part: _Part) -> None:
        number, content = self._ends.get(name), part.encoded()
        number = 1 + (self.last(name) if number is None else number)
        while not self.create(name, number, content):
            self.check_held()
            number += 1  # this process put that one, and did not hear of it
        if self._held is not None:
            self._ends[name] = number

    def _take_over(self, name: str) -> None:
        """Put a text as it is once more: whoever had the lock finds that number taken.

        Whoever takes this lock over does so after this look at it, and so finds what is put here,
        or puts its own before, and then this number is taken.
        """
        while name not in self._ends:
            number, text = self._text(name)
            self.check_held()
            if self.create(name, number + 1, _Part(True, text).encoded()):
                self._ends[name] = number + 1

    def _text(self, name: str) -> tuple[int, bytes]:
        """Return the last number of a series, and the text that it makes."""
        left, parts = sorted(self._numbers(name)), list[_Part]()
        last = left[-1] if left else 0
        while left and not (parts and parts[0].whole):
            count = len(parts) + 1  # twice as many as before, or nearly
            left, asked = left[:-count], left[-count:]
            found = [_Part.decoded(content) for content in self._all(name, asked)]
            wholes = [index for index, part in enumerate(found) if part.whole]
            parts = [*found[wholes[-1] if wholes else 0 :], *parts]
        return last, b"".join(part.text for part in parts)

    def _numbers(self, name: str) -> list[int]:
        return [int(number) for number in self._listed(name, "file") if number.isdecimal()]

    def _all(self, name: str, numbers: list[int]) -> list[bytes]:
        paths = [self._path(f"{name}/{number:06d}") for number in numbers]
        with self._told():
            return self._fs.cat_ranges(paths, None, None, on_error="raise")

    # --- requests -------------------------------------------------------------------------------

    def _told(self) -> contextlib.AbstractContextManager[None]:
        return _told(self.address)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _listed(self, folder: str, kind: str) -> list[str]:
        try:
            with self._told():
                found = self._fs.ls(self._path(folder), detail=True)
        except FileNotFoundError:
            return []
        names = [str(one["name"]).rstrip("/") for one in found if one["type"] == kind]
        return sorted(name.rpartition("/")[2] for name in names)

    def _got(self, name: str) -> bytes:
        with self._told():
            return self._fs.cat_file(self._path(name))

    def _create(self, name: str, content: bytes) -> bool:
        """Create an object; a request whose answer was lost may have been the first."""
        for left in reversed(range(TRIES)):
            try:
                with self._told():
                    self._fs.pipe_file(self._path(name), content, mode="create")
                return True
            except OSError as error:
                with contextlib.suppress(OSError):
                    return self._got(name) == content
                if left == 0 or isinstance(error, FileNotFoundError):  # no such bucket
                    raise
        raise AssertionError

    def _send(self, name: str, content: Callable[[BinaryIO], str | None], last: str | None) -> None:
        """Send an object in parts, as the content is written a second time."""
        file = self._fs.open(self._path(name), "wb", block_size=PART)
        try:
            if content(file) != last:
                raise OSError(errno.EIO, "the arrays changed while they were written")
        except BaseException:
            file.discard()
            file.closed = True  # or it would be made an object when it is closed
            raise
        file.close()


class _Part(NamedTuple):
    """An object of a series, after a first line that makes it another one than any other's."""

    whole: bool
    """Whether it is all of the text, or a line more."""
    text: bytes

    def encoded(self) -> bytes:
        kind = "whole" if self.whole else "line"
        return f"gradhpo {kind} {uuid.uuid4().hex}\n".encode() + self.text

    @classmethod
    def decoded(cls, content: bytes) -> _Part:
        """Return a part; a damaged one is a line, of which its reader finds that it is damaged."""
        head, newline, text = content.partition(b"\n")
        match head.split(b" "), newline:
            case [b"gradhpo", b"whole" | b"line" as kind, _], b"\n":
                whole = kind == b"whole"
            case _:
                whole, text = False, content
        return cls(whole, text if text.endswith(b"\n") or not text else text + b"\n")


class _Draft(io.BytesIO):
    """Takes a content, and keeps it while it is small."""

    def __init__(self, limit: int | None) -> None:
        super().__init__()
        self.whole, self._limit = True, limit

    def write(self, data: Any, /) -> int:
        size = memoryview(data).nbytes
        self.whole = self.whole and (self._limit is None or self.tell() + size <= self._limit)
        if self.whole:
            super().write(data)
        else:
            self.truncate(0)
        return size


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
