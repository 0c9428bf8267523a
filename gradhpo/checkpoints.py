"""Arrays on disk that can be trusted: written whole or not at all, and checked when they are read.

A file is a NumPy `.npz` of plain numbers beside a JSON text; nothing in it is ever unpickled. Its
name ends in the beginning of its SHA-256, so a file is known by its name alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes  # comes with JAX
import numpy as np

from gradhpo.commit import commit

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
    storage: Path, stem: str, arrays: Mapping[str, np.ndarray], about: Mapping[str, Any]
) -> Saved:
    """Write arrays so that after a crash the file is there whole, or not at all.

    Written to a temporary name, fsync'd, and renamed to `{stem}-{checksum}.npz`.

    Args:
      storage: the folder of a sweep or a run.
      stem: the path below it, without an ending.
      arrays: by name; any NumPy dtype of plain numbers, bfloat16 and other ML dtypes too.
      about: what else to remember, as JSON.

    Raises:
      OSError: if it cannot be written, a full disk included; the temporary file is removed.
    """
    digest = ""

    def content(file: BinaryIO) -> str:
        nonlocal digest
        _write(file, arrays, about)
        file.flush()
        digest = checksum(Path(file.name))
        return f"{Path(stem).name}-{digest[:SHOWN]}.npz"

    path = commit(storage / stem, content)
    return Saved(str(path.relative_to(storage)), digest)


def write(path: Path, arrays: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> None:
    """Write arrays as `save` does, under this very name; a file of that name is replaced."""
    commit(path, lambda file: _write(file, arrays, about))


def load(storage: Path, saved: Saved) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return the arrays and what was remembered with them.

    Raises:
      DamagedFile: if the file is missing, or its checksum is not the one it was written with.
    """
    path = storage / saved.file
    try:
        digest = checksum(path)
    except OSError as error:
        raise DamagedFile(saved.file, f"cannot be read ({error.strerror})") from None
    if digest != saved.sha256:
        raise DamagedFile(saved.file, "its checksum does not match; it was cut short or changed")
    return read(path, saved.file)


def read(path: Path, name: str | None = None) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return the arrays of a file and what was remembered with them.

    Its name is not asked for a checksum; those inside of it are compared.

    Args:
      path: the file.
      name: how an error names it.

    Raises:
      DamagedFile: if it is missing, cut short or changed, or another kind of file.
    """
    arrays: dict[str, np.ndarray] = {}
    try:
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            header = json.loads(file["header"].tobytes())
            for index, (key, dtype) in enumerate(
                zip(header["names"], header["dtypes"], strict=True)
            ):
                array = file[f"a{index}"]
                arrays[key] = array if array.dtype.name == dtype else array.view(_dtype(dtype))
            return arrays, header["about"]
    except OSError as error:
        raise DamagedFile(name or str(path), f"cannot be read ({error.strerror})") from None
    except Exception as error:  # NumPy and zipfile raise all kinds at bytes that were changed
        raise DamagedFile(name or str(path), f"is not a whole file of gradhpo: {error}") from None


def find(storage: Path, stem: str) -> Saved | None:
    """Return the undamaged file that was saved under `stem`; None where there is none."""
    for path in sorted((storage / stem).parent.glob(f"{(storage / stem).name}-*.npz")):
        digest = checksum(path)
        if path.stem.endswith(digest[:SHOWN]):
            return Saved(str(path.relative_to(storage)), digest)
    return None


def checksum(path: Path) -> str:
    """Return the SHA-256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, content: Any) -> None:
    """Write a small JSON file, whole or not at all."""
    text = json.dumps(content, indent=2) + "\n"

    def whole(file: BinaryIO) -> None:
        file.write(text.encode())

    commit(path, whole)


def _write(file: BinaryIO, arrays: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> None:
    stored: dict[str, np.ndarray] = {}
    dtypes: list[str] = []
    for index, array in enumerate(arrays.values()):
        plain = np.asarray(array)
        dtypes.append(plain.dtype.name)
        if plain.dtype.kind == "V" or plain.dtype.name not in np.sctypeDict:
            plain = plain.view(f"u{plain.dtype.itemsize}")
        stored[f"a{index}"] = plain
    header = {"names": list(arrays), "dtypes": dtypes, "about": dict(about)}
    text = np.frombuffer(json.dumps(header).encode(), np.uint8)
    np.savez(file, allow_pickle=False, header=text, **stored)


def _dtype(name: str) -> np.dtype[Any]:
    return np.dtype(getattr(ml_dtypes, name, name))
