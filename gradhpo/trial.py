"""One trial: how it starts, draws, steps, calibrates, ends an episode, is measured and guarded.

`run`, `solve`, a `Population` and a generation of a sweep are loops over a `Trial`, which is pure.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from gradhpo.branches import where_due
from gradhpo.errors import tracing
from gradhpo.frozen import check_frozen
from gradhpo.problem import Problem, stream
from gradhpo.state import BilevelState, PyTree, as_array, faults, prepare
from gradhpo.task import CALIBRATION, Task
from gradhpo.timetable import Calibrated, Timetable

PHI = "phi"
"""The initialization of the current episode, in a state's `metadata`."""
PHI_MODEL_STATE = "phi_model_state"
"""The model state that the current episode started with, where there is one."""


class Method(Calibrated, Protocol):
    """What a trial asks of an optimizer: the part of `BilevelOptimizer` that is traced."""

    @property
    def remembers_batch(self) -> bool:
        """Whether `init` also takes `train_batch` and `key`."""
        ...

    @property
    def draws(self) -> bool:
        """Whether `init` also takes `key` and `model_state`."""
        ...

    def init(self, params: PyTree, hyperparams: PyTree) -> BilevelState:
        """Return the state before the first step."""
        ...

    def ready(self, state: BilevelState, task: Task) -> BilevelState:
        """Return the state with a place for each metric of the losses."""
        ...

    def advance(self, state: BilevelState, task: Task, lr_hyper: Any = None) -> BilevelState:
        """Take a step."""
        ...

    def calibrate(self, state: BilevelState, task: Task) -> BilevelState:
        """Estimate the algorithm's own settings, from a stack of training batches."""
        ...

    def reset(self, state: BilevelState, params: PyTree) -> BilevelState:
        """Begin an episode."""
        ...


