"""The compiled programs of `solve`: initialize, take a chunk of steps, calibrate, evaluate."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import keystr

from gradhpo.checksums import checksum
from gradhpo.compilation import jit
from gradhpo.errors import check_floating, described, tracing
from gradhpo.fingerprint import Fingerprint, settings, versions
from gradhpo.state import METRICS, BilevelState, PyTree, faults
from gradhpo.trial import Rates, Trial


@dataclasses.dataclass(frozen=True)
class Program:
    """The static description of a run. Equal programs share their compiled code."""

    trial: Trial
    batched: bool
    """Whether keys, states and data have a leading axis of runs."""
    record: Callable[[PyTree], dict[str, Any]] | tuple[str, ...] | None = ()
    """What to keep of λ after each step: a function of it, names of leaves, or None for scalars."""
    own_batches: bool = False
    """Whether each run has host batches of its own, with a leading axis of runs."""

    @functools.partial(jit, static_argnums=0)
    def data(self, key: jax.Array) -> PyTree:
        """Make the data of each run."""
        return self._each(self.trial.problem.start_data)(key)

    @functools.partial(jit, static_argnums=0)
    def init(self, key: jax.Array, data: PyTree, host_pair: PyTree) -> BilevelState:
        """Make the weights, the hyperparameters and the state of each run."""

        def one(key: jax.Array, data: PyTree, pair: PyTree) -> BilevelState:
            return self.trial.start(key, data, host=pair)

        return self._each(one, self._axes(2))(key, data, host_pair)

    @functools.partial(jax.jit, static_argnums=0, inline=True)
    def step(
        self,
        state: BilevelState,
        key: jax.Array,
        data: PyTree,
        rates: Rates,
        index: Any,
        pair: PyTree,
    ) -> BilevelState:
        """Take step `index` of each run, and what comes before it; a part of `chunk`."""
        trial = self.trial

        def one(state: BilevelState, key: jax.Array, data: PyTree, pair: PyTree) -> BilevelState:
            state = trial.begin(state, key, index, data)
            return trial.step(state, trial.task(key, data, index, pair), index, rates)

        return self._each(one, self._axes(3))(state, key, data, pair)

    def fingerprint(
        self, state: BilevelState, key: jax.Array, data: PyTree, pair: PyTree
    ) -> Fingerprint:
        """Return what the runs compute; of arrays it needs the shapes and dtypes.

        What may change while a run goes on is left out: rates, and what is kept of λ. A step that
        is traced for this is not traced again for a chunk.
        """
        trial = dataclasses.replace(self.trial, schedule=None)
        plain = dataclasses.replace(self, trial=trial, record=())
        optimizer: Any = trial.optimizer
        number = jax.ShapeDtypeStruct((), jnp.result_type(float))
        rates = Rates(
            None if optimizer.outer_optimizer is not None else number,
            None if trial.timetable.episode_length is None else number,
        )
        index = jax.ShapeDtypeStruct((), jnp.int32)
        with jax.disable_jit(False):  # the same whether the run is compiled or not
            step = plain.step.trace(plain, state, key, data, rates, index, pair).jaxpr
            made = None if data is None else self.data.trace(self, key).jaxpr
            init = self.init.trace(self, key, data, pair).jaxpr
        return Fingerprint(
            versions(),
            settings(optimizer),
            checksum(init),
            None if made is None else checksum(made),
            checksum(step),
        )

    @functools.partial(jit, static_argnums=(0, 7))
    def chunk(
        self,
        state: BilevelState,
        key: jax.Array,
        data: PyTree,
        rates: Rates,
        span: dict[str, Any],
        host: PyTree,
        capacity: int,
    ) -> tuple[BilevelState, dict[str, jax.Array], dict[str, Any], jax.Array]:
        """Take `span["n"]` steps from step `span["start"]`; traced, so any number shares the code.

        `host` is a stack of host batches, read from `span["offset"]` on. Returns the state, and
        with a leading axis of `capacity` the metrics, what is kept of λ, and which of `METRICS`
        were not finite.
        """
        alone = dataclasses.replace(self, record=())  # whatever is kept, a step is traced once

        def measured(state: BilevelState) -> Any:
            values = {name: state.metadata[name] for name in names}
            return values, self.kept(state.hyperparams), faults(state.metadata)

        def body(i: jax.Array, loop: Any) -> Any:
            state, buffers = loop
            row, own = span["offset"] + i, self.own_batches
            pair = jax.tree.map(lambda x: x[:, row] if own else x[row], host)
            state = alone.step(state, key, data, rates, span["start"] + i, pair)
            made = list(self._each(measured)(state))
            return state, jax.tree.map(lambda buffer, row: buffer.at[i].set(row), buffers, made)

        runs = key.shape
        names = [
            name
            for name, value in state.metadata.items()
            if isinstance(value, jax.Array)
            and value.shape == runs
            and jnp.issubdtype(value.dtype, jnp.floating)
        ]
        kept = self.kept_shapes(state.hyperparams)
        rows = ({name: state.metadata[name] for name in names}, kept)
        values, record = jax.tree.map(lambda x: jnp.zeros((capacity, *x.shape), x.dtype), rows)
        bad = jnp.zeros((capacity, *runs, len(METRICS)), bool)
        start = (state, [values, record, bad])
        state, (values, record, bad) = jax.lax.fori_loop(0, span["n"], body, start)
        return state, values, record, bad

    def keep(self, hyperparams: PyTree) -> dict[str, Any]:
        """Return what is kept of the λ of each run at a step."""
        return self._each(self.kept)(hyperparams)

    def kept_shapes(self, hyperparams: PyTree) -> dict[str, Any]:
        """Return the shapes of what is kept of the λ of each run at a step."""
        return jax.eval_shape(self.keep, hyperparams)

    def kept(self, hyperparams: PyTree) -> dict[str, Any]:
        """Return what is kept of one run's λ.

        Raises:
          ValueError: for a name that λ does not have.
          TypeError: if the function does not return floating-point arrays by name.
        """
        if callable(self.record):
            with tracing("record", hyperparams=hyperparams):
                made = self.record(hyperparams)
            by_name = isinstance(made, dict) and all(isinstance(name, str) for name in made)
            if not by_name or not jax.tree_util.all_leaves(list(made.values())):
                got = "a tree in it" if by_name else described(made)
                raise TypeError(f"record must return a dict of arrays by name, got {got}")
            check_floating("record", made) if made else None
            return jax.tree.map(jnp.asarray, made)
        paths = jax.tree_util.tree_flatten_with_path(hyperparams)[0]
        leaves = {keystr(p, simple=True, separator=".") or "hyperparams": x for p, x in paths}
        if self.record is None:
            return {name: leaf for name, leaf in leaves.items() if leaf.shape == ()}
        for name in self.record:
            if name not in leaves:
                raise ValueError(f"record has {name!r}; λ has {', '.join(map(repr, leaves))}")
        return {name: leaves[name] for name in self.record}

    @functools.partial(jit, static_argnums=0)
    def calibrate(
        self, state: BilevelState, key: jax.Array, data: PyTree, index: Any, host: PyTree
    ) -> BilevelState:
        """Estimate the algorithm's own settings from a stack of host batches."""

        def one(state: BilevelState, key: jax.Array, data: PyTree, host: PyTree) -> BilevelState:
            state = self.trial.begin_if_fresh(state, key, index)
            return self.trial.calibrate(state, key, index, data, host)

        return self._each(one, self._axes(3))(state, key, data, host)

    @functools.partial(jit, static_argnums=0)
    def evaluate(self, state: BilevelState, data: PyTree) -> dict[str, Any]:
        """Return `Problem.metrics` of each run."""
        return self._each(self.trial.measure)(state, data)

    @functools.partial(jax.jit, static_argnums=0)
    def merge(self, state: BilevelState, other: BilevelState, mask: jax.Array) -> BilevelState:
        """Return `state` with the runs where `mask` is True taken from `other`."""
        choose = self._each(
            lambda mask, a, b: jax.tree.map(lambda x, y: jnp.where(mask, y, x), a, b)
        )
        return choose(mask, state, other)

    def _axes(self, n: int) -> tuple[int | None, ...]:
        """Return where n arguments have the axis of runs, and host batches after them."""
        return (*[0] * n, 0 if self.own_batches else None)

    def _each(self, function: Callable[..., Any], in_axes: Any = 0) -> Callable[..., Any]:
        return jax.vmap(function, in_axes=in_axes) if self.batched else function
