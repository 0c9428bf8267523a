"""`run`: M episodes of T steps with Reptile between them (HyperDistill, Algorithm 3)."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradhpo.compilation import jit
from gradhpo.errors import (
    DivergenceWarning,
    check_callable,
    check_count,
    check_number,
    scalar_loss,
    stack,
)
from gradhpo.problem import Problem
from gradhpo.progress import Bar
from gradhpo.state import METRICS, BilevelState, LossFn, PyTree
from gradhpo.timetable import Timetable
from gradhpo.trial import Method, Rates, Trial, guard, reptile


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a run is laid out; its arguments are those of `BilevelOptimizer.run`."""

    M: int
    T: int
    lr_reptile: float
    lr_hyper: float | None
    callback: Callable[[int, BilevelState], Any] | None
    progress: bool | None

    def __post_init__(self) -> None:
        check_count("M", self.M, minimum=0)
        check_count("T", self.T)
        check_number("lr_reptile", self.lr_reptile, -float("inf"), float("inf"))
        if self.lr_hyper is not None:
            check_number("lr_hyper", self.lr_hyper, -float("inf"), float("inf"))
        if self.callback is not None:
            check_callable("callback", self.callback)

    def lr_hyper_at(self, episode: int) -> np.ndarray | None:
        """Return the step size on λ in this episode, counted from 1: linear decay to 0."""
        if self.lr_hyper is None:
            return None
        decayed = float(self.lr_hyper) * (1 - (episode - 1) / self.M)
        return np.asarray(decayed, dtype=jnp.result_type(float))


def run(
    optimizer: Method,
    state: BilevelState,
    plan: Plan,
    get_train_batch: Callable[[], Any],
    get_val_batch: Callable[[], Any],
    train_loss_fn: LossFn,
    val_loss_fn: LossFn,
) -> BilevelState:
    """Run the plan; see `BilevelOptimizer.run`."""
    check_callable("get_train_batch", get_train_batch)
    check_callable("get_val_batch", get_val_batch)
    problem = Problem(_started, train_loss_fn, val_loss_fn, batches=())
    trial = Trial(problem, optimizer, Timetable.of(optimizer, plan.T))
    phi = state.params
    with Bar(plan.progress, total=plan.M * plan.T, unit="step") as bar:
        for episode in range(1, plan.M + 1):
            first = (episode - 1) * plan.T
            state, fault = _begin(trial, state, phi)
            if trial.timetable.calibrates_at(first):
                batches = stack("get_train_batch", [get_train_batch() for _ in range(plan.T)])
                state = _calibrate(trial, state, batches, get_val_batch())
            rates = Rates(plan.lr_hyper_at(episode))
            for _ in range(plan.T):
                pair = get_train_batch(), get_val_batch()
                state, fault = _guarded_step(trial, state, fault, pair, rates)
            bar.advance(plan.T)
            if (message := _describe(np.asarray(fault), episode)) is not None:
                warnings.warn(message, DivergenceWarning, stacklevel=3)
                return state
            phi = _reptile(phi, state.params, plan.lr_reptile)
            if plan.callback is not None:
                val_loss = _val_loss(val_loss_fn, state, get_val_batch())
                state = state.update(metadata={"val_loss": val_loss})
                plan.callback(episode, state)
    return state.update(params=phi, metadata={"phi": phi} if "phi" in state.metadata else {})


def _started(key: jax.Array) -> tuple[PyTree, PyTree]:
    """Stand for `Problem.init`: `run` is given a state."""
    raise NotImplementedError


@functools.partial(jax.jit, static_argnums=0)
def _begin(trial: Trial, state: BilevelState, phi: PyTree) -> tuple[BilevelState, jax.Array]:
    """Start an episode, in buffers of its own, which the steps then donate to one another."""
    fresh = jax.tree.map(jnp.copy, trial.optimizer.reset(state, phi))
    return fresh, jnp.full(2, -1, dtype=jnp.int32)


@functools.partial(jit, static_argnums=0, donate_argnums=(1, 2))
def _guarded_step(
    trial: Trial, state: BilevelState, fault: jax.Array, pair: tuple[PyTree, PyTree], rates: Rates
) -> tuple[BilevelState, jax.Array]:
    """Take a step, unless it or an earlier one is not finite; `fault` is (step, metric) of that."""
    running = fault[0] < 0
    new = trial.advance(state, pair, state.step, rates)
    kept, runs_on, bad = guard(state, new, running)
    found = jnp.stack([new.step, jnp.argmax(bad).astype(jnp.int32)])
    return kept, jnp.where(running & ~runs_on, found, fault)


@functools.partial(jit, static_argnums=0)
def _calibrate(
    trial: Trial, state: BilevelState, batches: PyTree, val_batch: PyTree
) -> BilevelState:
    return trial.calibrate_on(state, batches, val_batch)


@jax.jit
def _reptile(phi: PyTree, params: PyTree, lr_reptile: Any) -> PyTree:
    return reptile(phi, params, lr_reptile)


@functools.partial(jit, static_argnums=0)
def _val_loss(val_loss_fn: LossFn, state: BilevelState, val_batch: PyTree) -> jax.Array:
    loss = scalar_loss("val_loss_fn", val_loss_fn)
    value = loss(state.params, state.hyperparams, val_batch)
    return value.astype(jnp.result_type(state.metadata["val_loss"]))


def _describe(fault: np.ndarray, episode: int) -> str | None:
    step, metric = (int(value) for value in fault)
    if step < 0:
        return None
    return (
        f"{METRICS[metric]} stopped being finite at step {step} of episode {episode}: the run "
        "ends, and the state before that step is returned. Lower the learning rates, or clip"
    )
