"""One combination of a sweep's choices: a generation of its shards as one compiled program."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Executor, Future, wait
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_flatten_with_path

from gradhpo.checkpoints import Saved
from gradhpo.checksums import of_arrays
from gradhpo.cluster import columns as names
from gradhpo.cluster import importing
from gradhpo.cluster.columns import DIVERGED, RESERVED
from gradhpo.cluster.discrete import Integer
from gradhpo.cluster.divided import DividedState
from gradhpo.cluster.failures import SweepError
from gradhpo.cluster.host_turns import DONATING, STATE, HostTurns
from gradhpo.cluster.orders import Order, Prepared, Spec
from gradhpo.cluster.space import said
from gradhpo.cluster.storage import Storage
from gradhpo.cluster.timings import Timings
from gradhpo.cluster.validation import with_validation
from gradhpo.errors import check_hashable
from gradhpo.host import check_once
from gradhpo.optimizer import BilevelOptimizer
from gradhpo.parallel import (
    DataParallel,
    Population,
    by_path,
    compiled,
    data_parallel,
    make_mesh,
)
from gradhpo.parallel.mesh import to_host
from gradhpo.problem import Problem
from gradhpo.state import BilevelState, PyTree, is_key
from gradhpo.task import step_metrics
from gradhpo.trial import Rates

Arrays = dict[str, Any]
"""Arrays of a state by path, `.params['w']`, each with a leading slot axis."""
Rows = dict[str, np.ndarray]
"""The same of some slots, on the host."""
Programs = dict[str, tuple[compiled.Compiled, compiled.Counts]]
"""By name, programs, and what it took to get them."""


class Variant:
    """One combination of the space's choices: its population and programs, on these devices."""

    def __init__(self, spec: Spec, arguments: Mapping[str, Any], data: PyTree) -> None:
        self.spec, self._space = spec, spec.space.of(arguments)
        self.settings: Mapping[str, Any] = self._space.hyperparams
        self._timings = Timings()
        with self._timings("problem"):
            problem, optimizer = build(spec, arguments, data)
            if (validation := spec.validation) is not None:
                loaded = importing.load(validation) if isinstance(validation, str) else validation
                problem = with_validation(problem, loaded)
        check_once(problem.batches)
        mesh = None if spec.mesh is None else _mesh(spec.mesh)
        if mesh is not None and spec.rules is not None:
            rules = by_path(mesh, spec.rules)
            if isinstance(optimizer, DataParallel):
                raise ValueError("rules need an optimizer that is not data_parallel yet: give mesh")
            optimizer = data_parallel(optimizer, mesh, backend="auto", rules=rules)
        elif mesh is not None and spec.mesh is not None and spec.mesh.get("data", 1) > 1:
            optimizer = data_parallel(optimizer, mesh)
        self.population = Population(
            problem, optimizer, spec.slots, mesh, spec.batching,
            episode_length=spec.episode_length, lr_reptile=spec.lr_reptile,
            episode_init=spec.episode_init,
        )  # fmt: skip
        schedule = spec.lr_schedule if self._space.lr_hyper is not None else None
        self.schedule = importing.load(schedule) if isinstance(schedule, str) else schedule
        if schedule is not None:
            check_hashable("lr_schedule", self.schedule)
        self.optimizer = optimizer
        self.programs: dict[str, Any] = {}
        self._lowered: dict[str, compiled.Lowered] = {}
        self._ahead: Future[Programs] | None = None
        """The programs, where they are compiled beside other work."""
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), spec.slots))
        self._data_shapes = jax.eval_shape(self._make_data, np.uint32(0))
        pairs = self.population.first_pair_shapes(spec.slots)
        init = self.population.trace_init
        self._template = jax.eval_shape(init, keys, {}, self._data_shapes, pairs)
        self._check_settings(said(arguments))
        self._check_compared()
        shapes, lie = self._shapes(), self._lie()
        self.divided = None if spec.rules is None else DividedState(shapes, lie)
        """What makes, writes and reads the state where a trial is divided over devices."""
        self.data: PyTree = None
        self._first: Any = None
        self.host = HostTurns(self, spec.steps, spec.record) if problem.batch is None else None

    def trace(self, measure: bool = False) -> bool:
        """Trace the programs, in a layout that is given or known, or else measured now.

        Returns:
          Whether that is done: not where a layout would have to be measured, and may not be.
        """
        if not self._lowered:
            with self._timings("layouts"):
                rate = 1.0 if self._takes_rate else None
                if self.population.resolve(lr_hyper=rate, measure=measure) == "auto":
                    return False
            with self._timings("tracing"):
                made = {name: self._lower(name, *what) for name, what in self._parts().items()}
            self._lowered = made
        return True

    def begin(self, pool: Executor) -> None:
        """Compile the programs, which are traced, beside other work; `prepare` waits for them."""
        if self._ahead is None:
            self._ahead = pool.submit(self._made, None)

    def settle(self) -> None:
        """Wait until nothing is compiled beside other work; whether that went well is for later."""
        if self._ahead is not None:
            wait([self._ahead])

    def prepare(self, blobs: Mapping[str, bytes] | None) -> Prepared:
        """Compile the programs, or load them from what another worker compiled."""
        if self._lowered and self._ahead is None:
            self._timings = Timings()  # that was while another compiled
        timed, notes, calibrated = self._timings, list[str](), compiled.Counts()
        if not self._lowered:
            start = compiled.counts()
            self.trace(measure=True)
            calibrated = compiled.counts().since(start)
        with _noted(notes):
            made = self._made(blobs) if self._ahead is None else self._ahead.result()
        self.programs |= {name: program for name, (program, _) in made.items()}
        counts = {name: done for name, (_, done) in made.items()}
        self._lowered, self._ahead = {}, None
        with timed("data"):
            identity = self._place_data(checked=blobs is None)
        turn = counts.pop("turn")
        shared = None
        if blobs is None and jax.process_count() == 1:
            shared = {n: p.serialize() for n, p in self.programs.items() if p.shareable}
            if self.programs["turn"].calls_python:
                reason = "a program that calls back into Python cannot be serialized"
                notes.append(f"{reason}; every worker compiles it")
        return Prepared(
            variant=-1,
            batching=self.population.batching,
            key=dataclasses.asdict(self.programs["turn"].key),
            blobs=shared,
            compiles=turn.compiles,
            loads=turn.loads,
            restores=turn.restores,
            small_compiles=sum(made.compiles for made in counts.values()),
            calibration_compiles=calibrated.compiles,
            warnings=notes,
            data=identity,
            seconds=tuple(timed.seconds.items()),
        )

    def let_go(self) -> None:
        """Let the process forget the programs, which nobody runs any more."""
        self.settle()
        compiled.forget(self.programs.values())

    def _made(self, blobs: Mapping[str, bytes] | None) -> Programs:
        jobs = [self._job(program, name, blobs) for name, program in self._lowered.items()]
        with self._timings("loading" if blobs else "compiling"):
            return dict(zip(self._lowered, compiled.together(jobs), strict=True))

    def _place_data(self, checked: bool) -> str:
        """Make what all trials share; return a checksum of it, where that is asked for."""
        data = self.programs["data"].run(self._make_data, np.uint32(self.spec.seed))
        # Before it is placed: the same bytes in every layout.
        identity = of_arrays(data) if checked else ""
        self.data = self.population.place_shared(data)
        return identity

    def _parts(self) -> dict[str, tuple[Any, tuple[Any, ...]]]:
        """Return the programs: by name, functions and arguments, of which shapes are enough."""
        lie, some = self._lie(), _one(0)
        state = {
            name: jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=lie[name])
            for name, like in self._shapes().items()
        }
        example = self._example(state, self.population.rates(1.0 if self._takes_rate else None))
        parts: dict[str, tuple[Any, tuple[Any, ...]]] = {
            # The longest to compile comes first.
            "turn": (self._turn, example) if self.host is None else self.host.turn(example),
            "take": (self._take, (state, some)),
            "put": (self._put, (state, some, self._zero_row())),
            "select": (self._select, (state, np.zeros(self.spec.slots, np.int32))),
            "data": (self._make_data, (np.uint32(self.spec.seed),)),
        }
        return parts if self.host is None else {**parts, **self.host.parts(example)}

    def _lower(self, name: str, function: Any, args: tuple[Any, ...]) -> compiled.Lowered:
        donate = STATE if name in DONATING else ()
        return compiled.lower(function, *args, layout=str(self.population.batching), donate=donate)

    def _job(
        self, lowered: compiled.Lowered, name: str, blobs: Mapping[str, bytes] | None
    ) -> Callable[[], compiled.Compiled]:
        """Return what loads a program, if there are bytes of it, or compiles it."""
        if blobs is None or name not in blobs:
            return lowered.compile
        return functools.partial(lowered.load, blobs[name])

    def turn(self, state: Arrays, order: Order) -> tuple[Arrays, dict[str, np.ndarray]]:
        """Take one generation: new trials, changed settings, and the steps.

        The state's buffers become the new one's, and the state is gone.
        """
        place = self.population.place
        per_slot = self._per_slot(order)
        rates = self.population.rates(order.lr_hyper if self._takes_rate else None)
        args = (place(per_slot), place(rates), np.uint32(self.spec.seed), self.data)
        if self.host is None:
            state, columns = self.programs["turn"].run(self._turn, state, *args)
        else:
            state, columns = self.host.run(order.shard, order.fresh, state, *args)
        columns = {name: np.array(to_host(column)) for name, column in columns.items()}
        for name, column in columns.items():
            kept = name.startswith((names.HYPERPARAMS, names.CURVE + names.SEPARATOR))
            if name != DIVERGED and not kept:
                column[columns[DIVERGED] > 0] = np.nan
        return state, columns

    def hyperparams_at(self, state: Arrays, order: Order) -> PyTree:
        """Return the λ that the first step of a generation would be taken with, in slot 0."""
        pairs = jax.tree.map(
            lambda shape: jnp.zeros(shape.shape, shape.dtype),
            self.population.first_pair_shapes(self.spec.slots),
        )

        def first(state: Arrays, per_slot: Arrays, seed: jax.Array) -> PyTree:
            keys = self.trial_keys(per_slot["trials"], seed)
            whole = self.begun(state, per_slot, keys, self.data, pairs)
            return jax.tree.map(lambda leaf: leaf[0], whole.hyperparams)

        if self._first is None:
            self._first = jax.jit(first)
        per_slot = self.population.place(self._per_slot(order))
        return jax.device_get(self._first(state, per_slot, np.uint32(self.spec.seed)))

    def take(self, state: Arrays, slots: Sequence[int]) -> Rows:
        """Return the arrays of some slots, stacked in their order."""
        parts = [self.row(state, slot) for slot in slots]
        return {n: np.concatenate([to_host(part[n]) for part in parts]) for n in state}

    def row(self, state: Arrays, slot: int) -> Arrays:
        """Return the arrays of one slot, on the devices."""
        return self.programs["take"].run(self._take, state, _one(slot))

    def put(self, state: Arrays, slots: Sequence[int], rows: Rows) -> Arrays:
        """Return the state with the arrays of some slots replaced by stacked ones, in its place."""
        for i, slot in enumerate(slots):
            state = self.put_row(state, slot, {name: rows[name][i : i + 1] for name in state})
        return state

    def put_row(self, state: Arrays, slot: int, row: Arrays) -> Arrays:
        """Return the same with those of one slot, of the host or on the devices."""
        return self.programs["put"].run(self._put, state, _one(slot), row)

    def select(self, state: Arrays, parents: np.ndarray) -> Arrays:
        """Return the state whose slot i is a copy of slot `parents[i]`."""
        return self.programs["select"].run(self._select, state, parents.astype(np.int32))

    def zeros(self) -> Arrays:
        """Return the state before the first generation, in which every trial is new."""
        if self.divided is not None:
            return self.divided.zeros()
        return self.place({n: np.zeros(s.shape, s.dtype) for n, s in self._shapes().items()})

    def place(self, arrays: Mapping[str, np.ndarray]) -> Arrays:
        """Return arrays of the host on the devices, as a state.

        Raises:
          ValueError: if they are not this variant's.
        """
        for name, shape in self._shapes().items():
            got = arrays.get(name)
            if got is None or got.shape != shape.shape or got.dtype != shape.dtype:
                found = "nothing" if got is None else f"{got.dtype}{list(got.shape)}"
                raise ValueError(
                    f"the checkpoint is of another problem or optimizer: {name} should be "
                    f"{shape.dtype}{list(shape.shape)}, found {found}"
                )
        return self.population.place(dict(arrays))

    def restore(self, storage: Storage, saved: Saved) -> tuple[Arrays, dict[str, Any]]:
        """Return a checkpoint's arrays on the devices, and what was remembered with them.

        Raises:
          DamagedFile: if it is damaged.
          ValueError: if it is not this variant's.
        """
        if self.divided is not None:
            return self.divided.restored(storage, saved)
        arrays, about = storage.load(saved)
        return self.place(arrays), about

    def _per_slot(self, order: Order) -> dict[str, Any]:
        changes = {n: _as_float32(order.changes.get(n), order) for n in self.settings}
        return {"trials": order.trials, "fresh": order.fresh, "changes": changes}

    def unflatten(self, row: Mapping[str, Any]) -> BilevelState:
        """Return one slot's arrays as the `BilevelState` that they were."""
        leaves, structure = tree_flatten_with_path(self._template)
        return structure.unflatten([row[keystr(path)] for path, _ in leaves])

    # --- what is traced -------------------------------------------------------------------------

    def _turn(
        self, state: Arrays, per_slot: Arrays, rates: Rates, seed: jax.Array, data: PyTree
    ) -> tuple[Arrays, Arrays]:
        keys = self.trial_keys(per_slot["trials"], seed)
        whole = self.begun(state, per_slot, keys, data)
        run = self.population.trace_run(self.spec.steps, self.schedule)
        whole, rows = run(whole, keys, rates, data)
        columns = {name: row[-1] for name, row in rows.items() if name != "stopped"}
        columns |= self.measured(whole, data)
        if self.spec.record is not None:
            columns |= names.curves_of(rows, self.spec.record, jnp.where)
        return self.packed(whole), columns

    def trial_keys(self, trials: jax.Array, seed: jax.Array) -> jax.Array:
        """Return each slot's key."""
        return jax.vmap(lambda trial: trial_key(seed, trial))(trials)

    def begun(
        self, state: Arrays, per_slot: Arrays, keys: jax.Array, data: PyTree, pairs: PyTree = None
    ) -> BilevelState:
        """Return the state with new trials started and settings changed; see `trace_begin`."""
        fresh, changes = per_slot["fresh"], per_slot["changes"]
        about = (self.unpacked(state), keys, data, fresh)
        return self.population.trace_begin(*about, self._changed, changes, pairs)

    def measured(self, whole: BilevelState, data: PyTree) -> Arrays:
        """Return the columns that come from the state after a generation."""
        columns: Arrays = {}
        for name, value in self.population.trace_measure(whole, data).items():
            free = names.is_free(name) and name not in step_metrics(whole.metadata)
            if value.ndim != 1 or not free:
                got = f"{name!r} of shape {value.shape[1:]}"
                raise ValueError(
                    "in a sweep Problem.metrics must return scalars, under names without | other "
                    f"than {', '.join(RESERVED)} and hyperparams.…; got {got}"
                )
            columns[name] = value.astype(float)
        for name, leaf in self._leaves(whole.hyperparams).items():
            columns[names.setting(name)] = leaf.reshape(leaf.shape[0], -1).mean(1)
        columns[DIVERGED] = whole.metadata[DIVERGED]
        return columns

    def _put(self, state: Arrays, slots: jax.Array, rows: Arrays) -> Arrays:
        return self._where_slots_lie({n: x.at[slots].set(rows[n]) for n, x in state.items()})

    def _select(self, state: Arrays, parents: jax.Array) -> Arrays:
        return self._where_slots_lie({name: leaf[parents] for name, leaf in state.items()})

    def _where_slots_lie(self, state: Arrays) -> Arrays:
        """Return the state laid out as it is placed, so that every program takes every other's."""
        if self.population.mesh is None:
            return state
        return jax.lax.with_sharding_constraint(state, self._lie())

    def _lie(self) -> dict[str, Any]:
        """Return where each array lies: None without a mesh."""
        leaves = tree_flatten_with_path(self._template)[0]
        of = self.population.sharding_of
        return {keystr(path): of(keystr(path), leaf) for path, leaf in leaves}

    def _take(self, state: Arrays, slots: jax.Array) -> Arrays:
        rows = {name: leaf[slots] for name, leaf in state.items()}
        return rows if self.divided is None else self.divided.row_laid(rows)

    def _changed(self, hyperparams: PyTree, changes: Arrays) -> PyTree:
        """Return a slot's hyperparameters after the scheduler's changes."""
        leaves, structure = tree_flatten_with_path(hyperparams)

        def changed(name: str, leaf: jax.Array) -> jax.Array:
            if name not in changes:
                return leaf
            mask, multiply, add = changes[name]
            low, high = self.settings[name].bounds
            moved = leaf * multiply.astype(leaf.dtype) + add.astype(leaf.dtype)
            return jnp.where(mask, jnp.clip(moved, low, high), leaf)

        return structure.unflatten([changed(dotted(path), leaf) for path, leaf in leaves])

    def _make_data(self, seed: jax.Array) -> PyTree:
        return self.population.trace_data(data_key(seed))

    def packed(self, state: BilevelState) -> Arrays:
        """Return a state's arrays by path, laid out as they are placed."""
        return self._where_slots_lie(self._pack(state))

    def _pack(self, state: BilevelState) -> Arrays:
        leaves = tree_flatten_with_path(state)[0]
        return {keystr(path): _plain(leaf) for path, leaf in leaves}

    def unpacked(self, arrays: Arrays) -> BilevelState:
        """Return the state that arrays are packed of."""
        leaves, structure = tree_flatten_with_path(self._template)
        made = [_typed(arrays[keystr(path)], like) for path, like in leaves]
        return structure.unflatten(made)

    # --- shapes ---------------------------------------------------------------------------------

    @property
    def _takes_rate(self) -> bool:
        return self.optimizer.outer_optimizer is None

    def _shapes(self) -> Arrays:
        return jax.eval_shape(self._pack, self._template)

    def _zero_row(self) -> Arrays:
        """Return an example of what `put_row` takes."""
        if self.divided is not None:
            return self.divided.row_example()
        return {n: np.zeros((1, *s.shape[1:]), s.dtype) for n, s in self._shapes().items()}

    def _example(self, state: Arrays, rates: Any) -> tuple[Any, ...]:
        n, place = self.spec.slots, self.population.place
        none = np.zeros(n, np.float32)
        per_slot = {
            "trials": np.zeros(n, np.uint32),
            "fresh": np.ones(n, bool),
            "changes": {name: (np.zeros(n, bool), none, none) for name in self.settings},
        }
        data = self.population.placed(self._data_shapes, shared=True)
        return state, place(per_slot), place(rates), np.uint32(self.spec.seed), data

    def _leaves(self, hyperparams: PyTree) -> Arrays:
        leaves = tree_flatten_with_path(hyperparams)[0]
        return {dotted(path): leaf for path, leaf in leaves if dotted(path) in self.settings}

    def _check_settings(self, combination: str) -> None:
        of = f" for {combination}" if combination else ""
        leaves = tree_flatten_with_path(self._template.hyperparams)[0]
        there = {dotted(path): leaf.dtype for path, leaf in leaves}
        for name, kind in self.settings.items():
            if name not in there:
                raise ValueError(
                    f"space.hyperparams has {name!r}; the problem's hyperparameters{of} are "
                    f"{', '.join(map(repr, list(there)[:20]))}"
                )
            whole = 2 ** (jnp.finfo(there[name]).nmant + 1)
            if isinstance(kind, Integer) and max(map(abs, kind.bounds)) > whole:
                raise ValueError(
                    f"space.hyperparams[{name!r}] takes {kind.range}, and its leaf{of} is "
                    f"{there[name]}, which holds whole numbers up to {whole}"
                )
        if self._takes_rate and self._space.lr_hyper is None:
            raise ValueError(
                f"the optimizer{of} has no outer_optimizer: give SearchSpace(lr_hyper=…), a number "
                "or a distribution"
            )
        if not self._takes_rate and self._space.lr_hyper is not None:
            raise ValueError(
                f"space.lr_hyper is given, and the optimizer{of} has an outer_optimizer"
            )

    def _check_compared(self) -> None:
        """Raise unless the table will have what trials are compared by; nothing compiles.

        Raises:
          SweepError: naming what it lacks.
        """
        there = {*step_metrics(self._template.metadata), DIVERGED}
        if not set(self.spec.compared) <= there:
            there |= set(jax.eval_shape(self.measured, self._template, self._data_shapes))
        for name in self.spec.compared:
            if name not in there:
                has = ", ".join(sorted(there))
                raise SweepError(f"metric={name!r} is not in the table, which has {has}")


