"""`Population`: many trials as one `BilevelState`, and a generation of them as one program."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from gradhpo import convolutions
from gradhpo.errors import check_count, check_instance, check_number
from gradhpo.feed import HostFeed, Segment
from gradhpo.host import Source
from gradhpo.optimizer import BilevelOptimizer
from gradhpo.parallel import batching as layouts
from gradhpo.parallel import chunks, compiled, fit, layout_cache, working_set
from gradhpo.parallel.batching import Batching, Layout
from gradhpo.parallel.compiled import Compiled
from gradhpo.parallel.data import DataParallel
from gradhpo.parallel.mesh import put, to_host
from gradhpo.parallel.placement import Placement
from gradhpo.problem import Problem
from gradhpo.state import BilevelState, PyTree, as_array, is_key, prepare
from gradhpo.timetable import EpisodeInit, Timetable, schedule_and_rate, starts_fresh
from gradhpo.trial import PHI, Rates, Trial

CALIBRATION_STEPS = 5
"""Steps of the programs that `batching="auto"` compares."""


class Population:
    """Trials in slots: each with its own weights, hyperparameters, rates and random stream.

    A generation is one compiled `scan`; what differs between trials are numbers in it, so that
    nothing compiles again when they change. A slot whose metrics stop being finite is frozen in
    the state before, with the step, counted from 1 over all generations, in
    `metadata["diverged_at"]` (0 for never); the others go on. At one layout a slot's bits do not
    depend on its neighbours.

    Args:
      problem: with data of the device or the host. Where `batches` is a function that takes a
        generator, every slot has a stream of its own, seeded by its key; otherwise all slots read
        the same one, once for those whose next step has the same number. Either way a slot's n-th
        step takes the stream's n-th pair, and the next pairs are read while the device computes.
      optimizer: any `BilevelOptimizer`; a `data_parallel` one divides each trial's batches too, and
        with `backend="auto"` and `rules` its weights, optimizer states and hyperparameters.
      slots: how many trials, or "fit" for as many as the device holds.
      mesh: from `make_mesh`; slots are divided over its axis "trial".
      batching: "vmap": all slots at once; "map": one after another; an integer: so many at once;
        "shard": divided over the mesh, all of a device at once; "shard/map", "shard/16": divided,
        then so. "auto" chooses on a CPU by a model of the step's memory ("map" where the trials
        convolve with kernels of their own); elsewhere it measures them on a few steps, and takes
        the fastest, or what an earlier process found (see `layout_cache`). With `rules` it is
        "map". Afterwards the attribute `batching` names it, and a run that must give the same bits
        passes that.
      data_key: a key from which `problem.data` makes the data shared by all slots; an array of
        `slots` keys makes data for each slot.
      memory: bytes on one device that "fit" may use; by default 90% of what the device has.
      steps: the longest generation that "fit" must have room for; its metrics count too.
      episode_length: as in `solve`: steps after which a trial's weights start anew from its φ,
        moved by Reptile; None for one long episode.
      lr_reptile: Reptile step size, with `episode_length`.
      episode_init: as in `solve`: where an episode starts, "reptile" or "fresh".

    Raises:
      ValueError: for an argument out of range.
    """

    def __init__(
        self,
        problem: Problem,
        optimizer: BilevelOptimizer,
        slots: int | Literal["fit"],
        mesh: Mesh | None = None,
        batching: Batching = "auto",
        *,
        data_key: jax.Array | None = None,
        memory: int | None = None,
        steps: int = 1000,
        episode_length: int | None = None,
        lr_reptile: float = 1.0,
        episode_init: EpisodeInit = "reptile",
    ) -> None:
        check_instance("problem", problem, Problem)
        check_instance("optimizer", optimizer, BilevelOptimizer)
        if isinstance(optimizer, DataParallel):
            if optimizer.backend == "pmap":
                wanted = 'backend="shard_map" or "auto"'
                raise ValueError(f'data_parallel in a population needs {wanted}, got "pmap"')
            if optimizer.axis == "trial" and optimizer.mesh.shape["trial"] > 1:
                raise ValueError('data_parallel in a population needs an axis other than "trial"')
            if mesh is not None and mesh != optimizer.mesh:
                raise ValueError("mesh must be the one of data_parallel, or left out")
            mesh = optimizer.mesh
        elif mesh is not None and getattr(optimizer, "mesh", None) is not None:
            raise ValueError(
                "mesh divides slots, and this optimizer its particles over a mesh of its own: give "
                "one of the two"
            )
        self.problem, self.optimizer, self.mesh = problem, optimizer, mesh
        within: Any = optimizer
        if isinstance(optimizer, DataParallel) and not self._by_compiler:
            within = optimizer.within
        timetable = Timetable.of(optimizer, episode_length)
        fresh = starts_fresh(episode_init, episode_length, lr_reptile)
        self._trial = Trial(problem, within, timetable, fresh=fresh)
        self._source = None if problem.batch is not None else Source(problem.batches)
        self._feed = None if self._source is None else self.new_feed()
        self._lr_reptile = check_number("lr_reptile", lr_reptile, -np.inf, np.inf)
        self._given_data_key = data_key
        self._programs: dict[Any, Compiled] = {}
        self._layout: Layout | None = None
        if slots == "fit":
            limit = fit.memory_limit(mesh) if memory is None else memory
            check_count("steps", steps)
            needs = functools.partial(self._needs, batching=batching, steps=steps)
            slots = fit.largest(needs, mesh, limit)
        check_count("slots", slots)
        self.slots = slots
        if self._per_slot_data and self._data_key.shape != (slots,):
            raise ValueError(
                f"data_key must be a key, or one for each of {slots} slots, "
                f"got shape {self._data_key.shape}"
            )
        self._layout = layouts.parse(batching, slots, mesh)
        if self._layout is None:
            found = self._all_layouts(slots)
            self._layout = found[0] if len(found) == 1 else None

    @property
    def batching(self) -> Batching:
        """The layout: as given, or what "auto" found, and "auto" until it has measured."""
        return "auto" if self._layout is None else self._layout.name

    @functools.cached_property
    def _data_key(self) -> jax.Array:
        # Made when it is needed: a key is computed, and that compiles.
        return jax.random.key(0) if self._given_data_key is None else self._given_data_key

    @functools.cached_property
    def data(self) -> PyTree:
        """What `problem.data` made, on the devices; with a leading slot axis if drawn per slot."""
        sharding = self.sharding if self._per_slot_data else self._replicated()
        return jax.jit(self.trace_data, out_shardings=sharding)(self._data_key)

    def init(
        self, key: jax.Array, *, params: PyTree = None, hyperparams: PyTree = None
    ) -> BilevelState:
        """Return the first state, with a leading slot axis; slot i starts from `split(key)[i]`.

        Args:
          key: one key; or one for each slot, from which it then starts.
          params: weights to start from instead, with a leading slot axis.
          hyperparams: hyperparameters to start from instead, with a leading slot axis.
        """
        given = {"params": params, "hyperparams": hyperparams}
        given = {name: tree for name, tree in given.items() if tree is not None}
        for name, tree in given.items():
            _check_slots(name, tree, self.slots)
        keys = jax.random.split(key, self.slots) if jnp.ndim(key) == 0 else key
        _check_slots("key", keys, self.slots)
        pairs = None
        if self._feed is not None and self.optimizer.remembers_batch:
            pairs = self._feed.first_pairs(_seeds(keys), np.ones(self.slots, bool))
        given = {name: self.place_state(tree, f".{name}") for name, tree in given.items()}
        args = (self.place(keys), given, self.data, pairs)
        return self._call("init", self.trace_init, *args)

    def run(
        self, state: BilevelState, steps: int, keys: jax.Array, lr_hyper: Any = None
    ) -> tuple[BilevelState, dict[str, np.ndarray]]:
        """Take a generation of steps in every slot.

        A slot given the same key in every generation is a `solve` with that key.

        Args:
          state: from `init`, `run` or `select`; it stays valid.
          steps: steps in the generation. Another number is another program, but with host data.
          keys: one key for each slot, `(slots,)`; with the number of the trial's step it decides
            the batch, so that a generation that is run again gives the same bits.
          lr_hyper: where there is no `outer_optimizer`: a number, one for each slot, or a traceable
            function of the trial's step, counted from 0.

        Returns:
          The state, and the metrics of every step, those that the losses return among them, each
          `(steps, slots)`; NaN from a slot's divergence on.

        Raises:
          ValueError: if a leading axis is not the slots, for an argument out of range, or if host
            data ends before the generation, or is an iterator that stands elsewhere.
        """
        check_count("steps", steps)
        schedule, args = self._arguments(state, keys, lr_hyper)
        if self._feed is None:
            program = self._program(steps, schedule, *args)
            state, rows = program.run(self.trace_run(steps, schedule), *args)
            rows = {name: to_host(row) for name, row in rows.items()}
        else:
            state, rows = self._run_chunks(steps, schedule, _seeds(keys), *args)
        stopped = rows.pop("stopped")
        # Here and not in the program, which would be stopped by `jax_debug_nans`.
        return state, {n: np.where(stopped, row.dtype.type("nan"), row) for n, row in rows.items()}

    def calibrate(self, state: BilevelState, keys: jax.Array) -> BilevelState:
        """Let each slot's optimizer estimate its own settings (HyperDistill's θ), from `T` batches.

        `run` does that by itself where a `solve` does: before step 0, and with episodes every
        `estimation_period` of them.

        Args:
          state: its weights are where the estimate starts.
          keys: one key for each slot, from which the batches are drawn.
        """
        if not self.optimizer.calibration_period:
            return state
        _, args = self._arguments(state, keys, None, check_rate=False)
        if self._feed is not None:
            now = self._feed.calibration(_seeds(keys), *ages(args[0]))
            return self._calibrate(args[0], now, *args[1:])
        state, keys, _, data = args
        return self._call("calibrate", self.trace_calibrate, state, keys, data)

    def select(self, state: BilevelState, parents: Any) -> BilevelState:
        """Return a population whose slot i is a copy of slot `parents[i]`: a gather on the device.

        Raises:
          ValueError: if `parents` is not one index for each slot, all in range.
        """
        _check_slots("state", state, self.slots)
        parents = np.asarray(parents)
        wanted = f"parents must be {self.slots} integers, each a slot from 0 to {self.slots - 1}"
        if parents.shape != (self.slots,) or not np.issubdtype(parents.dtype, np.integer):
            raise ValueError(f"{wanted}; got {parents.dtype} of shape {parents.shape}")
        if ((parents < 0) | (parents >= self.slots)).any():
            raise ValueError(f"{wanted}; got {parents[(parents < 0) | (parents >= self.slots)][0]}")
        parents = jax.device_put(parents.astype(np.int32), self._replicated())
        return self._call("select", self._gather, self.place_state(state), parents)

    def resolve(
        self, state: BilevelState | None = None, lr_hyper: Any = None, measure: bool = True
    ) -> Batching:
        """Return the layout, found now where `batching` is "auto" and nothing has run yet.

        Args:
          state: what to measure on; by default a first state, made if there is need to measure.
          lr_hyper: as in `run`.
          measure: whether to compile and measure where nothing else tells; "auto" is returned
            where it would be needed and is not allowed.
        """
        if self._layout is None:

            def arguments(state: BilevelState) -> tuple[Any, ...]:
                keys = jax.random.split(jax.random.key(0), self.slots)
                return self._whole(self._arguments(state, keys, lr_hyper)[1])

            schedule, rate = schedule_and_rate(lr_hyper)
            if state is None:
                shapes = self._argument_shapes(self.slots, self.rates(rate))
                made = (lambda: arguments(self.init(jax.random.key(0)))) if measure else None
                self._layout = self._calibrated(schedule, *shapes, measured=made)
            else:
                args = arguments(state)
                measured = (lambda: args) if measure else None
                self._layout = self._calibrated(schedule, *args, measured=measured)
        return self.batching

    def compile(self, state: BilevelState, steps: int, lr_hyper: Any = None) -> Compiled:
        """Return the program of `run`, compiled now; `Compiled.serialize` makes bytes of it."""
        check_count("steps", steps)
        keys = jax.random.split(jax.random.key(0), self.slots)
        schedule, args = self._arguments(state, keys, lr_hyper)
        return self._program(steps, schedule, *self._whole(args))

    def load(self, blob: bytes, state: BilevelState, steps: int, lr_hyper: Any = None) -> Compiled:
        """Use a program that another process compiled; see `parallel.compiled.load`.

        Never load bytes from an untrusted place. `batching` must be given, not "auto": the layout
        is part of the program.
        """
        check_count("steps", steps)
        if self._layout is None:
            raise ValueError('load needs the layout: pass the other Population\'s "batching"')
        keys = jax.random.split(jax.random.key(0), self.slots)
        schedule, args = self._arguments(state, keys, lr_hyper)
        function, name = self._function(steps, schedule, self._layout), str(self._layout.name)
        args = self._whole(args)
        program = compiled.load(blob, function, *args, layout=name)
        what = ("run", steps, schedule) if self._feed is None else ("chunk", schedule)
        self._programs[_program_key((what, name), args)] = program
        return program

    # --- what is traced: parts for a program of one's own, such as a sweep's --------------------

    def trace_data(self, key: jax.Array) -> PyTree:
        """Return what `problem.data` makes; with a leading slot axis from a key for each slot."""
        make = self.problem.start_data
        return jax.vmap(make)(key) if self._per_slot_data else make(key)

    def trace_init(
        self, keys: jax.Array, given: dict[str, Any], data: PyTree, pairs: PyTree = None
    ) -> BilevelState:
        """Return every slot's first state.

        `given` may hold `params` and `hyperparams`; `pairs` are of `first_pairs`, where the
        optimizer remembers a batch of the host.
        """
        data_axis = 0 if self._per_slot_data else None
        pairs_axis = 0 if pairs is not None and self.own_batches else None
        axes = (0, 0, data_axis, pairs_axis)
        first = jax.vmap(self._start, in_axes=axes)(keys, given, data, self._some_pair(pairs))
        return self.laid(first)

    def trace_begin(
        self,
        state: BilevelState,
        keys: jax.Array,
        data: PyTree,
        fresh: jax.Array,
        change: Callable[[PyTree, Any], PyTree],
        changes: Any,
        pairs: PyTree = None,
    ) -> BilevelState:
        """Return the state with new trials in some slots, in the places of those before.

        Args:
          state: of all slots.
          keys: one a slot.
          data: from `trace_data`.
          fresh: boolean, `(slots,)`: where a trial starts.
          change: `(hyperparameters, changes)` of a slot to its hyperparameters, of new trials too:
            an optimizer's state may be made from them.
          changes: with a leading slot axis.
          pairs: as in `trace_init`.
        """

        def one(
            state: BilevelState,
            key: jax.Array,
            rates: Any,
            data: PyTree,
            fresh: jax.Array,
            changes: Any,
            pair: PyTree,
        ) -> tuple[BilevelState, dict[str, Any]]:
            del rates
            pair = self._some_pair(pair)

            def start(state: BilevelState) -> BilevelState:
                del state
                drawn = jax.tree.map(as_array, self.problem.first(key).hyperparams)
                return self._start(key, {"hyperparams": change(drawn, changes)}, data, pair)

            state = state.update(hyperparams=change(state.hyperparams, changes))
            return jax.lax.cond(fresh, start, lambda same: same, state), {}

        layout = dataclasses.replace(self._layout or Layout("map"), within="map")
        begin = self._advance(one, layout, True, True, pairs is not None and self.own_batches)
        return begin(state, keys, None, data, fresh, changes, pairs)[0]

    def _start(
        self, key: jax.Array, given: dict[str, Any], data: PyTree, pair: PyTree
    ) -> BilevelState:
        """Return a slot's first state."""
        flags = {"trial_step": jnp.int32(0), "diverged_at": jnp.int32(0)}
        return self._trial.start(key, data, given, pair).update(metadata=flags)

    def _some_pair(self, pairs: PyTree) -> PyTree:
        """Return the pairs; where none are needed, one whose shapes tell the losses' metrics."""
        if pairs is not None or self._source is None:
            return pairs
        with jax.ensure_compile_time_eval():  # the user's reader may compute with JAX
            return self._source.form.on_device(self._source.form.pair, jnp.asarray)

    def trace_run(
        self, steps: int, schedule: Callable[[Any], Any] | None = None
    ) -> Callable[..., Any]:
        """Return the function of a generation, `(state, keys, rates, data) -> (state, rows)`.

        `rates` are of `Rates`, `(slots,)` each; a schedule, of the trial's step, is a factor on
        `lr_hyper`. The rows are the metrics as they are, and under "stopped" where a slot has
        diverged.

        Raises:
          ValueError: if the layout is "auto" and not measured yet; see `resolve`.
        """
        if self._layout is None:
            raise ValueError('batching is "auto": call resolve first')
        return self._generation(steps, schedule, self._layout)

    def rates(self, lr_hyper: Any = None) -> Rates:
        """Return the numbers of every slot that are no part of the state, on the host."""
        return self._rates(lr_hyper, self.slots)

    def _rates(self, lr_hyper: Any, slots: int) -> Rates:
        width = np.dtype(jnp.result_type(float))
        episodes = self._trial.timetable.episode_length is not None
        given = Rates(lr_hyper, self._lr_reptile if episodes else None)
        return jax.tree.map(lambda x: np.broadcast_to(np.asarray(x, width), (slots,)), given)

    def trace_measure(self, state: BilevelState, data: PyTree) -> dict[str, Any]:
        """Return `Problem.metrics` of every slot, with a leading slot axis."""
        if self.problem.metrics is None:
            return {}

        def one(state: BilevelState, key: Any, rates: Any, data: PyTree) -> dict[str, Any]:
            del key, rates
            return self._trial.measure(state, data)

        layout = self._layout or Layout("map")
        return self._over(one, layout)(state, None, None, data)

    def trace_calibrate(self, state: BilevelState, keys: jax.Array, data: PyTree) -> BilevelState:
        """Return the state with each slot's own settings estimated anew; see `calibrate`."""

        def one(state: BilevelState, key: jax.Array, rates: Any, data: PyTree) -> BilevelState:
            del rates
            new = self._trial.calibrate(state, key, state.metadata["trial_step"], data)
            return jax.tree.map(lambda a, b: jnp.where(chunks.running(state), b, a), state, new)

        return self._over(one, Layout("map"))(state, keys, None, data)

    def trace_chunk(self, schedule: Callable[[Any], Any] | None, apart: bool) -> Callable[..., Any]:
        """Return the function of a chunk on host data; see `chunks.chunk`.

        `(state, keys, rates, data, host, n) -> (state, rows)`, with slot axes: of `host` where the
        slots' batches are `apart`, and of all but the number `n`; the rows are `(slots, capacity)`.
        """
        if self._layout is None:
            raise ValueError('batching is "auto": call resolve first')
        trial = dataclasses.replace(self._trial, schedule=schedule)
        return self._advance(chunks.chunk(trial), self._layout, apart, False)

    def trace_chunk_calibration(self, apart: bool) -> Callable[..., Any]:
        """Return the function of a calibration on host data; see `chunks.calibration`."""
        return self._over(chunks.calibration(self._trial), Layout("map"), apart, True)

    def _generation(
        self, steps: int, schedule: Callable[[Any], Any] | None, layout: Layout
    ) -> Callable[..., Any]:
        trial = dataclasses.replace(self._trial, schedule=schedule)

        def one(state: BilevelState, key: jax.Array, rates: Rates, data: PyTree) -> Any:
            def body(state: BilevelState, _: None) -> Any:
                return chunks.guarded_step(trial, state, key, rates, data, None)

            return jax.lax.scan(body, state, length=steps)

        slots = self._advance(one, layout)

        def generation(*args: Any) -> Any:
            state, rows = slots(*args)
            state = self.laid(state) if self._by_compiler else state
            return state, {name: row.T for name, row in rows.items()}

        return generation

    def _over(self, one: Callable[..., Any], layout: Layout, *more: bool) -> Callable[..., Any]:
        """Return `one` over all slots in this layout, and over the mesh's devices.

        State, keys and rates have an axis of slots; `more` says of arguments after the data whether
        they have one.
        """
        return self._divided(layout.over_slots, one, *more)

    def _advance(self, one: Callable[..., Any], layout: Layout, *more: bool) -> Callable[..., Any]:
        """Return the same of a function that returns a slot's next state, and its rows."""
        return self._divided(layout.advance_slots, one, *more)

    def _divided(self, over: Any, one: Callable[..., Any], *more: bool) -> Callable[..., Any]:
        axes = (True, True, True, self._per_slot_data, *more)

        def slots(*args: Any) -> Any:
            def each(*own: Any) -> Any:
                mine = iter(own)
                given = zip(args, axes, strict=True)
                return one(*(next(mine) if axis else shared for shared, axis in given))

            stacked = [arg for arg, axis in zip(args, axes, strict=True) if axis]
            return over(each, args[0].step.shape[0])(*stacked)

        if self._placement is None or (self._by_compiler and not self._placement.sharded):
            return slots
        trial = self._placement.slots.spec
        specs = tuple(trial if axis else P() for axis in axes)
        # The compiler divides what a trial computes, along all axes but that of the slots.
        own = {"axis_names": {"trial"}} if self._by_compiler else {}
        # Unchecked, so that a user's loop may start from a constant; see `collectives`.
        return jax.shard_map(
            slots, mesh=self.mesh, in_specs=specs, out_specs=trial, check_vma=False, **own
        )

    def _gather(self, state: BilevelState, parents: jax.Array) -> BilevelState:
        return self.laid(jax.tree.map(lambda x: x[parents], state))

    # --- host data ------------------------------------------------------------------------------

    def new_feed(self) -> HostFeed:
        """Return what reads `Problem.batches` for the slots, and places it on the devices."""
        assert self._source is not None
        put_both = (self.place_shared, self.place)
        return HostFeed(self._source, self._trial.timetable, axis=True, put=put_both)

    @property
    def own_batches(self) -> bool:
        """Whether every slot has a stream of host batches of its own."""
        return self._source is not None and self._source.own

    def first_pair_shapes(self, slots: int) -> PyTree:
        """Return its shapes; None where `trace_init` takes none."""
        if self._source is None or not self.optimizer.remembers_batch:
            return None
        return self._source.form.shapes(*([slots] if self.own_batches else []))

    def chunk_arguments(self, n: int) -> tuple[PyTree, jax.Array]:
        """Return what a chunk takes after the data, on the devices: an example."""
        assert self._feed is not None
        host = self._feed.example(self.slots if self.own_batches else None)
        return host, self.place_shared(np.int32(n))

    def _run_chunks(
        self, steps: int, schedule: Any, seeds: np.ndarray, state: BilevelState, *args: Any
    ) -> tuple[BilevelState, dict[str, np.ndarray]]:
        assert self._feed is not None
        layout = self._resolved(schedule, *self._whole((state, *args)))

        def take(state: BilevelState, segment: Segment, n: np.int32) -> Any:
            function = self.trace_chunk(schedule, segment.apart)
            whole = (state, *args, segment.host, self.place_shared(n))
            return self._call(("chunk", schedule), function, *whole, layout=str(layout.name))

        generation = chunks.segments(self._feed, seeds, *ages(state), steps)
        return chunks.drive(state, generation, lambda s, now: self._calibrate(s, now, *args), take)

    def _calibrate(self, state: BilevelState, now: Segment, *args: Any) -> BilevelState:
        function = self.trace_chunk_calibration(now.apart)
        whole = (state, *args, now.host, self.place(now.due))
        return self._call("calibrate", function, *whole)

    # --- programs -------------------------------------------------------------------------------

    def _program(self, steps: int, schedule: Any, *args: Any) -> Compiled:
        layout = self._resolved(schedule, *args)
        return self._generation_program(steps, schedule, layout, *args)

    def _call(self, name: Any, function: Callable[..., Any], *args: Any, layout: str = "") -> Any:
        return self._compiled(name, function, args, layout).run(function, *args)

    def _compiled(
        self, name: Any, function: Callable[..., Any], args: tuple[Any, ...], layout: str
    ) -> Compiled:
        key = _program_key((name, layout), args)
        if key not in self._programs:
            self._programs[key] = compiled.compile(function, *args, layout=layout)
        return self._programs[key]

    def _generation_program(
        self, steps: int, schedule: Any, layout: Layout, *args: Any
    ) -> Compiled:
        name = ("run", steps, schedule) if self._feed is None else ("chunk", schedule)
        function = self._function(steps, schedule, layout)
        return self._compiled(name, function, args, str(layout.name))

    def _function(self, steps: int, schedule: Any, layout: Layout) -> Callable[..., Any]:
        """Return a generation; on host data a chunk of one, which takes any number of steps."""
        if self._feed is None:
            return self._generation(steps, schedule, layout)
        trial = dataclasses.replace(self._trial, schedule=schedule)
        return self._advance(chunks.chunk(trial), layout, self.own_batches, False)

    def _whole(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return all arguments of `_function`."""
        return args if self._feed is None else (*args, *self.chunk_arguments(CALIBRATION_STEPS))

    def _resolved(self, schedule: Any, *args: Any) -> Layout:
        """Return the layout, found now on these arrays where it is not known."""
        self._layout = self._layout or self._calibrated(schedule, *args, measured=lambda: args)
        assert self._layout is not None
        return self._layout

    def _calibrated(
        self, schedule: Any, *args: Any, measured: Callable[[], tuple[Any, ...]] | None
    ) -> Layout | None:
        """Return the fastest layout: known, or measured now and remembered.

        Args:
          schedule: of the step size of λ.
          *args: of `_function`; shapes are enough.
          measured: gives arrays to measure on; without it None is returned where that is needed.
        """
        found = self._candidates(self.slots, schedule, *args)
        if len(found) == 1:
            return found[0]
        first = self._lowered(schedule, found[0], *args)
        alone = jax.process_count() == 1  # all processes of a job must come to the same answer
        known = _FASTEST.get(first.key) or (layout_cache.recall(first.key) if alone else None)
        for layout in found:
            if str(layout.name) == known:
                return layout
        if measured is None:
            return None
        lowered = [first, *(self._lowered(schedule, layout, *args) for layout in found[1:])]
        made = compiled.together(program.compile for program in lowered)
        programs = {x: program for x, (program, _) in zip(found, made, strict=True)}
        limit = fit.memory_limit(self.mesh)
        fitting = {x: program for x, program in programs.items() if program.bytes_needed() <= limit}
        with jax.disable_jit(False):
            best = layouts.fastest(fitting or {found[0]: programs[found[0]]}, *measured())
        _FASTEST[first.key] = str(best.name)
        if alone:
            layout_cache.remember(first.key, str(best.name))
        return best

    def _lowered(self, schedule: Any, layout: Layout, *args: Any) -> compiled.Lowered:
        function = self._function(CALIBRATION_STEPS, schedule, layout)
        return compiled.lower(function, *args, layout=str(layout.name))

    def _all_layouts(self, slots: int) -> list[Layout]:
        """Return those that fit: one trial at a time where it is divided, which is for memory."""
        found = layouts.candidates(slots, self.mesh)
        return found[:1] if self._by_compiler else found

    def _candidates(self, slots: int, schedule: Any, *args: Any) -> list[Layout]:
        """Return the layouts that "auto" chooses from, the one that needs the most memory last.

        On a CPU a model of the step chooses one. `vmap` over the kernels of trials groups their
        convolutions, which a CPU takes one after another: there it is "map".
        """
        found = self._all_layouts(slots)
        if compiled.devices_of(args)[0].platform not in layouts.MODELLED or len(found) == 1:
            return found
        function = self._function(CALIBRATION_STEPS, schedule, found[-1])
        program = jax.make_jaxpr(function)(*args)
        if convolutions.grouped(program):
            return found[:1]
        own = slots // found[-1].shards
        slot_bytes = working_set.slot_bytes(program, args[0], slots, own)
        return [layouts.likeliest(found, slots, slot_bytes)]

    def _arguments(
        self, state: BilevelState, keys: Any, lr_hyper: Any, check_rate: bool = True
    ) -> tuple[Callable[[Any], Any] | None, tuple[Any, ...]]:
        """Return the schedule, if `lr_hyper` is one, and the arguments of a generation."""
        if check_rate:
            losses = (self.problem.train_loss, self.problem.val_loss)
            self.optimizer.check_step(*losses, lr_hyper)
        _check_slots("state", state, self.slots)
        episodes = set[str]() if self._trial.timetable.episode_length is None else {PHI}
        if not {"trial_step", "diverged_at"} | episodes <= set(state.metadata):
            raise ValueError("state must come from the population's init, run or select")
        if not isinstance(keys, jax.Array) or not is_key(keys):
            raise TypeError(f"keys must be an array of keys from jax.random.key, got {keys!r}")
        if keys.shape != (self.slots,):
            raise ValueError(f"keys must have shape ({self.slots},), one a slot; got {keys.shape}")
        schedule, rate = schedule_and_rate(lr_hyper)
        if rate is not None:
            if np.asarray(lr_hyper).dtype.kind not in "fiu":
                raise TypeError(f"lr_hyper must be a number or one for each slot, got {lr_hyper!r}")
            if np.shape(lr_hyper) not in ((), (self.slots,)):
                raise ValueError(
                    f"lr_hyper must be a number or {self.slots}, one a slot; got "
                    f"{np.shape(lr_hyper)}"
                )
        placed = self.place_state(prepare(state))
        return schedule, (placed, *self.place((keys, self.rates(rate))), self.data)

    def _needs(self, slots: int, batching: Batching, steps: int) -> int:
        """Return the bytes on one device of a population of so many slots; nothing is allocated."""
        layout = layouts.parse(batching, slots, self.mesh)
        if self._per_slot_data:
            raise ValueError('slots="fit" needs one data_key, shared by all slots')
        self._layout = layout or self._all_layouts(slots)[-1]
        rates = self._rates(1.0 if self.optimizer.outer_optimizer is None else None, slots)
        args = self._argument_shapes(slots, rates)
        ahead = 0
        if self._feed is not None:
            # The next stack is sent while the present one is in use.
            lanes = slots if self.own_batches else None
            parts = 1 if lanes is None else self._layout.shards
            capacity = self._feed.capacity(lanes)
            ahead = capacity * self._feed.source.form.nbytes * (lanes or 1) // parts
        layout = layout or self._candidates(slots, None, *args)[-1]
        function = self._function(steps, None, layout)
        program = compiled.compile(function, *args, layout=str(layout.name))
        return program.bytes_needed() + ahead

    def _argument_shapes(self, slots: int, rates: Rates) -> tuple[Any, ...]:
        """Return all arguments of `_function` as shapes, where they will lie."""
        data = jax.eval_shape(self.trace_data, self._data_key)
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), slots))
        state = jax.eval_shape(self.trace_init, keys, {}, data, self.first_pair_shapes(slots))
        placed = self.placed
        args = (self.placed_state(state), *placed((keys, rates)))
        args = (*args, placed(data, shared=not self._per_slot_data))
        if self._feed is None:
            return args
        lanes = [slots] if self.own_batches else []
        host = self._feed.source.form.shapes(*lanes, self._feed.capacity(slots if lanes else None))
        return (*args, placed(host, shared=not lanes), placed(np.int32(0), shared=True))

    # --- placement ------------------------------------------------------------------------------

    @property
    def _per_slot_data(self) -> bool:
        return self._given_data_key is not None and jnp.ndim(self._given_data_key) > 0

    @property
    def _by_compiler(self) -> bool:
        """Whether the compiler divides what a trial computes, and its arrays by rules."""
        return isinstance(self.optimizer, DataParallel) and self.optimizer.backend == "auto"

    @property
    def _placement(self) -> Placement | None:
        if self.mesh is None:
            return None
        sharded = self.mesh.shape.get("trial", 1) > 1
        sharded = sharded if self._layout is None else self._layout.sharded
        rules = self.optimizer.rules if isinstance(self.optimizer, DataParallel) else None
        return Placement(self.mesh, sharded, rules)

    @property
    def sharding(self) -> Any:
        """Return where arrays with a slot axis lie; None without a mesh."""
        return None if self._placement is None else self._placement.slots

    def _replicated(self) -> Any:
        return None if self._placement is None else self._placement.shared

    def sharding_of(self, path: str, leaf: Any) -> Any:
        """Return where an array of the state lies, by its path; None without a mesh."""
        return None if self._placement is None else self._placement.of_leaf(path, leaf)

    def laid(self, state: PyTree) -> PyTree:
        """Return a state that is traced, laid out as it is placed."""
        if self._placement is None:
            return state
        return jax.lax.with_sharding_constraint(state, self._placement.of_state(state))

    def placed(self, tree: PyTree, shared: bool = False) -> PyTree:
        """Return the shapes of arrays as `place` and `place_shared` lay them."""
        sharding = self._replicated() if shared else self.sharding
        return jax.tree.map(lambda x: _shape(x, sharding), tree)

    def placed_state(self, state: PyTree) -> PyTree:
        """Return the shapes of a state's arrays as `place_state` lays them."""
        if self._placement is None:
            return self.placed(state)
        return jax.tree.map(_shape, state, self._placement.of_state(state))

    def place_state(self, state: PyTree, below: str = "") -> PyTree:
        """Return a state, or the part of one with a path, where the population's lies."""
        if self._placement is None or self._placement.rules is None:
            return self.place(state)
        return jax.tree.map(put, state, self._placement.of_state(state, below))

    def place(self, tree: PyTree) -> PyTree:
        """Return arrays with a slot axis where the population's lie."""
        return put(tree, self.sharding)

    def place_shared(self, tree: PyTree) -> PyTree:
        """Return arrays that all slots share, on all devices."""
        return put(tree, self._replicated())


_FASTEST: dict[compiled.StepKey, str] = {}
"""The names of the layouts that were measured in this process."""


def ages(state: BilevelState) -> tuple[np.ndarray, np.ndarray]:
    """Return the number of each slot's next step, and which slots have not diverged."""
    flags = [to_host(state.metadata[name]) for name in ("trial_step", "diverged_at")]
    return flags[0], flags[1] == 0


def _seeds(keys: jax.Array) -> np.ndarray:
    return to_host(jax.random.key_data(keys))


def _shape(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    weak = getattr(x, "weak_type", False)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding, weak_type=weak)


def _program_key(name: Any, args: tuple[Any, ...]) -> Any:
    leaves, structure = jax.tree.flatten(args)
    return name, structure, tuple((x.shape, x.dtype, x.sharding) for x in leaves)


def _check_slots(name: str, tree: PyTree, slots: int) -> None:
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if np.shape(leaf)[:1] != (slots,):
            where = jax.tree_util.keystr(path) or "root"
            raise ValueError(
                f"{name} must have a leading axis of {slots} slots; leaf {where} has shape "
                f"{np.shape(leaf)}"
            )
