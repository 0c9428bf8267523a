"""What this process's devices hold of arrays, as NumPy, and arrays made of such parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from gradhpo.checkpoints import Saved
from gradhpo.files import Files
from gradhpo.parts import Box, Parts, gather


def held(array: jax.Array) -> Parts:
    """Return the parts of an array that this process has, each of them on one process alone.

    On a CPU they are not copied; no device, and no process, gets another one's part.
    """
    parts = {
        _box(shard.index, array.shape): np.asarray(shard.data)
        for shard in array.addressable_shards
        if shard.replica_id == 0
    }
    return Parts(array.shape, np.dtype(array.dtype), parts)


def restored(
    files: Files,
    saved: Saved,
    shapes: Mapping[str, Any],
    shardings: Mapping[str, Any],
    row: int | None = None,
) -> tuple[dict[str, jax.Array], dict[str, Any]]:
    """Return arrays that were written in any parts on these devices, and what was remembered.

    A process reads into memory what its own devices hold, beside one file.

    Args:
      files: of the storage.
      saved: what was written.
      shapes: by name, of what is returned.
      shardings: by name, where it lies.
      row: which row of the arrays alone, where the shapes have one.

    Raises:
      DamagedFile: if a file is missing, cut short or changed.
      ValueError: if the arrays are others than these.
    """

    def wanted(
        name: str, shape: tuple[int, ...], dtype: np.dtype[Any], about: Mapping[str, Any]
    ) -> list[Box]:
        del about
        like = shapes.get(name)
        first = 0 if row is None else 1
        if like is None or (dtype, shape[first:]) != (like.dtype, like.shape[first:]):
            raise _of_another(name, like, f"{dtype}{list(shape)}")
        where = shardings[name].addressable_devices_indices_map(like.shape)
        return list(dict.fromkeys(_moved(_box(index, like.shape), row) for index in where.values()))

    made, about = gather(files, saved, wanted)
    for name, like in shapes.items():
        if name not in made:
            raise _of_another(name, like, "nothing")

    def placed(name: str, like: Any) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            return made[name][_moved(_box(index, like.shape), row)]

        return jax.make_array_from_callback(like.shape, shardings[name], part)

    return {name: placed(name, like) for name, like in shapes.items()}, about


def _of_another(name: str, like: Any, found: str) -> ValueError:
    wanted = "nothing" if like is None else f"{like.dtype}{list(like.shape)}"
    return ValueError(
        f"the checkpoint is of another problem or optimizer: {name} should be {wanted}, found "
        f"{found}"
    )


def _box(index: Any, shape: tuple[int, ...]) -> Box:
    """Return where slices of an array begin and end."""
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def _moved(box: Box, row: int | None) -> Box:
    """Return a box of an array with one row as that of the row in the whole."""
    return box if row is None else ((row, row + 1), *box[1:])
