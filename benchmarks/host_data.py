"""Slow loaders: how much of reading is hidden behind computing, and the other way round."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import jax
import models
import numpy as np
import optax
import typer
from measure import Report

import gradhpo
from gradhpo.parallel import Population

OPTIMIZER = gradhpo.OneStepOptimizer(optax.adam(1e-3), optax.adam(1e-2))
KEY = jax.random.key(0)
GENERATIONS = 4


class Loader:
    """Pairs of batches, each of which takes a while to read."""

    def __init__(self, pair: Any, seconds: float) -> None:
        self.pair, self.seconds = pair, seconds

    def __iter__(self) -> Iterator[Any]:
        while True:
            if self.seconds:
                time.sleep(self.seconds)
            yield self.pair


def by_solve(problem: gradhpo.Problem, steps: int) -> Callable[[Loader], Any]:
    """Return what runs `solve` on a loader."""

    def run(loader: Loader) -> Any:
        given = dataclasses.replace(problem, batches=loader)
        return gradhpo.solve(given, OPTIMIZER, steps, KEY, progress=False).state

    return run


def by_population(problem: gradhpo.Problem, steps: int, slots: int) -> Callable[[Loader], Any]:
    """Return what runs a population on a loader that its slots share, in four generations."""
    keys = jax.random.split(KEY, slots)

    def run(loader: Loader) -> Any:
        given = dataclasses.replace(problem, batches=loader)
        population = Population(given, OPTIMIZER, slots, batching="vmap")
        state = population.init(KEY)
        for _ in range(GENERATIONS):
            state, _ = population.run(state, steps // GENERATIONS, keys)
        return state

    return run


def by_hand(problem: gradhpo.Problem, steps: int) -> Callable[[Loader], Any]:
    """Return what runs a Python loop of `step` over a loader."""

    def run(loader: Loader) -> Any:
        state = OPTIMIZER.init(*problem.start(KEY))
        pairs = iter(loader)
        for _ in range(steps):
            train, val = next(pairs)
            state = OPTIMIZER.step(state, train, val, problem.train_loss, problem.val_loss)
        return state

    return run


def seconds(function: Callable[..., Any], *args: Any) -> float:
    """Return how long a call takes, its arrays included."""
    started = time.perf_counter()
    jax.block_until_ready(function(*args))
    return time.perf_counter() - started


def row(
    name: str, run: Callable[[Loader], Any], pair: Any, share: float, steps: int, rounds: int
) -> list[str]:
    """Measure reading alone, computing alone, and both, in turns in one process."""
    quick = Loader(pair, 0)
    run(quick)  # compile
    # What `sleep` is told: the share of a step's computing.
    slow = Loader(pair, share * min(seconds(run, quick) for _ in range(2)) / steps)

    def read() -> None:
        pairs = iter(slow)
        for _ in range(steps):
            next(pairs)

    times = np.array(
        [[seconds(read), seconds(run, quick), seconds(run, slow)] for _ in range(rounds)]
    )
    ratios = times[:, 2] / times[:, :2].max(axis=1)
    low, median, high = np.percentile(ratios, [25, 50, 75])
    alone = [f"{value:.2f}" for value in np.median(times, axis=0)]
    serial = np.median(times[:, 2] / times[:, :2].sum(axis=1))
    return [name, *alone, f"{median:.2f} ({low:.2f}-{high:.2f})", f"{serial:.2f}"]


def main(
    width: Annotated[int, typer.Option(min=1, help="Hidden units.")] = 256,
    steps: Annotated[int, typer.Option(min=GENERATIONS, help="Steps of a run.")] = 400,
    slots: Annotated[int, typer.Option(min=1, help="Trials of the population.")] = 4,
    shares: Annotated[
        str, typer.Option(help="Seconds to read over seconds to compute, with commas.")
    ] = "0.5,1,2",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of the three in turns.")] = 5,
    output: Annotated[Path | None, typer.Option(help="Write the tables as Markdown.")] = None,
) -> None:
    """Measure runs on a loader that sleeps, against the larger of reading and computing."""
    options = f"--width {width} --steps {steps} --slots {slots} --shares {shares} --rounds {rounds}"
    report = Report("Host data", f"python benchmarks/host_data.py {options}")
    report.say(
        f"An MLP of two hidden layers, batches of 64, One-Step, {steps} steps; {slots} slots in "
        f"{GENERATIONS} generations share one stream. The loader sleeps for every pair. Seconds "
        "are medians; each round measures reading alone, computing alone (from a loader that does "
        "not sleep) and both, and gives a ratio: the median over rounds, with quartiles. A ratio "
        "of 1 hides the smaller of the two wholly; the last column is the time over the sum of "
        "the two, which a loop without any overlap takes."
    )
    task = models.mlp(width)
    pair = jax.tree.map(np.asarray, (task.train_batch, task.val_batch))
    problem = dataclasses.replace(task.problem, batch=None, data=None, metrics=None, batches=())
    doors = {
        "solve": by_solve(problem, steps),
        "Population": by_population(problem, steps, slots),
        "loop of step": by_hand(problem, steps),
    }
    columns = ["door", "reading (s)", "computing (s)", "both (s)", "both / larger", "both / sum"]
    for share in (float(part) for part in shares.split(",")):
        rows = [row(name, run, pair, share, steps, rounds) for name, run in doors.items()]
        report.table(f"Reading takes {share:g} times computing", columns, rows)
    report.write(output)


if __name__ == "__main__":
    typer.run(main)
