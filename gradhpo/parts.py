r"""Arrays in parts: each process writes what it holds of them, and reads what it needs.

A file of parts is one of `gradhpo.container`. Its arrays are named `{name}|{n}`, and it says under
"parts", by name, the shape and dtype of the whole array and where each part begins. The file of the
first of several processes names the others' files, which were durable before it: it stands for all.
"""

from __future__ import annotations

import dataclasses
import errno
import math
import re
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from gradhpo import checkpoints, container
from gradhpo.checkpoints import ENDING, DamagedFile, Saved
from gradhpo.files import Files

PARTS, OTHERS = "parts", "others"
"""What a file remembers of its arrays, and of the other processes' files."""
PATIENCE = 600.0
"""Seconds that the first process waits for the parts of the others."""
LOOK = 0.05, 1.0
"""Seconds between its looks: the first ones, and at most."""

Box = tuple[tuple[int, int], ...]
"""Of each dimension, where a part begins and where it ends."""
Wanted = Callable[[str, tuple[int, ...], "np.dtype[Any]", Mapping[str, Any]], list[Box]]
"""From an array's name, whole shape and dtype, and what was remembered with all of them, to the
boxes of it that are to be read."""


class Parts(NamedTuple):
    """What a process holds of an array."""

    shape: tuple[int, ...]
    """Of the whole."""
    dtype: np.dtype[Any]
    held: dict[Box, np.ndarray]
    """Parts that no other process has too."""


def stacked(rows: Sequence[Parts]) -> Parts:
    """Return what a process holds of arrays of one row each as that of one array of all rows."""
    shape, dtype, _ = rows[0]
    held = {
        ((i, i + 1), *box[1:]): part for i, row in enumerate(rows) for box, part in row.held.items()
    }
    return Parts((len(rows), *shape[1:]), dtype, held)


@dataclasses.dataclass(frozen=True)
class Divided:
    """A state as one of several processes holds it."""

    arrays: Mapping[str, Parts]
    process: int = 0
    processes: int = 1
    turn: int = 0
    """Which of the group's writes this is: the same number in all of its processes."""

    def save(self, files: Files, stem: str, about: Mapping[str, Any]) -> Saved:
        """Write this process's parts; the first process's file is durable after all others.

        Raises:
          OSError: if it cannot be written, or another process's file does not come.
        """
        arrays, described = _flat(self.arrays)
        about = {**about, PARTS: described}
        if self.processes > 1:
            stem = f"{stem}-w{self.turn}"
        if self.process > 0:
            return checkpoints.save(files, f"{stem}-p{self.process}", arrays, about)
        others = [_awaited(files, f"{stem}-p{k}") for k in range(1, self.processes)]
        return checkpoints.save(files, stem, arrays, about | ({OTHERS: others} if others else {}))


