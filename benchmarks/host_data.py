"""Slow loaders: how much of reading is hidden behind computing, and the other way round."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, TypeAlias

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


def host_problem(width: int) -> gradhpo.Problem:
    """Return an MLP's problem, for batches of the host."""
    made = models.mlp(width).problem
    return dataclasses.replace(made, batch=None, data=None, metrics=None, batches=())


TASK = models.mlp(8)
PAIR = jax.tree.map(np.asarray, (TASK.train_batch, TASK.val_batch))


class Loader:
    """Pairs of batches, each of which takes a while to read."""

    def __init__(self, pair: Any, seconds: float) -> None:
        self.pair, self.seconds = pair, seconds

    def __iter__(self) -> Iterator[Any]:
        while True:
            if self.seconds:
                time.sleep(self.seconds)
            yield self.pair


Door: TypeAlias = Callable[[Loader], Callable[[], Any]]
"""Returns what runs on a loader, its programs compiled."""


def by_solve(problem: gradhpo.Problem, steps: int) -> Door:
    """Return the door of `solve`."""

    def made(loader: Loader) -> Callable[[], Any]:
        given = dataclasses.replace(problem, batches=loader)
        gradhpo.solve(given, OPTIMIZER, 1, KEY, progress=False)
        return lambda: gradhpo.solve(given, OPTIMIZER, steps, KEY, progress=False).state

    return made


def by_population(problem: gradhpo.Problem, steps: int, slots: int) -> Door:
    """Return the door of a population whose slots share the loader, in four generations."""
    keys = jax.random.split(KEY, slots)

    def made(loader: Loader) -> Callable[[], Any]:
        given = dataclasses.replace(problem, batches=loader)
        population = Population(given, OPTIMIZER, slots, batching="vmap")
        first = population.init(KEY)
        population.run(first, 1, keys)

        def run() -> Any:
            state = first
            for _ in range(GENERATIONS):
                state, _ = population.run(state, steps // GENERATIONS, keys)
            return state

        return run

    return made


def by_hand(problem: gradhpo.Problem, steps: int) -> Door:
    """Return the door of a Python loop of `step`, which JAX's own asynchrony overlaps."""

    def made(loader: Loader) -> Callable[[], Any]:
        first = OPTIMIZER.init(*problem.start(KEY))

        def run(steps: int) -> Any:
            state, pairs = first, iter(loader)
            for _ in range(steps):
                train, val = next(pairs)
                state = OPTIMIZER.step(state, train, val, problem.train_loss, problem.val_loss)
            return state

        run(1)
        return lambda: run(steps)

    return made


def seconds(function: Callable[[], Any]) -> float:
    """Return how long a call takes, its arrays included."""
    started = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - started


def row(name: str, door: Door, share: float, steps: int, rounds: int) -> list[str]:
    """Measure reading alone, computing alone, and both, in turns in one process."""
    computing = door(Loader(PAIR, 0))
    # What `sleep` is told: the share of a step's computing.
    slow = Loader(PAIR, share * min(seconds(computing) for _ in range(2)) / steps)
    both = door(slow)

    def read() -> None:
        pairs = iter(slow)
        for _ in range(steps):
            next(pairs)

    times = np.array([[seconds(read), seconds(computing), seconds(both)] for _ in range(rounds)])
    ratios = times[:, 2] / times[:, :2].max(axis=1)
    low, median, high = np.percentile(ratios, [25, 50, 75])
    alone = [f"{value:.2f}" for value in np.median(times, axis=0)]
    serial = np.median(times[:, 2] / times[:, :2].sum(axis=1))
    return [name, *alone, f"{median:.2f} ({low:.2f}-{high:.2f})", f"{serial:.2f}"]


def waiting(problem: gradhpo.Problem, wait: float) -> gradhpo.Problem:
    """Return the problem with a training loss that also waits, as a host does for an accelerator.

    Its arithmetic is small, so that the cores of the host are free meanwhile.
    """

    def sleep(x: Any) -> Any:
        time.sleep(wait)
        return x

    def train_loss(params: Any, hyperparams: Any, batch: Any) -> Any:
        leaves, structure = jax.tree.flatten(batch)
        first = jax.pure_callback(sleep, leaves[0], leaves[0], vmap_method="broadcast_all")
        return problem.train_loss(params, hyperparams, structure.unflatten([first, *leaves[1:]]))

    return dataclasses.replace(problem, train_loss=train_loss)


def main(
    width: Annotated[int, typer.Option(min=1, help="Hidden units.")] = 256,
    steps: Annotated[int, typer.Option(min=GENERATIONS, help="Steps of a run.")] = 200,
    slots: Annotated[int, typer.Option(min=1, help="Trials of the population.")] = 4,
    shares: Annotated[
        str, typer.Option(help="Seconds to read over seconds to compute, with commas.")
    ] = "0.5,1,2",
    wait: Annotated[float, typer.Option(min=0, help="Seconds that the host waits.")] = 0.03,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of the three in turns.")] = 5,
    output: Annotated[Path | None, typer.Option(help="Write the tables as Markdown.")] = None,
) -> None:
    """Measure runs on a loader that sleeps, against the larger of reading and computing."""
    options = f"--width {width} --steps {steps} --slots {slots} --shares {shares} --rounds {rounds}"
    options += f" --wait {wait:g}"
    report = Report("Host data", f"python benchmarks/host_data.py {options}")
    report.say(
        f"An MLP of two hidden layers, batches of 64, One-Step, {steps} steps; {slots} slots in "
        f"{GENERATIONS} generations share one stream. The loader sleeps for every pair. Seconds "
        "are medians; each round measures reading alone, computing alone (from a loader that does "
        "not sleep) and both, and gives a ratio: the median over rounds, with quartiles. A ratio "
        "of 1 hides the smaller of the two wholly; the last column is the time over the sum of "
        "the two, which a loop without any overlap takes. First with a training loss that waits, "
        "as for an accelerator, and leaves the cores free; then with one that takes all cores, on "
        "which the loader must find its turn. (On a CPU a program that calls back into Python is "
        "not dispatched asynchronously, so a loop of steps that wait would show nothing. And the "
        f"callback, a millisecond of Python beside a wait of {1000 * wait:g} ms, takes turns with "
        "the loader at Python's lock, which an accelerator does not.)"
    )
    columns = ["door", "reading (s)", "computing (s)", "both (s)", "both / larger", "both / sum"]
    kinds = {
        "The host waits": waiting(host_problem(8), wait),
        "The host's cores compute": host_problem(width),
    }
    for kind, problem in kinds.items():
        doors = {
            "solve": by_solve(problem, steps),
            "Population": by_population(problem, steps, slots),
        }
        if kind != "The host waits":
            doors["loop of step"] = by_hand(problem, steps)
        for share in (float(part) for part in shares.split(",")):
            rows = [row(name, door, share, steps, rounds) for name, door in doors.items()]
            report.table(f"{kind}: reading takes {share:g} times computing", columns, rows)
    report.write(output)


if __name__ == "__main__":
    typer.run(main)
