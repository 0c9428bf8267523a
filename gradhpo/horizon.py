"""A method's hypergradient at the end of T inner steps with λ held: how methods are compared."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from gradhpo.errors import stack_length
from gradhpo.inner import InnerStep
from gradhpo.optimizer import BilevelOptimizer, Estimate
from gradhpo.state import BilevelState, LossFn, PyTree, prepare
from gradhpo.unrolling import UnrollingMethod


def fresh_state(optimizer: BilevelOptimizer, like: BilevelState, **memory: Any) -> BilevelState:
    """Return the optimizer's own state at the beginning of an episode, where `like` stands.

    The weights, λ and the inner optimizer's state are those of `like`, which may come from another
    method; what the method remembers of earlier steps (w*_t, θ, the step count) starts anew.

    Args:
      optimizer: any `BilevelOptimizer`.
      like: where to start.
      memory: what `init` also takes, where `optimizer.remembers_batch`.
    """
    state = optimizer.init(like.params, like.hyperparams, **memory)
    return prepare(state.update(inner_opt_state=like.inner_opt_state))


def estimate_at(
    optimizer: BilevelOptimizer,
    state: BilevelState,
    train_batches: PyTree,
    val_batch: PyTree,
    train_loss_fn: LossFn,
    val_loss_fn: LossFn,
) -> Estimate:
    """Return the estimate that a method gives after T inner steps from `state`, with λ held.

    An online method takes a step at every batch, and its last estimate counts. A method that
    unrolls k steps does so over the last k, and plain inner steps come before. All methods so see
    the same weights, and approximate the same gradient, `dL_val(w_T(λ), λ)/dλ`, which
    `UnrolledOptimizer(unroll_steps=T)` gives exactly. Pure and traceable.

    Args:
      optimizer: any `BilevelOptimizer`.
      state: a state of this optimizer, from `init` or `fresh_state`.
      train_batches: T batches, stacked along a new leading axis.
      val_batch: a pytree of arrays, passed to `val_loss_fn`.
      train_loss_fn: `(params, hyperparams, batch) -> scalar`.
      val_loss_fn: `(params, hyperparams, batch) -> scalar`.

    Raises:
      ValueError: if the method unrolls more than T steps.
    """
    T, losses = stack_length("train_batches", train_batches), (train_loss_fn, val_loss_fn)
    if isinstance(optimizer, UnrollingMethod):
        k = optimizer.unroll_steps
        if k > T:
            raise ValueError(f"unroll_steps must be at most the horizon, {T} steps; got {k}")
        inner = optimizer.inner_step(train_loss_fn)
        before, last = _part(train_batches, slice(T - k)), _part(train_batches, slice(T - k, T))
        state = walk(inner, state, before)
        stacked: Any = dataclasses.replace(optimizer, batches="stack")  # pyright: ignore[reportArgumentType]
        return stacked.estimate(state, last, val_batch, *losses)

    def step(state: BilevelState, batch: PyTree) -> tuple[BilevelState, None]:
        done = optimizer.estimate(state, batch, val_batch, *losses)
        return _moved(state, done), None

    state = jax.lax.scan(step, state, _part(train_batches, slice(T - 1)))[0]
    return optimizer.estimate(state, _part(train_batches, T - 1), val_batch, *losses)


def walk(inner: InnerStep, state: BilevelState, train_batches: PyTree) -> BilevelState:
    """Return the state after a plain inner step at each batch of the stack; λ is held."""

    def step(carry: tuple[PyTree, PyTree], batch: PyTree) -> tuple[tuple[PyTree, PyTree], None]:
        moved = inner(*carry, state.hyperparams, batch)
        return (moved.params, moved.opt_state), None

    w, s = jax.lax.scan(step, (state.params, state.inner_opt_state), train_batches)[0]
    return state.update(params=w, inner_opt_state=s)


def _part(batches: PyTree, index: Any) -> PyTree:
    return jax.tree.map(lambda x: x[index], batches)


def _moved(state: BilevelState, done: Estimate) -> BilevelState:
    return state.update(
        params=done.params,
        inner_opt_state=done.inner_opt_state,
        step=state.step + 1,
        metadata=done.metadata,
    )
