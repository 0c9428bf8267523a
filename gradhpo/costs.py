"""What an inner step with a method costs, over one of training alone: time and FLOPs."""

from __future__ import annotations

import dataclasses
import functools
import time as clock
from typing import Any

import jax
import numpy as np
import optax

from gradhpo.compilation import jit
from gradhpo.errors import stack_length
from gradhpo.flops import flops
from gradhpo.horizon import fresh_state, moved, walk
from gradhpo.inner import InnerStep
from gradhpo.optimizer import BilevelOptimizer
from gradhpo.spoken import Spoken
from gradhpo.state import BilevelState, PyTree
from gradhpo.task import Task
from gradhpo.unrolling import UnrollingMethod

MEASURE_SECONDS = 0.02
"""How long a program runs in a round of timing, if one call is shorter."""


def own_state(
    optimizer: BilevelOptimizer, state: BilevelState, task: Task, key: jax.Array
) -> BilevelState:
    """Return the method's own state where `state` stands, with a batch where it remembers one.

    `key` is where a method that draws draws from.
    """
    memory: dict[str, Any] = {"key": key} if optimizer.draws else {}
    if optimizer.remembers_batch:
        first = jax.tree.map(lambda x: x[0], task.train_batch)
        memory = {"train_batch": first, "key": jax.random.key(0)}
    return fresh_state(optimizer, state, **memory)


class Program:
    """A method's estimates along the horizon, compiled: what its cost is measured on."""

    def __init__(
        self,
        optimizer: Any,
        state: BilevelState,
        task: Task,
    ) -> None:
        T = stack_length("train_batch", task.train_batch)
        k = optimizer.unroll_steps if isinstance(optimizer, UnrollingMethod) else 1
        blocks = T // k
        self.steps = blocks * k
        own, trains = own_state(optimizer, state, task, jax.random.key(0)), task.train_batch
        if isinstance(optimizer, UnrollingMethod):
            optimizer = dataclasses.replace(optimizer, batches="stack")  # pyright: ignore[reportArgumentType]
            trains = jax.tree.map(
                lambda x: x[: self.steps].reshape(blocks, k, *x.shape[1:]), trains
            )

        def along(state: BilevelState, task: Task) -> Any:
            def block(carry: Any, train: PyTree) -> Any:
                state, total = carry
                done: Any = optimizer.estimate(state, dataclasses.replace(task, train_batch=train))
                return (moved(state, done), optax.tree.add(total, done.hypergradient)), None

            start = (state, optax.tree.zeros_like(state.hyperparams))
            return jax.lax.scan(block, start, task.train_batch)[0]

        self._args = (own, dataclasses.replace(task, train_batch=trains))
        self.flops = flops(along, *self._args)
        self._compiled = jit(along).lower(*self._args).compile()

    @functools.cached_property
    def _calls(self) -> int:
        """How many calls last long enough for the clock and the scheduler; warms up too."""
        once = [self._time(1) for _ in range(3)]
        return max(1, int(MEASURE_SECONDS / max(min(once), 1e-6)))

    def seconds(self) -> float:
        """Return the time of one inner step."""
        return self._time(self._calls) / self._calls / self.steps

    def _time(self, calls: int) -> float:
        started = clock.perf_counter()
        for _ in range(calls):
            jax.block_until_ready(self._compiled(*self._args))
        return clock.perf_counter() - started


class Plain(Program):
    """Training alone along the horizon, with no hypergradient: what costs are relative to."""

    def __init__(self, inner: InnerStep, state: BilevelState, task: Task) -> None:
        def along(state: BilevelState, task: Task) -> Any:
            after = walk(inner, state, task)
            return after.params, after.inner_opt_state, after.model_state

        self.steps = int(jax.tree.leaves(task.train_batch)[0].shape[0])
        self._args = (state, task)
        self.flops = flops(along, *self._args)
        self._compiled = jit(along).lower(*self._args).compile()


def times_of(
    programs: dict[str, Program], plain: Plain, rounds: int, spoken: Spoken
) -> tuple[dict[str, tuple[np.ndarray, float]], float]:
    """Return each method's time over the plain step's of the same round, and FLOPs over its.

    In a round all run once, the plain step before and after each, so that noise that lasts hits
    both. Also returns the plain step's median time, in seconds.
    """
    if not rounds:
        return {}, float("nan")
    ratios: dict[str, list[float]] = {name: [] for name in programs}
    bases: list[float] = []
    for index in range(rounds):
        spoken.doing(f"diagnose: timing, round {index + 1} of {rounds}")
        before = plain.seconds()
        for name, program in programs.items():
            here = program.seconds()
            after = plain.seconds()
            ratios[name].append(2 * here / (before + after))
            bases.append(before)
            before = after
    base = plain.flops / plain.steps
    times = {
        name: (np.asarray(ratios[name]), program.flops / program.steps / base)
        for name, program in programs.items()
    }
    return times, float(np.median(bases))
