"""The shards that a worker holds: their states, generation by generation, and their checkpoints.

Nothing here knows of Ray: every executor's workers hold a `ShardHost`.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import time
import warnings
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gradhpo import checkpoints
from gradhpo.checkpoints import DamagedFile, Saved
from gradhpo.cluster import importing
from gradhpo.cluster.failures import StorageFailed
from gradhpo.cluster.incarnations import check_owner
from gradhpo.cluster.orders import Order, Prepared, Result, Spec
from gradhpo.cluster.variant import Arrays, Rows, Variant
from gradhpo.errors import UnreachedWarning
from gradhpo.host import Places
from gradhpo.parallel import compilations
from gradhpo.parallel.mesh import to_host
from gradhpo.state import BilevelState, PyTree


class ShardHost:
    """Executes orders for the shards that a worker holds."""

    def __init__(self, spec: Spec, data: PyTree = None) -> None:
        importing.extend_path(spec.sys_path)
        if spec.x64 != jax.config.jax_enable_x64:  # pyright: ignore[reportAttributeAccessIssue]
            jax.config.update("jax_enable_x64", spec.x64)
        self.spec, self.storage, self._data = spec, Path(spec.storage), data
        self._variants: dict[int, Variant] = {}
        self._states: collections.OrderedDict[int, tuple[int, Arrays]] = collections.OrderedDict()
        compilations.watch()
        self._before = compilations.of_this_process()

    def prepare(
        self, variant: int, batching: Any, blobs: Mapping[str, bytes] | None = None
    ) -> Prepared:
        """Get a variant's programs, in this layout; from `blobs` where there are any."""
        arguments = self.spec.space.variants()[variant]
        with _kept(UnreachedWarning) as unreached:
            made = Variant(dataclasses.replace(self.spec, batching=batching), arguments, self._data)
            prepared = made.prepare(blobs)
        self._variants[variant] = made
        return prepared._replace(variant=variant, unreached=tuple(unreached))

    def run(self, order: Order, incarnation: int, rows: Mapping[int, Rows] | None = None) -> Result:
        """Execute an order, and commit its checkpoint.

        Args:
          order: the generation.
          incarnation: of the worker that this host belongs to.
          rows: by shard that imports come from, their arrays, stacked in the order of the imports;
            what is missing is read from that shard's checkpoint.

        Raises:
          DamagedFile: if a checkpoint is damaged.
          Superseded: if the shard belongs to another incarnation.
          StorageFailed: if the checkpoint cannot be written.
        """
        started, variant = time.perf_counter(), self._variants[order.variant]
        state = self._state(order.shard, order.variant, order.generation - 1, order.start)
        # The programs take its buffers over: an order that comes again starts from the checkpoint.
        self._states.pop(order.shard, None)
        if (order.parents != np.arange(len(order.parents))).any():
            state = variant.select(state, order.parents)
        for source, items in order.by_source().items():
            found = (rows or {}).get(source)
            if found is None:
                arrays = checkpoints.load(self.storage, items[0].checkpoint)[0]
                taken = [item.source_slot for item in items]
                found = {name: array[taken] for name, array in arrays.items()}
            state = variant.put(state, [item.slot for item in items], found)
        state, columns = variant.turn(state, order)
        arrays = {name: to_host(leaf) for name, leaf in state.items()}
        saved = Saved("", "")
        if jax.process_index() == 0:
            places = [] if variant.host is None else variant.host.places(order.shard)
            saved = self._commit(order, incarnation, arrays, places)
        self._keep(order.shard, order.generation, state)
        seconds = time.perf_counter() - started
        return Result(order.shard, order.generation, columns, saved, incarnation, seconds)

    def export(
        self, shard: int, variant: int, generation: int, checkpoint: Saved, slots: list[int]
    ) -> Rows:
        """Return the arrays of some slots, stacked, as they were after a generation."""
        state = self._state(shard, variant, generation, checkpoint)
        return self._variants[variant].take(state, slots)

    def xla_compiles(self) -> int:
        """Return how many programs XLA compiled in this process since the host was made."""
        return compilations.of_this_process().since(self._before).compiled

    def restore(self, variant: int, checkpoint: Saved, slot: int) -> BilevelState:
        """Return one slot of a checkpoint as a `BilevelState` of NumPy arrays."""
        if variant not in self._variants:
            arguments = self.spec.space.variants()[variant]
            self._variants[variant] = Variant(self.spec, arguments, self._data)
        arrays = checkpoints.load(self.storage, checkpoint)[0]
        return self._variants[variant].unflatten({name: x[slot] for name, x in arrays.items()})

    def _commit(
        self, order: Order, incarnation: int, arrays: Mapping[str, np.ndarray], places: Places
    ) -> Saved:
        stem = f"checkpoints/{order.generation:06d}/shard-{order.shard:04d}-i{incarnation}"
        about = {"shard": order.shard, "generation": order.generation, "variant": order.variant}
        about |= {"batches": places} if places else {}
        try:
            check_owner(self.storage, order.shard, incarnation)
            return checkpoints.save(self.storage, stem, arrays, about)
        except OSError as error:
            raise StorageFailed(error.errno, error.strerror, error.filename) from error

    def _state(self, shard: int, variant: int, generation: int, saved: Saved | None) -> Arrays:
        if generation < 0:
            return self._variants[variant].zeros()
        held = self._states.get(shard)
        if held is not None and held[0] == generation:
            return held[1]
        if saved is None:
            raise DamagedFile(f"shard {shard}", f"no checkpoint of generation {generation}")
        arrays, about = checkpoints.load(self.storage, saved)
        state = self._variants[variant].place(arrays)
        if (host := self._variants[variant].host) is not None:
            host.know(shard, about.get("batches", []))
        self._keep(shard, generation, state)
        return state

    def _keep(self, shard: int, generation: int, state: Arrays) -> None:
        self._states[shard] = generation, state
        self._states.move_to_end(shard)
        while len(self._states) > self.spec.states:
            self._states.popitem(last=False)


@contextlib.contextmanager
def _kept(category: type[Warning]) -> Generator[list[str]]:
    """Collect the texts of one kind of warning; others are issued at the end."""
    texts: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield texts
    for w in caught:
        if issubclass(w.category, category):
            texts.append(str(w.message))
        else:
            warnings.warn_explicit(w.message, w.category, w.filename, w.lineno)
