"""A shard's generation on host data: begin new trials, take chunks of steps, measure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import jax
import numpy as np

from gradhpo.cluster.columns import curves_of
from gradhpo.feed import HostFeed, Segment
from gradhpo.host import Places
from gradhpo.parallel import Population, chunks, compiled
from gradhpo.parallel.mesh import to_host
from gradhpo.state import BilevelState, PyTree

Arrays = dict[str, Any]
STATE = 0
"""The argument of a program whose buffers it takes over, where it returns the state after."""
DONATING = ("begin", "calibrate", "calibrate apart", "put", "turn", "turn apart")
"""Programs that do: a state lives once, beside what a step needs."""
STEP, DIVERGED = ".metadata['trial_step']", ".metadata['diverged_at']"


class Variant(Protocol):
    """What a generation asks of a variant."""

    population: Population
    programs: dict[str, Any]
    schedule: Callable[[Any], Any] | None

    def trial_keys(self, trials: jax.Array, seed: jax.Array) -> jax.Array:
        """Return each slot's key."""
        ...

    def begun(
        self, state: Arrays, per_slot: Arrays, keys: jax.Array, data: PyTree, pairs: PyTree = None
    ) -> BilevelState:
        """Return the state with new trials started and settings changed."""
        ...

    def measured(self, whole: BilevelState, data: PyTree) -> Arrays:
        """Return the columns that come from the state."""
        ...

    def packed(self, state: BilevelState) -> Arrays:
        """Return a state's arrays by path."""
        ...

    def unpacked(self, arrays: Arrays) -> BilevelState:
        """Return the state that arrays are packed of."""
        ...


class HostTurns:
    """What takes a variant's generations on host data, with a feed for each shard.

    A trial's n-th step takes the n-th pair of its stream, in whatever generation and slot: which
    pairs a generation takes follows from its order and the state that it starts from.
    """

    def __init__(self, variant: Variant, steps: int, record: int | None) -> None:
        self._variant, self._population, self._steps = variant, variant.population, steps
        self._record = record
        self._feeds: dict[int, HostFeed] = {}
        self._calibrates = self._population.optimizer.calibration_period > 0

    def parts(self, example: tuple[Any, ...]) -> dict[str, tuple[Any, tuple[Any, ...]]]:
        """Return the programs beside that of the steps: by name, functions and arguments."""
        state, per_slot, rates, seed, data = example
        n, own = self._population.slots, self._population.own_batches
        none = np.zeros(n, bool)
        feed = self._feed(0)
        first = self._first_pairs(feed, np.zeros((n, 1), np.uint32), none)
        made: dict[str, tuple[Any, tuple[Any, ...]]] = {
            "seeds": (self._seeds, (per_slot["trials"], seed)),
            "begin": (self._begin, (state, per_slot, seed, data, first)),
            "end": (self._end, (state, data)),
        }
        if self._calibrates:
            args = (state, per_slot["trials"], rates, seed, data)
            whole = (*args, feed.example_calibration(n if own else None), self._place(none))
            made["calibrate"] = (self._calibrate(own), whole)
        return made

    def turn(self, example: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
        """Return the function of a chunk of steps, and its arguments."""
        state, per_slot, rates, seed, data = example
        host, count = self._population.chunk_arguments(1)
        own = self._population.own_batches
        return self._chunk(own), (state, per_slot["trials"], rates, seed, data, host, count)

    def run(
        self,
        shard: int,
        fresh: np.ndarray,
        state: Arrays,
        per_slot: Arrays,
        rates: Any,
        seed: Any,
        data: PyTree,
    ) -> tuple[Arrays, Arrays]:
        """Take one generation; return the state and the columns, as they are."""
        feed, trials = self._feed(shard), per_slot["trials"]
        seeds = to_host(self._run("seeds", self._seeds, trials, seed))
        first = self._first_pairs(feed, seeds, np.asarray(fresh))
        state = self._run("begin", self._begin, state, per_slot, seed, data, first)
        args, own = (trials, rates, seed, data), self._population.own_batches

        def calibrate(state: Arrays, now: Segment) -> Arrays:
            name = "calibrate" if now.apart == own else "calibrate apart"
            function = self._calibrate(now.apart)
            return self._run(name, function, state, *args, now.host, self._place(now.due))

        def take(state: Arrays, now: Segment, n: np.int32) -> Any:
            name = "turn" if now.apart == own else "turn apart"
            count = self._population.place_shared(n)
            return self._run(name, self._chunk(now.apart), state, *args, now.host, count)

        ages, runs = to_host(state[STEP]), to_host(state[DIVERGED]) == 0
        generation = chunks.segments(feed, seeds, ages, runs, self._steps)
        state, rows = chunks.drive(state, generation, calibrate, take)
        columns = {name: row[-1] for name, row in rows.items() if name != "stopped"}
        if self._record is not None:
            columns |= curves_of(rows, self._record, np.where)
        return state, columns | self._run("end", self._end, state, data)

    def places(self, shard: int) -> Places:
        """Return where a shard's streams stand, for its checkpoint."""
        return self._feed(shard).places

    def know(self, shard: int, places: Any) -> None:
        """Take what a checkpoint says of that."""
        self._feed(shard).know([(tuple(seed), saved) for seed, saved in places])

    def _feed(self, shard: int) -> HostFeed:
        if shard not in self._feeds:
            self._feeds[shard] = self._population.new_feed()
        return self._feeds[shard]

    def _first_pairs(self, feed: HostFeed, seeds: np.ndarray, fresh: np.ndarray) -> PyTree:
        if not self._population.optimizer.remembers_batch:
            return None
        return feed.first_pairs(seeds, fresh)

    def _place(self, due: np.ndarray) -> Any:
        return self._population.place(due)

    def _run(self, name: str, function: Any, *args: Any) -> Any:
        """Run a program; one for shared batches of slots that differ in age compiles when due."""
        programs = self._variant.programs
        if name not in programs:
            layout = str(self._population.batching)
            programs[name] = compiled.compile(function, *args, layout=layout, donate=STATE)
        return programs[name].run(function, *args)

    # --- what is traced -------------------------------------------------------------------------

    def _seeds(self, trials: jax.Array, seed: jax.Array) -> jax.Array:
        return jax.random.key_data(self._variant.trial_keys(trials, seed))

    def _begin(
        self, state: Arrays, per_slot: Arrays, seed: jax.Array, data: PyTree, pairs: PyTree
    ) -> Arrays:
        keys = self._variant.trial_keys(per_slot["trials"], seed)
        return self._variant.packed(self._variant.begun(state, per_slot, keys, data, pairs))

    def _chunk(self, apart: bool) -> Any:
        take = self._population.trace_chunk(self._variant.schedule, apart)

        def chunk(state: Arrays, trials: Any, rates: Any, seed: Any, *more: Any) -> Any:
            keys = self._variant.trial_keys(trials, seed)
            whole, rows = take(self._variant.unpacked(state), keys, rates, *more)
            return self._variant.packed(whole), rows

        return chunk

    def _calibrate(self, apart: bool) -> Any:
        calibrate = self._population.trace_chunk_calibration(apart)

        def calibration(state: Arrays, trials: Any, rates: Any, seed: Any, *more: Any) -> Arrays:
            keys = self._variant.trial_keys(trials, seed)
            return self._variant.packed(
                calibrate(self._variant.unpacked(state), keys, rates, *more)
            )

        return calibration

    def _end(self, state: Arrays, data: PyTree) -> Arrays:
        return self._variant.measured(self._variant.unpacked(state), data)