def _flat(arrays: Mapping[str, Parts]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    flat: dict[str, np.ndarray] = {}
    described: dict[str, Any] = {}
    for name, (shape, dtype, held) in arrays.items():
        starts = [[start for start, _ in box] for box in held]
        described[name] = {"shape": list(shape), "dtype": dtype.name, "at": starts}
        flat |= {f"{name}|{i}": part for i, part in enumerate(held.values())}
    return flat, described


def _awaited(files: Files, stem: str) -> str:
    """Return the name of another process's file when it is there, whole as all files are."""
    path, pause = PurePosixPath(stem), LOOK[0]
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        for name in files.names(str(path.parent)):
            if name.startswith(f"{path.name}-") and name.endswith(ENDING):
                return str(path.parent / name)
        time.sleep(pause)
        pause = min(2 * pause, LOOK[1])
    raise OSError(errno.ETIMEDOUT, "the part of another process of the worker did not come", stem)


def is_of(name: str, stems: Collection[str]) -> bool:
    """Whether a file is another process's part of what some first process's file stands for.

    Args:
      name: of the file.
      stems: of the first processes' files, see `stem_of`; a set, for there may be many.
    """
    group = re.fullmatch(r"(.*)-p\d+-[0-9a-f]+\.arrays", name)
    return group is not None and group[1] in stems


def stem_of(first: str) -> str:
    """Return what a first process's file and those of the others have in common."""
    return first.rpartition("-")[0]


def others_of(files: Files, saved: Saved) -> list[str]:
    """Return the names of the other processes' files that a file stands for too."""
    if not re.search(r"-w\d+-[0-9a-f]+\.arrays$", saved.file):
        return []
    return checkpoints.load(files, saved)[1].get(OTHERS, [])


def whole(
    name: str, shape: tuple[int, ...], dtype: np.dtype[Any], about: Mapping[str, Any] | None = None
) -> list[Box]:
    """Want all of an array."""
    del name, dtype, about
    return [tuple((0, size) for size in shape)]


def gather(
    files: Files, saved: Saved, wanted: Wanted
) -> tuple[dict[str, dict[Box, np.ndarray]], dict[str, Any]]:
    """Read boxes of arrays, whatever parts they were written in; one file is in memory at a time.

    Args:
      files: of the storage.
      saved: what the first process wrote, or a file of whole arrays.
      wanted: which boxes of an array; asked once for each.

    Returns:
      By name the arrays that fill the boxes, and what was remembered.

    Raises:
      DamagedFile: if the file, or one that it names, is missing, cut short or changed.
    """
    arrays, about = checkpoints.load(files, saved)
    made: dict[str, dict[Box, np.ndarray]] = {}
    for name, one in _described(arrays, about).items():
        shape, dtype = tuple(one["shape"]), container.dtype_of(one["dtype"])
        boxes = wanted(name, shape, dtype, about)
        made[name] = {box: np.empty([b - a for a, b in box], dtype) for box in boxes}
    missing = {name: sum(map(_size, boxes)) for name, boxes in made.items()}
    others = about.get(OTHERS, [])
    _fill(made, missing, arrays, about)
    del arrays
    for file in others:
        try:
            _fill(made, missing, *checkpoints.load_named(files, file))
        except DamagedFile as error:
            raise DamagedFile(saved.file, f"its part {error}") from None
    if lacking := [name for name, count in missing.items() if count]:
        raise DamagedFile(saved.file, f"lacks a part of {lacking[0]}")
    return made, {name: x for name, x in about.items() if name not in (PARTS, OTHERS)}


def _described(arrays: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a file says of its arrays; each of one without parts is one."""
    if PARTS in about:
        return about[PARTS]
    return {
        name: {"shape": x.shape, "dtype": x.dtype.name, "at": [[0] * x.ndim]}
        for name, x in arrays.items()
    }


def _fill(
    made: Mapping[str, Mapping[Box, np.ndarray]],
    missing: dict[str, int],
    arrays: Mapping[str, np.ndarray],
    about: Mapping[str, Any],
) -> None:
    """Copy what a file's parts have of the boxes; `missing` counts elements."""
    for name, one in _described(arrays, about).items():
        for i, start in enumerate(one["at"]):
            part = arrays[f"{name}|{i}" if PARTS in about else name]
            for box, into in made[name].items():
                missing[name] -= _copy(into, box, part, start)


def _copy(into: np.ndarray, box: Box, part: np.ndarray, start: list[int]) -> int:
    """Copy what a part has of a box; return how many elements."""
    there: list[slice] = []
    here: list[slice] = []
    for (low, high), first, size in zip(box, start, part.shape, strict=True):
        begin, end = max(low, first), min(high, first + size)
        if begin >= end:
            return 0
        there.append(slice(begin - low, end - low))
        here.append(slice(begin - first, end - first))
    into[tuple(there)] = part[tuple(here)]
    return into[tuple(there)].size


def _size(box: Box) -> int:
    return math.prod(high - low for low, high in box)
