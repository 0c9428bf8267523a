"""A population without a framework: one loop, or one in each of some processes."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import time
from collections.abc import Generator
from typing import Any

import jax
import numpy as np
import trials
from measure import cores

LAYOUTS: tuple[str | int, ...] = ("map", 4, 16, 64, "vmap")


def measure(processes: int, n: int, steps: int, generations: int) -> tuple[list[float], float, str]:
    """Return the seconds of generations after the first, those until then, and the layout.

    Each process holds its part of the trials, and keeps to its part of the cores; none knows of
    the others'.
    """
    context = multiprocessing.get_context("spawn")
    barrier, queue = context.Barrier(processes), context.SimpleQueue()
    started = time.time()
    with _environment(PJRT_NPROC=str(max(1, cores() // processes))):
        parts = [
            context.Process(
                target=_process, args=(rank, n // processes, steps, generations, barrier, queue)
            )
            for rank in range(processes)
        ]
        for part in parts:
            part.start()
    found = [queue.get() for _ in parts]
    for part in parts:
        part.join()
    seconds = np.max([times for times, _, _ in found], axis=0)  # the slowest part's
    return list(seconds), max(first for _, first, _ in found) - started, found[0][2]


def _process(rank: int, n: int, steps: int, generations: int, barrier: Any, queue: Any) -> None:
    made, rng = trials.problem(), np.random.default_rng(rank)
    log_decay = rng.uniform(np.log(trials.LOW), np.log(trials.HIGH), n)
    keys = jax.random.split(jax.random.key(rank), n)
    carries: Any = jax.jit(jax.vmap(lambda key, d: trials.start(made, key, d)))(keys, log_decay)
    layout, run = _fastest(made, carries, keys, steps)
    select = jax.jit(
        lambda carries, parents, log_decay: trials.with_log_decay(
            jax.tree.map(lambda x: x[parents], carries), log_decay
        )
    )
    root, times = jax.random.key(rank), list[float]()
    ready = 0.0
    for generation in range(generations):
        barrier.wait()
        began = time.perf_counter()
        keys = jax.random.split(jax.random.fold_in(root, generation), n)
        carries, scores = run(carries, keys)
        log_decay = np.asarray(carries[2]["log_decay"])
        parents, log_decay = trials.explore(np.asarray(scores), log_decay, rng)
        carries = jax.block_until_ready(select(carries, parents, log_decay))
        times.append(time.perf_counter() - began)
        ready = ready or time.time()
    queue.put((times[1:], ready, str(layout)))


def _fastest(made: Any, carries: Any, keys: Any, steps: int) -> tuple[str | int, Any]:
    """Return the layout that is fastest here, with its compiled generation."""
    one, n = trials.generation(made, steps), len(keys)
    runs: dict[str | int, Any] = {}
    for layout in LAYOUTS:
        if layout == "vmap":
            runs[layout] = jax.jit(jax.vmap(one))
        elif layout == "map" or int(layout) < n:
            size = None if layout == "map" else int(layout)
            runs[layout] = jax.jit(functools.partial(_mapped, one, size))
    best = dict.fromkeys(runs, np.inf)
    for _ in range(3):  # the first compiles
        for layout, run in runs.items():
            began = time.perf_counter()
            jax.block_until_ready(run(carries, keys))
            best[layout] = min(best[layout], time.perf_counter() - began)
    layout = min(best, key=lambda layout: best[layout])
    return layout, runs[layout]


def _mapped(one: Any, size: int | None, carries: Any, keys: Any) -> Any:
    return jax.lax.map(lambda c: one(*c), (carries, keys), batch_size=size)


@contextlib.contextmanager
def _environment(**values: str) -> Generator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
