"""A variant's state that is divided over devices: made, written and read part by part."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gradhpo.checkpoints import Saved
from gradhpo.cluster.storage import Storage
from gradhpo.parallel.held import held, restored
from gradhpo.parallel.mesh import put
from gradhpo.parts import Parts, stacked

Arrays = dict[str, Any]


class DividedState:
    """Where the arrays of a state lie, all of whose trials are larger than a device.

    Args:
      shapes: by path, with a leading slot axis.
      lie: by path, where each array lies.
    """

    def __init__(
        self, shapes: Mapping[str, jax.ShapeDtypeStruct], lie: Mapping[str, NamedSharding]
    ) -> None:
        self._shapes, self._lie = shapes, lie
        self._row_shapes = {
            n: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype) for n, x in shapes.items()
        }
        self._row_lie = {n: NamedSharding(x.mesh, P(None, *x.spec[1:])) for n, x in lie.items()}

    def zeros(self) -> Arrays:
        """Return zeros; no process makes more than its devices hold."""
        return {
            name: put(np.broadcast_to(np.zeros((), like.dtype), like.shape), self._lie[name])
            for name, like in self._shapes.items()
        }

    def row_example(self) -> Arrays:
        """Return the shapes of one slot's arrays, where they lie."""
        return {
            name: jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=self._row_lie[name])
            for name, like in self._row_shapes.items()
        }

    def row_laid(self, rows: Arrays) -> Arrays:
        """Return one slot's arrays, which are traced, laid out so."""
        return jax.lax.with_sharding_constraint(rows, self._row_lie)

    def parts(self, arrays: Arrays) -> dict[str, Parts]:
        """Return what this process has of a state, or of one slot, to be written."""
        return {name: held(array) for name, array in arrays.items()}

    def stacked(self, rows: Iterable[Arrays]) -> dict[str, Parts]:
        """Return what this process has of some slots, stacked; one of them is made at a time."""
        made = [self.parts(row) for row in rows]
        return {name: stacked([row[name] for row in made]) for name in self._shapes}

    def restored(self, storage: Storage, saved: Saved) -> tuple[Arrays, dict[str, Any]]:
        """Return a checkpoint's arrays on these devices, and what was remembered with them.

        Raises:
          DamagedFile: if it is damaged.
          ValueError: if it is of another problem or optimizer.
        """
        return restored(storage.files, saved, self._shapes, self._lie)

    def row(self, storage: Storage, saved: Saved, slot: int) -> Arrays:
        """Return the arrays of one slot of a checkpoint; it raises the same."""
        return restored(storage.files, saved, self._row_shapes, self._row_lie, slot)[0]
