"""Files in an object store: "s3://bucket/run", "gs://bucket/run", "memory://run".

A put is whole or not at all, and nothing can be renamed, added to or locked. So an object is put
once and never changed, under a name that nobody else puts: what follows from its content, or the
next number of a series, by a conditional create (`If-None-Match: *`), of which a store grants one.
A text that changes is a series: "journal.jsonl/000012" is one line more, or all of the text anew
(see `_Part`), as every hundredth is, so that a reader needs no more than a hundred. Whoever has the
lock knows the last number of each series and goes on from there without looking, so that a process
whose lock was taken over finds its number taken.
"""

from __future__ import annotations

import contextlib
import errno
import io
import uuid
from collections.abc import Callable, Collection
from typing import Any, BinaryIO, NamedTuple

from gradhpo.bucket_lock import BucketLock, holder_of_lock, taken_over
from gradhpo.files import Files, Opened
from gradhpo.objects import Objects

ONE_PUT = 64 << 20
"""Bytes up to which an object is put in one request; a larger one is sent in parts."""


LINES = 100
"""Objects of a text after which all of it is put anew, instead of a line more."""


class Bucket(Files):
    """See `Files`.

    Args:
      address: "protocol://bucket/path". Credentials and the server's address are those that fsspec
        and the store's own package find in the environment.

    Raises:
      ImportError: if fsspec or the store's package is not there.
    """

    def __init__(self, address: str) -> None:
        self.address, self._objects = address, Objects(address)
        self._ends: dict[str, int] = {}
        """Of each series, the last number that this process knows of while it has the lock."""
        self._held: BucketLock | None = None

    # --- files that are written once ------------------------------------------------------------

    def write(self, name: str, content: Callable[[BinaryIO], str | None]) -> str:
        """Put it in one request, or in parts, for which the content is written twice."""
        draft = _Draft(None if self.address.startswith("memory:") else ONE_PUT)
        last = content(draft)
        folder, slash, given = name.rpartition("/")
        name = f"{folder}{slash}{given if last is None else last}"
        if draft.whole:
            self._objects.put(name, draft.getvalue())
            return name

        def again(file: BinaryIO) -> None:
            if content(file) != last:
                raise OSError(errno.EIO, "the arrays changed while they were written")

        self._objects.send(name, again)
        return name

    def open(self, name: str) -> Opened:
        """Ask for its bytes as they are read."""
        return self._objects.open(name)

    def whole(self, name: str) -> bytes:
        """Ask for all of it, once."""
        return self._objects.get(name)

    def exists(self, name: str) -> bool:
        """Ask for it."""
        return self._objects.exists(name)

    def names(self, folder: str = "") -> list[str]:
        """List objects."""
        return self._objects.listed(folder, "file")

    def folders(self, folder: str = "") -> list[str]:
        """List what names have in common up to a slash."""
        return self._objects.listed(folder, "directory")

    def remove(self, names: Collection[str], folder: str | None = None) -> None:
        """Remove objects; a folder goes with its last one."""
        del folder
        self._objects.remove(names)

    def probe(self, name: str) -> None:
        """See that the store grants one of two conditional creates.

        Twice: another driver that begins removes what looks left behind, between the two.
        """
        for _ in range(2):
            given = f"{name}-{uuid.uuid4().hex}"
            both = [self._objects.create(given, content) for content in (b"first", b"second")]
            self.remove([given])
            if both == [True, False]:
                return
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
        """Put it as the series' next object; now and then with all that is before it."""
        del lasting
        number = self._ends.get(name, 0)
        if number % LINES == LINES - 1:
            self._put_next(name, _Part(True, self._text(name)[1] + line))
        else:
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
        return self._objects.create(f"{name}/{number:06d}", content)

    def get(self, name: str, number: int) -> bytes:
        """Return an object of a series; nothing where there is none."""
        with contextlib.suppress(FileNotFoundError):
            return self._objects.get(f"{name}/{number:06d}")
        return b""

    def put(self, name: str, number: int, content: bytes) -> None:
        """Put an object that is this process's alone, again and again."""
        self._objects.put(f"{name}/{number:06d}", content)

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
            contents = self._objects.get_all([f"{name}/{number:06d}" for number in asked])
            found = [_Part.decoded(content) for content in contents]
            wholes = [index for index, part in enumerate(found) if part.whole]
            parts = [*found[wholes[-1] if wholes else 0 :], *parts]
        return last, b"".join(part.text for part in parts)

    def _numbers(self, name: str) -> list[int]:
        return [int(number) for number in self.names(name) if number.isdecimal()]


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