def _mesh(sizes: Mapping[str, int]) -> Any:
    try:
        return make_mesh(**sizes)
    except ValueError as error:
        raise ValueError(
            f"mesh: {error}. A sweep goes on with other devices where another mesh is given and "
            'allowed, allow_changed=("mesh",); a trial is computed again with as many alone'
        ) from None


def data_key(seed: Any) -> jax.Array:
    """Return the key from which a sweep's data are made; trials' keys come from another."""
    return jax.random.fold_in(jax.random.key(seed), 0)


def trial_key(seed: Any, trial: Any) -> jax.Array:
    """Return the key of a sweep's trial: a `solve` with it takes the same steps."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 1), trial)


def build(
    spec: Spec, arguments: Mapping[str, Any], data: PyTree
) -> tuple[Problem, BilevelOptimizer]:
    """Return the problem and the optimizer of a variant.

    Raises:
      TypeError: if a reference or a function does not give one.
      ValueError: if a choice is an argument of neither function.
    """
    given = {**arguments, **({} if data is None else {"data": data})}
    used: set[str] = set()
    made: list[Any] = []
    for name, source, wanted in (
        ("problem", spec.problem, Problem),
        ("optimizer", spec.optimizer, BilevelOptimizer),
    ):
        thing = importing.load(source) if isinstance(source, str) else source
        if not isinstance(thing, wanted):
            if not callable(thing):
                got = type(thing).__name__
                raise TypeError(f"{name} must be a {wanted.__name__} or a function, got {got}")
            thing, taken = importing.call_with(thing, given)
            used |= taken
        if not isinstance(thing, wanted):
            got = type(thing).__name__
            raise TypeError(f"{name}: the function must return a {wanted.__name__}, got {got}")
        made.append(thing)
    if unused := set(given) - used:
        name = sorted(unused)[0]
        what = "data" if name == "data" else f"the choice {name!r}"
        raise ValueError(f"{what} is given, but neither problem nor optimizer takes it")
    return made[0], made[1]


def by_name(trees: Sequence[PyTree]) -> dict[str, np.ndarray]:
    """Return trees of one structure as stacked leaves by their dotted names."""
    leaves, _ = tree_flatten_with_path(trees[0])
    names = [dotted(path) or "hyperparams" for path, _ in leaves]
    rows = zip(*(jax.tree.leaves(tree) for tree in trees), strict=True)
    stacked = [np.stack([np.asarray(leaf) for leaf in row]) for row in rows]
    return dict(zip(names, stacked, strict=True))


def dotted(path: Any) -> str:
    """Return a leaf's path with dots between its parts."""
    return keystr(path, simple=True, separator=".")


@contextlib.contextmanager
def _noted(notes: list[str]) -> Generator[None]:
    """Collect what is said of bytes that could not be used."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", compiled.CompileWarning)
        yield
    for warning in caught:
        if issubclass(warning.category, compiled.CompileWarning):
            notes.append(str(warning.message))
        else:
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )


def _as_float32(change: Any, order: Order) -> Any:
    n = len(order.trials)
    if change is None:
        return np.zeros(n, bool), np.zeros(n, np.float32), np.zeros(n, np.float32)
    mask, multiply, add = change
    return np.asarray(mask), np.asarray(multiply, np.float32), np.asarray(add, np.float32)


def _one(slot: int) -> np.ndarray:
    """Return what `take` and `put` move: one slot, so that there is one program for any number."""
    return np.array([slot], np.int32)


def _plain(leaf: jax.Array) -> jax.Array:
    return jax.random.key_data(leaf) if is_key(leaf) else leaf


def _typed(leaf: jax.Array, like: Any) -> jax.Array:
    typed = is_key(like)
    return jax.random.wrap_key_data(leaf, impl=like.dtype._impl.name) if typed else leaf
