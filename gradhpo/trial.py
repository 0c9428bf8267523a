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
from gradhpo.state import BilevelState, LossFn, PyTree, as_array, faults, prepare
from gradhpo.timetable import Calibrated, Timetable

PHI = "phi"
"""The initialization of the current episode, in a state's `metadata`."""


class Method(Calibrated, Protocol):
    """What a trial asks of an optimizer: the part of `BilevelOptimizer` that is traced."""

    @property
    def remembers_batch(self) -> bool:
        """Whether `init` also takes `train_batch` and `key`."""
        ...

    def init(self, params: PyTree, hyperparams: PyTree) -> BilevelState:
        """Return the state before the first step."""
        ...

    def advance(
        self,
        state: BilevelState,
        train_batch: PyTree,
        val_batch: PyTree,
        train_loss_fn: LossFn,
        val_loss_fn: LossFn,
        lr_hyper: Any = None,
    ) -> BilevelState:
        """Take a step."""
        ...

    def calibrate(
        self,
        state: BilevelState,
        train_batches: PyTree,
        val_batch: PyTree,
        train_loss_fn: LossFn,
        val_loss_fn: LossFn,
    ) -> BilevelState:
        """Estimate the algorithm's own settings."""
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
          host: the first pair of batches, where they come from the host.
        """
        drawn = dict(zip(("params", "hyperparams"), self.problem.start(key), strict=True))
        first, extra = drawn | (given or {}), {}
        if self.optimizer.remembers_batch:
            train, _ = self.draw(key, data, 0, host)
            extra = {"train_batch": train, "key": stream(key, "optimizer")}
        state = prepare(self.optimizer.init(first["params"], first["hyperparams"], **extra))
        if self.timetable.episode_length is None:
            return state
        return state.update(metadata={PHI: state.params})

    def draw(self, key: jax.Array, data: PyTree, index: Any, host: PyTree = None) -> Any:
        """Return the training and the validation batch of step `index`."""
        if self.problem.batch is None:
            return host
        check_frozen(self.problem, key, data)
        return self.problem.draw_at(key, index, data)

    def advance(
        self, state: BilevelState, batches: tuple[PyTree, PyTree], index: Any, rates: Rates
    ) -> BilevelState:
        """Take step `index`, in the episode that it belongs to."""
        lr_hyper = rates.lr_hyper
        if self.schedule is not None:
            with tracing("lr_hyper, a function of the step,", step=index):
                scheduled = jnp.asarray(self.schedule(index), jnp.result_type(float))
            if scheduled.shape != ():
                got = f"shape {scheduled.shape}"
                raise ValueError(f"lr_hyper must return one number at a step, got {got}")
            lr_hyper = scheduled if lr_hyper is None else lr_hyper * scheduled
        return self.optimizer.advance(state, *batches, *self._losses, lr_hyper)

    def begin_if_fresh(
        self, state: BilevelState, key: jax.Array, index: Any, running: Any = True
    ) -> BilevelState:
        """Begin an episode before step `index` with weights made anew, where that is asked for.

        Not at the end of the one before: what is measured there, and kept, are its weights.
        """

        def anew(state: BilevelState) -> BilevelState:
            first = self.problem.start(jax.random.fold_in(stream(key, "episodes"), index))[0]
            phi = jax.tree.map(lambda x, like: as_array(x, like.dtype), first, state.params)
            return self.optimizer.reset(state, phi).update(metadata={PHI: phi})

        if not self.fresh:
            return state
        return where_due(self.timetable.begins_episode(index) & running, anew, state)

    def close(self, state: BilevelState, rates: Rates) -> BilevelState:
        """End an episode: move φ by Reptile, and begin the next one there."""
        phi = reptile(state.metadata[PHI], state.params, rates.lr_reptile)
        return self.optimizer.reset(state, phi).update(metadata={PHI: phi})

    def step(
        self,
        state: BilevelState,
        batches: tuple[PyTree, PyTree],
        index: Any,
        rates: Rates,
    ) -> BilevelState:
        """Take step `index`, and end the episode where it ends with that step."""
        state = self.advance(state, batches, index, rates)
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
        return self.calibrate_on(state, trains, jax.tree.map(lambda x: x[-1], vals))

    def calibrate_on(self, state: BilevelState, trains: PyTree, val: PyTree) -> BilevelState:
        """Estimate the algorithm's own settings from a stack of `T` training batches."""
        return self.optimizer.calibrate(state, trains, val, *self._losses)

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
        return self.problem.measure(state.params, state.hyperparams, data)

    @property
    def _losses(self) -> tuple[LossFn, LossFn]:
        return self.problem.train_loss, self.problem.val_loss


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
    """Return `φ - η (φ - w_T)`; exactly `w_T` at η = 1."""

    def move(p: jax.Array, w: jax.Array) -> jax.Array:
        return (w + (1 - lr_reptile) * (p - w)).astype(p.dtype)

    return jax.tree.map(move, phi, params)
