"""The shards that a worker holds: their states, generation by generation.

Nothing here knows of Ray: every executor's workers hold a `ShardHost`.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import time
import warnings
from collections.abc import Generator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

from gradhpo.checkpoints import Saved
from gradhpo.cluster import importing
from gradhpo.cluster.failures import StateGone, Superseded
from gradhpo.cluster.orders import Import, Order, Prepared, Result, Spec
from gradhpo.cluster.storage import Storage
from gradhpo.cluster.variant import Arrays, Rows, Variant
from gradhpo.cluster.writer import Writer
from gradhpo.errors import UnreachedWarning
from gradhpo.parallel import compilations, compiled
from gradhpo.parallel.mesh import to_host
from gradhpo.parts import Divided, Parts
from gradhpo.state import BilevelState, PyTree


class ShardHost:
    """Executes orders for the shards that a worker holds."""

    def __init__(self, spec: Spec, data: PyTree = None) -> None:
        importing.extend_path(spec.sys_path)
        if spec.x64 != jax.config.jax_enable_x64:  # pyright: ignore[reportAttributeAccessIssue]
            jax.config.update("jax_enable_x64", spec.x64)
        self.spec, self.storage, self._data = spec, Storage(spec.storage), data
        self._variants: dict[int, Variant] = {}
        self._traced: dict[int, tuple[Variant, list[str]]] = {}
        """Of those that another worker compiles, with what was told of unreached ones."""
        self._states: collections.OrderedDict[int, Held] = collections.OrderedDict()
        self._writer = Writer(self.storage)
        self._compilers = ThreadPoolExecutor(compiled.MOST_AT_ONCE)
        self._turn = 0
        """How many states and winners in parts this process has begun to write."""
        self._begun: dict[int, int] = {}
        """By shard, the generation whose state was written last, or is being written."""
        compilations.watch()
        self._before = compilations.of_this_process()

    def trace(self, variant: int, batching: Any) -> None:
        """Get ahead with a variant that another worker compiles: import, and trace the programs."""
        with _kept(UnreachedWarning) as unreached:
            made = self._made(variant, batching)
            if made.trace():
                self._traced[variant] = made, unreached

    def begin(self, variant: int, batching: Any) -> None:
        """Trace a variant, and compile it beside what comes next; `prepare` waits for it.

        Where a layout must be measured first, `prepare` does all of it, when nothing else compiles.
        """
        if variant not in self._traced:
            self.trace(variant, batching)
        if variant in self._traced:
            self._traced[variant][0].begin(self._compilers)

    def prepare(
        self, variant: int, batching: Any, blobs: Mapping[str, bytes] | None = None
    ) -> Prepared:
        """Get a variant's programs, in this layout; from `blobs` where there are any."""
        made, before = self._traced.pop(variant, (None, list[str]()))
        if made is None and blobs is None:
            self._settle()
        if made is not None and batching not in ("auto", made.population.batching):
            made, before = None, []
        with _kept(UnreachedWarning) as unreached:
            made = made or self._made(variant, batching)
            prepared = made.prepare(blobs)
        self._variants[variant] = made
        return prepared._replace(variant=variant, unreached=(*before, *unreached))

    def forget(self, variant: int) -> None:
        """Let go of a combination that ended: of its programs, and states that none goes on from.

        Should the sweep go back to before its end, it is prepared again.
        """
        stale = [shard for shard, held in self._states.items() if held.variant == variant]
        for shard in stale:
            del self._states[shard]
        made, _ = self._traced.pop(variant, (None, None))
        for one in (made, self._variants.pop(variant, None)):
            if one is not None:
                one.let_go()

    def _settle(self) -> None:
        """Wait for what compiles: it would disturb the measuring of a layout."""
        for made, _ in self._traced.values():
            made.settle()

    def run(self, order: Order, incarnation: int, rows: Mapping[int, Any] | None = None) -> Result:
        """Execute an order, and begin to write its checkpoint if it says so.

        Args:
          order: the generation.
          incarnation: of the worker that this host belongs to.
          rows: by shard that imports come from, what `export` gave: their arrays, stacked in the
            order of the imports, or the checkpoint that has them. What is missing is read from the
            checkpoint that the order names.

        Raises:
          DamagedFile: if a checkpoint is damaged.
          StateGone: if the state that it starts from is neither here nor in a checkpoint.
          Superseded: if the shard belongs to another incarnation.
          StorageFailed: if a checkpoint cannot be written, or one before could not.
        """
        started, variant = time.perf_counter(), self._variants[order.variant]
        state, winner = self._begin(order, incarnation)
        if self._begun.get(order.shard, -1) >= order.generation:  # the sweep went back
            del self._begun[order.shard]
            self._writer.forget(order.shard, order.generation)
        # The programs take its buffers over: an order that comes again starts from the checkpoint.
        self._states.pop(order.shard, None)
        if (order.parents != np.arange(len(order.parents))).any():
            state = variant.select(state, order.parents)
        for source, items in order.by_source().items():
            found = (rows or {}).get(source)
            if variant.divided is not None:
                saved = found or _there(items[0].checkpoint, source, order.generation - 1)
                for item in items:
                    row = variant.divided.row(self.storage, saved, item.source_slot)
                    state = variant.put_row(state, item.slot, row)
                continue
            if found is None:
                found = self._read_rows(order.generation - 1, items)
            state = variant.put(state, [item.slot for item in items], found)
        state, columns = variant.turn(state, order)
        self._hold(order.shard, Held(order.generation, order.variant, incarnation, state))
        newest = self._writer.newest(order.shard)
        if order.save:
            newest = self._writer.wait(order.shard)
            self._write(order.shard)
        return Result(
            order.shard,
            order.generation,
            columns,
            newest,
            incarnation,
            time.perf_counter() - started,
            None if winner is None else winner.result(),
        )

    def checkpoint(self, shard: int, generation: int) -> Saved:
        """Return a shard's checkpoint of the generation that it ran last, when it is durable.

        Raises:
          StateGone: if the state is not here.
          StorageFailed, Superseded: as for `run`.
        """
        if self._begun.get(shard, -1) < generation:
            held = self._states.get(shard)
            if held is None or held.generation != generation:
                raise StateGone(f"shard {shard}: nobody holds generation {generation}")
            self._write(shard)
        there = {made.generation: made.saved for made in self._writer.wait(shard)}
        if jax.process_index() != 0:
            return Saved("", "")  # the first process of a gang has it
        if generation not in there:
            raise StateGone(f"shard {shard}: generation {generation} could not be written")
        return there[generation]

    def close(self) -> None:
        """Finish what is being written."""
        self._writer.close()
        self._compilers.shutdown(wait=False, cancel_futures=True)

    def export(
        self, shard: int, variant: int, generation: int, checkpoint: Saved | None, slots: list[int]
    ) -> Rows | Saved:
        """Return the arrays of some slots, stacked, as they were after a generation.

        Of trials that are divided no process has whole arrays: what is returned is a checkpoint.
        """
        if self._variants[variant].divided is not None:
            return checkpoint or self.checkpoint(shard, generation)
        state = self._state(shard, variant, generation, checkpoint)
        return self._variants[variant].take(state, slots)

    def xla_compiles(self) -> int:
        """Return how many programs XLA compiled in this process since the host was made."""
        return compilations.of_this_process().since(self._before).compiled

    def restore(self, variant: int, checkpoint: Saved, slot: int) -> BilevelState:
        """Return one slot of a checkpoint as a state of NumPy arrays; no mesh is needed."""
        if variant not in self._variants:
            arguments = self.spec.space.variants()[variant]
            spec = dataclasses.replace(self.spec, mesh=None, rules=None, batching="map")
            self._variants[variant] = Variant(spec, arguments, self._data)
        return self._variants[variant].unflatten(self.storage.load_slot(checkpoint, slot))

    def _made(self, variant: int, batching: Any) -> Variant:
        arguments = self.spec.space.variants()[variant]
        return Variant(dataclasses.replace(self.spec, batching=batching), arguments, self._data)

    def _state(self, shard: int, variant: int, generation: int, saved: Saved | None) -> Arrays:
        if generation < 0:
            return self._variants[variant].zeros()
        held = self._states.get(shard)
        if held is not None and held.generation == generation:
            return held.state
        for made in self._writer.wait(shard):
            if made.generation == generation and jax.process_index() == 0:
                saved = made.saved  # it did not fit any more
        saved = _there(saved, shard, generation)
        state, about = self._variants[variant].restore(self.storage, saved)
        if (host := self._variants[variant].host) is not None:
            host.know(shard, about.get("batches", []))
        self._hold(shard, Held(generation, variant, None, state))
        return state

    def _read_rows(self, generation: int, items: list[Import]) -> Rows:
        checkpoint = _there(items[0].checkpoint, items[0].source_shard, generation)
        arrays = self.storage.load(checkpoint)[0]
        taken = [item.source_slot for item in items]
        return {name: array[taken] for name, array in arrays.items()}

    def _hold(self, shard: int, held: Held) -> None:
        """Keep a state, and not more than there is room for: the oldest goes to its checkpoint."""
        self._states[shard] = held
        self._states.move_to_end(shard)
        # In a gang, of which one process writes, the others could not read it again.
        while len(self._states) > self.spec.states and jax.process_count() == 1:
            oldest, old = next(iter(self._states.items()))
            if old.incarnation is not None and self._begun.get(oldest) != old.generation:
                with contextlib.suppress(Superseded):  # another worker has the shard by now
                    self._write(oldest)
            self._writer.wait(oldest)
            del self._states[oldest]

    def _write(self, shard: int) -> None:
        """Begin to write a shard's state."""
        held = self._states[shard]
        assert held.incarnation is not None
        self._begun[shard] = held.generation
        variant = self._variants[held.variant]
        arrays: Any = None
        if variant.divided is not None:
            arrays = self._divided(variant.divided.parts(held.state))
        else:
            arrays = {name: to_host(leaf) for name, leaf in held.state.items()}
        if jax.process_index() == 0 or variant.divided is not None:
            host = variant.host
            places = [] if host is None else host.places(shard)
            about = {"variant": held.variant} | ({"batches": places} if places else {})
            self._writer.start(shard, held.generation, held.incarnation, arrays, about)

    def _begin(self, order: Order, incarnation: int) -> tuple[Arrays, Future[Saved] | None]:
        """Return the state that an order starts from; begin to write the winners before it."""
        variant, number = self._variants[order.variant], order.variant
        if order.before is None:
            before = self._state(order.shard, number, order.generation - 1, order.start)
            state = before
        else:
            held, state, before = self._states.get(order.shard), variant.zeros(), None
            if held is not None and held.generation == order.generation - 1:
                number, before = held.variant, held.state
        if not order.winners:
            return state, None
        about = (order.shard, order.generation - 1, incarnation)
        if before is None:
            return state, self._move_winners(order, about)
        return state, self._start_winners(self._variants[number], before, order.winners, about)

    def _start_winners(
        self, variant: Variant, state: Arrays, slots: tuple[int, ...], about: tuple[int, int, int]
    ) -> Future[Saved] | None:
        if variant.divided is not None:
            rows = variant.divided.stacked(variant.row(state, slot) for slot in slots)
            return self._writer.start_winner(*about, self._divided(rows), slots)
        rows = variant.take(state, list(slots))
        if jax.process_index() != 0:
            return None
        return self._writer.start_winner(*about, rows, slots)

    def _move_winners(self, order: Order, about: tuple[int, int, int]) -> Future[Saved] | None:
        """Write winners of a shard that another variant had, from the checkpoint that has them."""
        start = _there(order.start, order.shard, order.generation - 1)
        if jax.process_index() != 0:
            return None
        slots = [self.storage.load_slot(start, slot) for slot in order.winners]
        rows = {name: np.stack([one[name] for one in slots]) for name in slots[0]}
        return self._writer.start_winner(*about, rows, order.winners)

    def _divided(self, parts: dict[str, Parts]) -> Divided:
        """Return what this process writes of a state, all of whose processes write now."""
        self._turn += 1
        return Divided(parts, jax.process_index(), jax.process_count(), self._turn)


def _there(saved: Saved | None, shard: int, generation: int) -> Saved:
    """Return a checkpoint, if it is known."""
    if saved is None:
        raise StateGone(f"shard {shard}: nobody holds generation {generation}")
    return saved


class Held(NamedTuple):
    """A shard's state, after a generation."""

    generation: int
    variant: int
    incarnation: int | None
    """Of the worker that computed it; None for one that was read from its checkpoint."""
    state: Arrays


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