class Rates(NamedTuple):
    """The numbers of a trial that are no part of its state."""

    lr_hyper: Any = None
    """Step size of λ, or with a schedule a factor on it; None for an outer optimizer's own."""
    lr_reptile: Any = None
    """Step size of Reptile; None where there are no episodes."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """What a trial does, as pure functions of its state. Equal trials share compiled code."""

    problem: Problem
    optimizer: Method
    timetable: Timetable
    schedule: Callable[[Any], Any] | None = None
    """The step size of λ at a step, counted from 0."""
    fresh: bool = False
    """Whether an episode starts from weights that `Problem.init` makes anew, and not from φ."""

    def start(
        self, key: jax.Array, data: PyTree, given: dict[str, Any] | None = None, host: PyTree = None
    ) -> BilevelState:
        """Return the state before step 0.

        Args:
          key: decides all randomness of the trial.
          data: from `Problem.start_data`.
          given: may hold `params` and `hyperparams` to start from instead.
          host: the first pair of batches, where they come from the host; without it the state has
            no place for metrics that the losses return.
        """
        first = self.problem.first(key)._replace(**(given or {}))
        known = self.problem.batch is not None or host is not None
        extra: dict[str, Any] = {}
        if self.optimizer.remembers_batch:
            train_batch = self.task(key, data, 0, host).train_batch
            extra = {"train_batch": train_batch, "key": stream(key, "optimizer")}
        if self.optimizer.draws:
            extra = {"model_state": first.model_state, "key": stream(key, "optimizer")}
        state = self.optimizer.init(first.params, first.hyperparams, **extra)
        model_state = jax.tree.map(as_array, first.model_state)
        state = prepare(state.update(model_state=model_state))
        if known:  # of the first step only shapes are needed, and no batch is drawn

            def task(key: jax.Array, data: PyTree, host: PyTree) -> Task:
                return self.task(key, data, 0, host)

            shapes = jax.eval_shape(task, key, data, host)
            state = self.optimizer.ready(state, shapes)
        if self.timetable.episode_length is None:
            return state
        return state.update(metadata=_phi(state.params, model_state))

    def task(self, key: jax.Array, data: PyTree, index: Any, host: PyTree = None) -> Task:
        """Return what step `index` is given; `host` is a pair of batches that come from there."""
        pair = host
        if self.problem.batch is not None:
            check_frozen(self.problem, key, data)
            pair = self.problem.draw_at(key, index, data)
        return self._task(pair, key).at(index)

    def _task(self, pair: tuple[PyTree, PyTree], key: Any) -> Task:
        task = Task(*pair, self.problem.train_loss, self.problem.val_loss)
        if key is None or not task.asks_for_key():
            return task
        return dataclasses.replace(task, key=stream(key, "losses"))

    def advance(self, state: BilevelState, task: Task, index: Any, rates: Rates) -> BilevelState:
        """Take step `index`, in the episode that it belongs to."""
        lr_hyper = rates.lr_hyper
        if self.schedule is not None:
            with tracing("lr_hyper, a function of the step,", step=index):
                scheduled = jnp.asarray(self.schedule(index), jnp.result_type(float))
            if scheduled.shape != ():
                got = f"shape {scheduled.shape}"
                raise ValueError(f"lr_hyper must return one number at a step, got {got}")
            lr_hyper = scheduled if lr_hyper is None else lr_hyper * scheduled
        return self.optimizer.advance(state, task, lr_hyper)

    def begin_if_fresh(
        self, state: BilevelState, key: jax.Array, index: Any, running: Any = True
    ) -> BilevelState:
        """Begin an episode before step `index` with weights made anew, where that is asked for.

        Not at the end of the one before: what is measured there, and kept, are its weights.
        """

        def anew(state: BilevelState) -> BilevelState:
            made = self.problem.first(jax.random.fold_in(stream(key, "episodes"), index))
            drawn, now = (made.params, made.model_state), (state.params, state.model_state)
            first = jax.tree.map(lambda x, like: as_array(x, like.dtype), drawn, now)
            return self._from(state, *first)

        if not self.fresh:
            return state
        return where_due(self.timetable.begins_episode(index) & running, anew, state)

    def close(self, state: BilevelState, rates: Rates) -> BilevelState:
        """End an episode: move φ by Reptile, and begin the next one there."""
        before = (state.metadata[PHI], state.metadata.get(PHI_MODEL_STATE))
        now = (state.params, state.model_state)
        return self._from(state, *reptile(before, now, rates.lr_reptile))

    def _from(self, state: BilevelState, params: PyTree, model_state: PyTree) -> BilevelState:
        """Return the state at the beginning of an episode."""
        fresh = self.optimizer.reset(state, params)
        return fresh.update(metadata=_phi(params, model_state), model_state=model_state)

    def step(self, state: BilevelState, task: Task, index: Any, rates: Rates) -> BilevelState:
        """Take step `index`, and end the episode where it ends with that step."""
        state = self.advance(state, task, index, rates)
        ends = False if self.fresh else self.timetable.ends_episode(index)
        return where_due(ends, lambda state: self.close(state, rates), state)

    def calibrate(
        self, state: BilevelState, key: jax.Array, index: Any, data: PyTree, host: PyTree = None
    ) -> BilevelState:
        """Estimate the algorithm's own settings anew, before step `index`.

        `host` is a stack of `T` pairs of batches, where they come from the host.
        """
        if self.problem.batch is None:
            trains, vals = host
        else:
            fresh = jax.random.fold_in(stream(key, "calibration"), index)
            keys = jax.random.split(fresh, self.timetable.T)
            trains, vals = jax.lax.map(lambda key: self.problem.draw(key, data), keys)
        task = self._task((trains, jax.tree.map(lambda x: x[-1], vals)), key)
        return self.optimizer.calibrate(state, task.at(index, CALIBRATION))

    def begin(
        self, state: BilevelState, key: jax.Array, index: Any, data: PyTree, running: Any = True
    ) -> BilevelState:
        """Do what comes before step `index` by the timetable, if the trial still runs.

        Calibrates only where batches are drawn on the device: a stack of host batches is a program
        of its own.
        """
        state = self.begin_if_fresh(state, key, index, running)
        if self.problem.batch is None:
            return state
        due = self.timetable.calibrates_at(index)
        due = due if due is False else due & running
        return where_due(due, lambda state: self.calibrate(state, key, index, data), state)

    def measure(self, state: BilevelState, data: PyTree) -> dict[str, Any]:
        """Return `Problem.metrics`."""
        there = (state.params, state.hyperparams, data, state.model_state)
        return self.problem.measure(*there)


def _phi(params: PyTree, model_state: PyTree) -> dict[str, PyTree]:
    """Return what a state remembers of where its episode starts."""
    phi = {PHI: params}
    return phi if model_state is None else {**phi, PHI_MODEL_STATE: model_state}


def guard(
    old: BilevelState, new: BilevelState, running: Any
) -> tuple[BilevelState, jax.Array, jax.Array]:
    """Return the new state if it is finite and the trial was still running, else the old one.

    And whether it still runs, and which of `METRICS` of the new state are not finite, `(5,)`.
    """
    bad = faults(new.metadata)
    running = running & ~bad.any()
    return jax.tree.map(lambda a, b: jnp.where(running, a, b), new, old), running, bad


def reptile(phi: PyTree, params: PyTree, lr_reptile: Any) -> PyTree:
    """Return `φ - η (φ - w_T)`; exactly `w_T` at η = 1, and in place of φ where no line leads."""

    def move(p: jax.Array, w: jax.Array) -> jax.Array:
        if not jnp.issubdtype(p.dtype, jnp.floating):
            return jnp.where(lr_reptile == 0, p, w)
        return (w + (1 - lr_reptile) * (p - w)).astype(p.dtype)

    return jax.tree.map(move, phi, params)
