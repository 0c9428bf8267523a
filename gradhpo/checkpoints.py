"""Arrays on disk that can be trusted: written whole or not at all, and checked when they are read.

A file holds plain numbers beside a JSON text (see `container`); nothing in it is ever unpickled.
Its name ends in the beginning of its SHA-256, so a file is known by its name alone. The `.npz` of
older versions are read too.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from gradhpo import container
from gradhpo.commit import commit
from gradhpo.files import Files, Opened, Unreachable, Where, files_of

ENDING, OLD = ".arrays", ".npz"
"""Of files: those that are written, and those of older versions."""
SHOWN = 16
"""Hexadecimal digits of the checksum in a file's name."""


class Saved(NamedTuple):
    """A file that was written, as the journal names it."""

    file: str
    """The path, relative to the storage."""
    sha256: str


class DamagedFile(RuntimeError):  # noqa: N818
    """A file is missing, cut short or changed since it was written."""

    def __init__(self, file: str, reason: str) -> None:
        super().__init__(file, reason)
        self.file, self.reason = file, reason

    def __str__(self) -> str:
        return f"{self.file}: {self.reason}"


def save(
    storage: Where | Files, stem: str, arrays: Mapping[str, np.ndarray], about: Mapping[str, Any]
) -> Saved:
    """Write arrays so that after a crash the file is there whole, or not at all.

    Its name is `{stem}-{checksum}.arrays`.

    Args:
      storage: of a sweep or a run: a folder, or the address of a store.
      stem: the path below it, without an ending.
      arrays: by name; any NumPy dtype of plain numbers, bfloat16 and other ML dtypes too.
      about: what else to remember, as JSON.

    Raises:
      OSError: if it cannot be written, a full disk included; the temporary file is removed.
    """
    digest = ""

    def content(file: BinaryIO) -> str:
        nonlocal digest
        digest = container.write(file, arrays, about)
        return f"{Path(stem).name}-{digest[:SHOWN]}{ENDING}"

    return Saved(files_of(storage).write(stem, content), digest)


def write(path: Path, arrays: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> None:
    """Write arrays as `save` does, under this very name; a file of that name is replaced."""

    def content(file: BinaryIO) -> None:
        container.write(file, arrays, about)

    commit(path, content)


def load(storage: Where | Files, saved: Saved) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return the arrays and what was remembered with them.

    Raises:
      DamagedFile: if the file is missing, or its checksum is not the one it was written with.
      Unreachable: if a store does not answer.
    """
    files = files_of(storage)
    return _load(lambda: files.open(saved.file), saved.file, saved.sha256)


def load_named(storage: Where | Files, file: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return the same of a file that `save` wrote, by the checksum in its own name.

    Raises:
      DamagedFile: if the file is missing, or not what its name says.
    """
    files, stem = files_of(storage), PurePosixPath(file).stem
    return _load(lambda: files.open(file), file, stem.rpartition("-")[2])


def read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return the same of a file whose name is not asked for a checksum; it has one inside of it.

    Raises:
      DamagedFile: if it is missing, cut short or changed, or another kind of file.
    """
    return _load(lambda: open(path, "rb"), str(path))


def find(storage: Where | Files, stem: str) -> Saved | None:
    """Return the undamaged file that was saved under `stem`; None where there is none."""
    folder, _, begun = stem.rpartition("/")
    for name in sorted(files_of(storage).names(folder)):
        path = PurePosixPath(folder, name)
        if name.startswith(f"{begun}-") and path.suffix in (ENDING, OLD):
            digest = checksum(storage, str(path))
            if is_named(str(path), digest):
                return Saved(str(path), digest)
    return None


def is_named(file: str, digest: str) -> bool:
    """Whether a file's name ends in the beginning of its checksum."""
    return PurePosixPath(file).stem.endswith(digest[:SHOWN])


def checksum(storage: Where | Files, file: str) -> str:
    """Return the SHA-256 of a file's content."""
    with files_of(storage).open(file) as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def write_json(storage: Where | Files, name: str, content: Any) -> None:
    """Replace a small text by this as JSON, whole or not at all."""
    files_of(storage).replace(name, (json.dumps(content, indent=2) + "\n").encode())


def _load(
    opened: Callable[[], Opened], name: str, sha256: str = ""
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    try:
        with opened() as file:
            content = container.read(file)
    except Unreachable:
        raise
    except OSError as error:
        raise DamagedFile(name, f"cannot be read ({error.strerror})") from None
    if not content.sha256.startswith(sha256):
        raise DamagedFile(name, "its checksum does not match; it was cut short or changed")
    try:
        return container.unpack(content) if container.is_container(content) else _unzip(content)
    except Exception as error:  # NumPy and zipfile raise all kinds at bytes that were changed
        raise DamagedFile(name, f"is not a whole file of gradhpo: {error}") from None


def _unzip(content: container.Content) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return the same of a file that an older gradhpo wrote: an `.npz` of NumPy's."""
    arrays: dict[str, np.ndarray] = {}
    with np.load(io.BytesIO(content.data.data), allow_pickle=False) as file:
        header = json.loads(file["header"].tobytes())
        for index, (key, dtype) in enumerate(zip(header["names"], header["dtypes"], strict=True)):
            array = file[f"a{index}"]
            arrays[key] = (
                array if array.dtype.name == dtype else array.view(container.dtype_of(dtype))
            )
        return arrays, header["about"]
