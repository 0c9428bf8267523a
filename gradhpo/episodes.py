"""`run`: M episodes of T steps with Reptile between them (HyperDistill, Algorithm 3)."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradhpo.compilation import jit
from gradhpo.errors import (
    DivergenceWarning,
    advice,
    check_callable,
    check_count,
    check_number,
    stack,
)
from gradhpo.observers.steps import Steps
from gradhpo.observers.telling import Observer, ended
from gradhpo.problem import Problem
from gradhpo.progress import Bar
from gradhpo.state import METRICS, BilevelState, LossFn, PyTree
from gradhpo.task import CALIBRATION, Task, typed_key
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
    key: jax.Array | None = None
    observers: Iterable[Observer] = ()

    def __post_init__(self) -> None:
        check_count("M", self.M, minimum=0)
        check_count("T", self.T)
        check_number("lr_reptile", self.lr_reptile, -float("inf"), float("inf"))
        if self.lr_hyper is not None:
            check_number("lr_hyper", self.lr_hyper, -float("inf"), float("inf"))
        if self.callback is not None:
            check_callable("callback", self.callback)
        if self.key is not None:
            object.__setattr__(self, "key", typed_key("key", self.key))

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
    phi = (state.params, state.model_state)

    def task(train_batch: PyTree, val_batch: PyTree) -> Task:
        return Task(train_batch, val_batch, train_loss_fn, val_loss_fn, plan.key)

    about = {"M": plan.M, "T": plan.T, "optimizer": type(optimizer).__name__}
    tells = Steps(plan.observers, axis="episode", settings=about)
    with Bar(plan.progress, total=plan.M * plan.T, unit="step") as bar, ended(tells.telling):
        tells.begin(plan.M)
        for episode in range(1, plan.M + 1):
            first = (episode - 1) * plan.T
            state, fault = _begin(trial, state, phi)
            if trial.timetable.calibrates_at(first):
                batches = stack("get_train_batch", [get_train_batch() for _ in range(plan.T)])
                state = _calibrate(trial, state, task(batches, get_val_batch()), np.int32(first))
            rates = Rates(plan.lr_hyper_at(episode))
            for index in range(first, first + plan.T):
                given = task(get_train_batch(), get_val_batch())
                if index == first:
                    state = optimizer.ready(state, given)
                state, fault = _guarded_step(trial, state, fault, given, rates, np.int32(index))
            bar.advance(plan.T)
            if plan.observers:
                last = jax.device_get({name: state.metadata[name] for name in METRICS})
                tells.add({name: np.asarray(value)[None] for name, value in last.items()})
                tells.tell()
            if (found := _describe(np.asarray(fault), episode, state)) is not None:
                why, kept = found
                warnings.warn(f"{why}: the run ends, and {kept}", DivergenceWarning, stacklevel=3)
                tells.stop(episode, why, kept)
                return state
            phi = _reptile(phi, (state.params, state.model_state), plan.lr_reptile)
            if plan.callback is not None:
                given = task(None, get_val_batch())
                val_loss = _val_loss(state, given, np.int32(episode * plan.T - 1))
                state = state.update(metadata={"val_loss": val_loss})
                plan.callback(episode, state)
    params, model_state = phi
    memory = {"phi": params} if "phi" in state.metadata else {}
    return state.update(params=params, metadata=memory, model_state=model_state)


def _started(key: jax.Array) -> tuple[PyTree, PyTree]:
    """Stand for `Problem.init`: `run` is given a state."""
    raise NotImplementedError


@functools.partial(jax.jit, static_argnums=0)
def _begin(
    trial: Trial, state: BilevelState, phi: tuple[PyTree, PyTree]
) -> tuple[BilevelState, jax.Array]:
    """Start an episode, in buffers of its own, which the steps then donate to one another."""
    fresh = trial.optimizer.reset(state, phi[0]).update(model_state=phi[1])
    fresh = jax.tree.map(jnp.copy, fresh)
    return fresh, jnp.full(2, -1, dtype=jnp.int32)


@functools.partial(jit, static_argnums=0, donate_argnums=(1, 2))
def _guarded_step(
    trial: Trial, state: BilevelState, fault: jax.Array, task: Task, rates: Rates, index: Any
) -> tuple[BilevelState, jax.Array]:
    """Take a step, unless it or an earlier one is not finite; `fault` is (step, metric) of that."""
    running = fault[0] < 0
    new = trial.advance(state, task.at(index), index, rates)
    kept, runs_on, bad = guard(state, new, running)
    found = jnp.stack([new.step, jnp.argmax(bad).astype(jnp.int32)])
    return kept, jnp.where(running & ~runs_on, found, fault)


@functools.partial(jit, static_argnums=0)
def _calibrate(trial: Trial, state: BilevelState, task: Task, index: Any) -> BilevelState:
    return trial.optimizer.calibrate(state, task.at(index, CALIBRATION))


@jax.jit
def _reptile(phi: PyTree, params: PyTree, lr_reptile: Any) -> PyTree:
    return reptile(phi, params, lr_reptile)


@jit
def _val_loss(state: BilevelState, task: Task, index: Any) -> jax.Array:
    task = task.at(index)
    value, _ = task.validate(*task.start(state), state.hyperparams)
    return value.astype(jnp.result_type(state.metadata["val_loss"]))


def _describe(fault: np.ndarray, episode: int, state: BilevelState) -> tuple[str, str] | None:
    """Return what went wrong, and what follows; None where nothing did."""
    step, metric = (int(value) for value in fault)
    if step < 0:
        return None
    return (
        f"{METRICS[metric]} stopped being finite at step {step} of episode {episode}",
        f"the state before that step is returned. {advice(METRICS[metric], step, state)}",
    )
