"""A method's hypergradient at the end of T inner steps with λ held: how methods are compared."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from gradhpo.errors import stack_length
from gradhpo.inner import InnerStep
from gradhpo.optimizer import BilevelOptimizer, Estimate
from gradhpo.state import BilevelState, PyTree, prepare
from gradhpo.task import Carried, Task
from gradhpo.unrolling import UnrollingMethod

__all__ = ["estimate_at", "fresh_state"]


def fresh_state(optimizer: BilevelOptimizer, like: BilevelState, **memory: Any) -> BilevelState:
    """Return the optimizer's own state at the beginning of an episode, where `like` stands.

    The weights, λ and the inner optimizer's state are those of `like`, which may come from another
    method; what the method remembers of earlier steps (w*_t, θ, the step count) starts anew.

    Args:
      optimizer: any `BilevelOptimizer`.
      like: where to start.
      memory: what `init` also takes, where `optimizer.remembers_batch` or `optimizer.draws`.
    """
    if optimizer.draws:
        memory["model_state"] = like.model_state
    state = optimizer.init(like.params, like.hyperparams, **memory)
    same = {"inner_opt_state": like.inner_opt_state, "model_state": like.model_state}
    return prepare(state.update(**same))


def estimate_at(optimizer: BilevelOptimizer, state: BilevelState, task: Task) -> Estimate:
    """Return the estimate that a method gives after T inner steps from `state`, with λ held.

    An online method takes a step at every batch, and its last estimate counts. A method that
    unrolls k steps does so over the last k, and plain inner steps come before; one that persists
    over windows of k takes as many as there are, and the last counts. All methods so see the same
    weights, and approximate the same gradient, `dL_val(w_T(λ), λ)/dλ`, which
    `UnrolledOptimizer(unroll_steps=T)` gives exactly. Pure and traceable.

    Args:
      optimizer: any `BilevelOptimizer`.
      state: a state of this optimizer, from `init` or `fresh_state`.
      task: its `train_batch` is T batches, stacked along a new leading axis.

    Raises:
      ValueError: if the method unrolls more than T steps.
    """
    T = stack_length("train_batches", task.train_batch)
    if isinstance(optimizer, UnrollingMethod):
        k = optimizer.unroll_steps
        if k > T:
            raise ValueError(f"unroll_steps must be at most the horizon, {T} steps; got {k}")
        windows = T // k if optimizer.persists else 1
        first = T - windows * k
        state = walk(optimizer.inner_step(task.train_loss), state, _part(task, slice(first)))
        stacked: Any = dataclasses.replace(optimizer, batches="stack")  # pyright: ignore[reportArgumentType]
        return _last_window(stacked, state, _part(task, slice(first, T)).after(first), windows)

    def step(carry: tuple[BilevelState, Any], batch: PyTree) -> tuple[Any, None]:
        state, key = carry
        here = dataclasses.replace(task, train_batch=batch, key=key)
        return (moved(state, optimizer.estimate(state, here)), here.after(1).key), None

    before = _part(task, slice(T - 1))
    state, key = jax.lax.scan(step, (state, task.key), before.train_batch)[0]
    return optimizer.estimate(state, dataclasses.replace(_part(task, T - 1), key=key))


def _last_window(
    optimizer: UnrollingMethod, state: BilevelState, task: Task, windows: int
) -> Estimate:
    """Return the estimate of the last window, of so many in a row."""
    if windows == 1:
        return optimizer.estimate(state, task)
    k = optimizer.unroll_steps
    parts = jax.tree.map(lambda x: x.reshape(windows, k, *x.shape[1:]), task.train_batch)

    def step(carry: tuple[BilevelState, Any], batch: PyTree) -> tuple[Any, None]:
        state, key = carry
        here = dataclasses.replace(task, train_batch=batch, key=key)
        return (moved(state, optimizer.estimate(state, here)), here.after(k).key), None

    before = jax.tree.map(lambda x: x[:-1], parts)
    state, key = jax.lax.scan(step, (state, task.key), before)[0]
    last = jax.tree.map(lambda x: x[-1], parts)
    return optimizer.estimate(state, dataclasses.replace(task, train_batch=last, key=key))


def walk(inner: InnerStep, state: BilevelState, task: Task) -> BilevelState:
    """Return the state after a plain inner step at each batch of the stack; λ is held."""

    def step(carry: tuple[PyTree, Carried], batch: PyTree) -> tuple[tuple[PyTree, Carried], None]:
        after = inner(*carry, state.hyperparams, batch)
        return (after.params, after.carried), None

    w, s = jax.lax.scan(step, task.start(state), task.train_batch)[0]
    after = {"inner_opt_state": s.opt_state, "model_state": s.model_state}
    return state.update(params=s.whole(w), **after)


def moved(state: BilevelState, done: Estimate) -> BilevelState:
    """Return the state after an estimate's step of the weights; λ is held."""
    return state.update(
        params=done.params,
        inner_opt_state=done.inner_opt_state,
        step=state.step + 1,
        metadata=done.metadata,
        model_state=done.model_state,
    )


def _part(task: Task, index: Any) -> Task:
    part = jax.tree.map(lambda x: x[index], task.train_batch)
    return dataclasses.replace(task, train_batch=part)
