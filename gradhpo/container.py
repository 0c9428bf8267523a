r"""The content of a file of arrays: a header in JSON, the arrays' bytes, and a SHA-256 of it all.

| bytes | |
|---|---|
| `gradhpo arrays 1\n` | the kind of file, and its version |
| 8, little-endian | length of the header |
| header | JSON: `{"arrays": [[name, dtype, shape, offset], …], "about": …}` |
| zeros | to a multiple of 64 from the file's beginning: here offsets count from |
| arrays | each as it lies in memory (C order, little-endian), at a multiple of 64 |
| 32 | SHA-256 of everything before |

The checksum is made while the bytes are written, and while they are read: they pass once.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes  # comes with JAX
import numpy as np

from gradhpo.files import Opened

MAGIC = b"gradhpo arrays 1\n"
KIND = MAGIC[: MAGIC.index(b"1")]
"""How files of all versions begin."""
ALIGNED = 64
DIGEST = 32
"""Bytes of a SHA-256."""
CHUNK = 8 << 20
"""Bytes that are hashed by one thread while another writes or reads them."""


class Content(NamedTuple):
    """The bytes of a file, and their checksums."""

    data: np.ndarray
    """uint8; the arrays of `unpack` are views of it."""
    sha256: str
    """Of the file."""
    own: bytes
    """Of all but the file's last 32 bytes."""


def write(file: BinaryIO, arrays: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> str:
    """Write arrays and what to remember with them; return the SHA-256 of the file.

    Raises:
      TypeError: for an array of something else than plain numbers.
    """
    plain = {name: _plain(name, np.asarray(array)) for name, array in arrays.items()}
    table: list[Any] = []
    offset = 0
    for name, array in plain.items():
        table.append([name, array.dtype.name, array.shape, offset])
        offset += array.nbytes + _padding(array.nbytes)
    text = json.dumps({"arrays": table, "about": dict(about)}).encode()
    head = MAGIC + len(text).to_bytes(8, "little") + text
    hashed = _Hashed()
    with hashed:
        _put(file, hashed, head + bytes(_padding(len(head))))
        for array in plain.values():
            lying = np.ascontiguousarray(array)
            _put(file, hashed, lying.reshape(-1).view(np.uint8).data)
            _put(file, hashed, bytes(_padding(array.nbytes)))
            if not np.shares_memory(lying, array):  # one array at a time is copied
                hashed.digest()
        if hashed.threaded:
            _flush(file)  # the disk works while the checksum is made
        _put(file, hashed, hashed.digest())
        return hashed.digest().hex()


def read(file: Opened) -> Content:
    """Return the bytes of an open file, whatever it is, and their checksums, in one pass.

    Raises:
      OSError: if it cannot be read.
    """
    with _Hashed() as hashed:
        size = file.seek(0, 2)
        file.seek(0)
        data = _aligned(size)
        end, before, own = max(0, size - DIGEST), Future[None](), b""
        before.set_result(None)
        for first, last in [*_spans(0, end), (end, size)]:
            own = hashed.digest() if first == end else own
            part = data[first:last].data
            if file.readinto(part) != len(part):
                raise OSError(5, "it was cut short while it was read")
            before.result()
            before = hashed.update(part)
        before.result()
        return Content(data, hashed.digest().hex(), own)


def unpack(content: Content) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return the arrays, which may be written to, and what was remembered with them.

    Raises:
      ValueError: if the content is not whole, or of a newer version.
    """
    data = content.data
    if data[: len(MAGIC)].tobytes() != MAGIC:
        raise ValueError("it was written by a newer gradhpo")
    if data[-DIGEST:].tobytes() != content.own:
        raise ValueError("its checksum does not match")
    start = len(MAGIC) + 8
    length = int.from_bytes(data[len(MAGIC) : start].tobytes(), "little")
    header = json.loads(data[start : start + length].tobytes())
    first = start + length + _padding(start + length)
    arrays: dict[str, np.ndarray] = {}
    for name, dtype_name, shape, offset in header["arrays"]:
        dtype = dtype_of(dtype_name)
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        part = data[first + offset : first + offset + size]
        arrays[name] = part.view(dtype).reshape(shape)
    return arrays, header["about"]


def is_container(content: Content) -> bool:
    """Whether a file's content is of this kind, of any version."""
    return content.data[: len(KIND)].tobytes() == KIND


class _Hashed:
    """A SHA-256 that a thread of its own makes, where there is much to do."""

    def __init__(self) -> None:
        self._made = hashlib.sha256()
        self._pool: ThreadPoolExecutor | None = None
        self._last = Future[None]()
        self._last.set_result(None)

    def __enter__(self) -> _Hashed:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._pool is not None:
            self._pool.shutdown()

    @property
    def threaded(self) -> bool:
        """Whether there is a thread for it."""
        return self._pool is not None

    def update(self, part: Any) -> Future[None]:
        """Take bytes, in order; they must not change until the future is done."""
        if len(part) >= CHUNK:
            self._pool = self._pool or ThreadPoolExecutor(1, "gradhpo-sha256")
        if self._pool is None:
            self._made.update(part)
        else:
            self._last = self._pool.submit(self._made.update, part)
        return self._last

    def digest(self) -> bytes:
        """Return the checksum of all that was taken."""
        self._last.result()
        return self._made.digest()


def _put(file: BinaryIO, hashed: _Hashed, data: Any) -> None:
    for first, last in _spans(0, len(data)):
        hashed.update(data[first:last])
        file.write(data[first:last])


def _flush(file: BinaryIO) -> None:
    file.flush()
    try:
        descriptor = file.fileno()
    except io.UnsupportedOperation:  # no file of an operating system
        return
    os.fsync(descriptor)


def _spans(start: int, end: int) -> Iterator[tuple[int, int]]:
    for first in range(start, end, CHUNK):
        yield first, min(first + CHUNK, end)


def _plain(name: str, array: np.ndarray) -> np.ndarray:
    """Return an array in this machine's byte order."""
    array = array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))
    try:
        known = dtype_of(array.dtype.name) == array.dtype
    except (TypeError, ValueError):
        known = False
    if not known:
        raise TypeError(f"cannot write {name}, an array of {array.dtype}: plain numbers only")
    return array


def dtype_of(name: str) -> np.dtype[Any]:
    """Return the dtype of plain numbers that has this name, JAX's own among them.

    Raises:
      TypeError, ValueError: if there is none.
    """
    made = np.dtype(getattr(ml_dtypes, name, name))
    if made.hasobject or made.itemsize == 0:
        raise ValueError(f"it holds {name!r}, which are no plain numbers")
    return made


def _padding(size: int) -> int:
    return -size % ALIGNED


def _aligned(size: int) -> np.ndarray:
    """Return bytes that begin at a multiple of 64, where arrays can be used as they lie."""
    room = np.empty(size + ALIGNED, np.uint8)
    first = -room.ctypes.data % ALIGNED
    return room[first : first + size]
