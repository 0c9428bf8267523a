"""The compiled programs of `solve`: initialize, take a chunk of steps, calibrate, evaluate."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gradhpo.compilation import jit
from gradhpo.episodes import reptile
from gradhpo.optimizer import BilevelOptimizer
from gradhpo.problem import Problem, stream
from gradhpo.state import METRICS, BilevelState, LossFn, PyTree, faults, prepare


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Carry:
    """What goes from step to step."""

    state: BilevelState
    phi: PyTree
    """The initialization of the current episode; None where there are no episodes."""


@dataclasses.dataclass(frozen=True)
class Program:
    """The static description of a run. Equal programs share their compiled code."""

    problem: Problem
    optimizer: BilevelOptimizer
    schedule: Callable[[jax.Array], Any] | None
    episode_length: int | None
    batched: bool
    """Whether keys, carries and data have a leading axis of runs."""

    @functools.partial(jit, static_argnums=0)
    def data(self, key: jax.Array) -> PyTree:
        """Make the data of each run."""
        return self._each(self.problem.start_data)(key)

    @functools.partial(jit, static_argnums=0)
    def init(self, key: jax.Array, data: PyTree, host_pair: PyTree) -> Carry:
        """Make the weights, the hyperparameters and the state of each run."""

        def one(key: jax.Array, data: PyTree) -> Carry:
            params, hyperparams = self.problem.start(key)
            extra: dict[str, Any] = {}
            if self.optimizer.remembers_batch:
                pair = self._draw(key, data, 0, host_pair)
                extra = {"train_batch": pair[0], "key": stream(key, "optimizer")}
            state = prepare(self.optimizer.init(params, hyperparams, **extra))
            return Carry(state, None if self.episode_length is None else state.params)

        return self._each(one)(key, data)

    @functools.partial(jit, static_argnums=(0, 7))
    def chunk(
        self,
        carry: Carry,
        key: jax.Array,
        data: PyTree,
        rates: dict[str, Any],
        span: dict[str, Any],
        host: PyTree,
        capacity: int,
    ) -> tuple[Carry, dict[str, jax.Array], jax.Array]:
        """Take `span["n"]` steps from step `span["start"]`; traced, so any number shares the code.

        `host` is a stack of host batches, read from `span["offset"]` on. Returns the carry, and
        with a leading axis of `capacity` the metrics and which of `METRICS` were not finite.
        """

        def one(carry: Carry, key: jax.Array, data: PyTree, index: Any, host_pair: PyTree) -> Any:
            train, val = self._draw(key, data, index, host_pair)
            lr_hyper = rates.get("lr_hyper")
            if self.schedule is not None:
                lr_hyper = jnp.asarray(self.schedule(index), jnp.result_type(float))
            losses = self._losses()
            state = self.optimizer.advance(carry.state, train, val, *losses, lr_hyper)
            metadata = {name: state.metadata[name] for name in recorded}
            return Carry(state, carry.phi), metadata, faults(state.metadata)

        def close_episode(carry: Carry) -> Carry:
            phi = reptile(carry.phi, carry.state.params, rates["lr_reptile"])
            return Carry(self.optimizer.reset(carry.state, phi), phi)

        def body(i: jax.Array, loop: Any) -> Any:
            carry, buffers = loop
            index = span["start"] + i
            host_pair = jax.tree.map(lambda x: x[span["offset"] + i], host)
            step = self._each(one, in_axes=(0, 0, 0, None, None))
            carry, *made = step(carry, key, data, index, host_pair)
            if self.episode_length is not None:
                ends = (index + 1) % self.episode_length == 0
                carry = jax.lax.cond(ends, self._each(close_episode), lambda same: same, carry)
            return carry, jax.tree.map(lambda buffer, row: buffer.at[i].set(row), buffers, made)

        runs = key.shape
        recorded = {
            name: jnp.zeros((capacity, *runs), value.dtype)
            for name, value in carry.state.metadata.items()
            if isinstance(value, jax.Array)
            and value.shape == runs
            and jnp.issubdtype(value.dtype, jnp.floating)
        }
        bad = jnp.zeros((capacity, *runs, len(METRICS)), bool)
        carry, (values, bad) = jax.lax.fori_loop(0, span["n"], body, (carry, [recorded, bad]))
        return carry, values, bad

    @functools.partial(jit, static_argnums=0)
    def calibrate(
        self, carry: Carry, key: jax.Array, data: PyTree, index: Any, host: PyTree
    ) -> Carry:
        """Estimate the algorithm's own settings, at the beginning of an episode."""

        def one(carry: Carry, key: jax.Array, data: PyTree) -> Carry:
            if self.problem.batch is None:
                trains, vals = host
            else:
                fresh = jax.random.fold_in(stream(key, "calibration"), index)
                keys = jax.random.split(fresh, self.optimizer.T)
                trains, vals = jax.vmap(lambda key: self.problem.draw(key, data))(keys)
            val = jax.tree.map(lambda x: x[-1], vals)
            losses = self._losses()
            state = self.optimizer.calibrate(carry.state, trains, val, *losses)
            return Carry(state, carry.phi)

        return self._each(one)(carry, key, data)

    @functools.partial(jit, static_argnums=0)
    def evaluate(self, state: BilevelState, data: PyTree) -> dict[str, Any]:
        """Return `Problem.metrics` of each run."""

        def one(state: BilevelState, data: PyTree) -> dict[str, Any]:
            return self.problem.measure(state.params, state.hyperparams, data)

        return self._each(one)(state, data)

    @functools.partial(jax.jit, static_argnums=0)
    def merge(self, carry: Carry, other: Carry, mask: jax.Array) -> Carry:
        """Return `carry` with the runs where `mask` is True taken from `other`."""
        choose = self._each(
            lambda mask, a, b: jax.tree.map(lambda x, y: jnp.where(mask, y, x), a, b)
        )
        return choose(mask, carry, other)

    def _draw(self, key: jax.Array, data: PyTree, index: Any, host_pair: PyTree) -> Any:
        if self.problem.batch is None:
            return host_pair
        return self.problem.draw_at(key, index, data)

    def _losses(self) -> tuple[LossFn, LossFn]:
        return self.problem.train_loss, self.problem.val_loss

    def _each(self, function: Callable[..., Any], in_axes: Any = 0) -> Callable[..., Any]:
        return jax.vmap(function, in_axes=in_axes) if self.batched else function
