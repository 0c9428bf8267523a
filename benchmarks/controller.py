"""The controller alone, with stubs for workers: trial-results a second, and memory over time."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from measure import Report

from gradhpo.checkpoints import Saved
from gradhpo.cluster import (
    ASHA,
    PBT,
    RandomSearch,
    SearchSpace,
    SuccessiveHalving,
    controller,
    loguniform,
    uniform,
)
from gradhpo.cluster.columns import Columns
from gradhpo.cluster.controller import Controller
from gradhpo.cluster.events import Event, GenerationDone
from gradhpo.cluster.executor import Executor
from gradhpo.cluster.journal import Journal
from gradhpo.cluster.objectives import Objectives
from gradhpo.cluster.orders import Checkpoint, Order, Prepared, Result
from gradhpo.cluster.plan import Layout, Rules
from gradhpo.cluster.stopping import Stopping
from gradhpo.cluster.storage import Storage
from gradhpo.state import METRICS

SPACE = SearchSpace({"log_rate": loguniform(1e-4, 1e-1, stored="log"), "decay": uniform(0, 1)})
SCHEDULERS = {
    "PBT": PBT(),
    "SuccessiveHalving": SuccessiveHalving(),
    "RandomSearch": RandomSearch(5),
}
PHASES = ("orders", "gather", "decide", "_commit", "_prune")
"""Of `controller` and `Controller`, in the order of a generation."""
Clock = Callable[[], float]
DIVERGED = 0.01
"""Of the trials, in every generation."""


class Stub(Executor):
    """Workers that answer at once: random columns, and an empty file for each checkpoint."""

    def __init__(self, storage: Path, layout: Layout, clock: Clock, seed: int = 0) -> None:
        self._storage, self._layout, self._saved = storage, layout, dict[int, Saved]()
        self._clock = clock
        rng, n = np.random.default_rng(seed), layout.population
        names = [*METRICS, *(f"hyperparams.{name}" for name in SPACE.hyperparams)]
        pool = {name: rng.random(n, np.float32) for name in names}
        pool["val_loss"][rng.random(n) < DIVERGED] = np.nan
        self._pool: Columns = {**pool, "diverged_at": np.zeros(n, np.int32)}
        self.seconds = 0.0
        """Spent here, and not by the controller."""

    def prepare(self, layouts: Mapping[int, Any], needed: Sequence[int]) -> list[Prepared]:
        """Compile nothing."""
        del layouts, needed
        return []

    def run(self, orders: list[Order]) -> list[Result]:
        """Return other numbers in every generation."""
        started = self._clock()
        folder = f"checkpoints/{orders[0].generation:06d}"
        (self._storage / folder).mkdir(parents=True)
        results = [self._result(order, folder) for order in orders]
        self.seconds += self._clock() - started
        return results

    def checkpoints(self, orders: list[Order]) -> list[Saved]:
        """Return those of the last generation."""
        return [self._saved[order.shard] for order in orders]

    def close(self) -> None:
        """Nothing was started."""

    def _result(self, order: Order, folder: str) -> Result:
        saved = self._saved.get(order.shard)
        before = None if saved is None else Checkpoint(order.generation - 1, saved)
        part = self._layout.part((order.shard + order.generation) % self._layout.shards)
        file = f"{folder}/shard-{order.shard:04d}-i1-0123456789abcdef.arrays"
        (self._storage / file).touch()
        columns = {name: column[part] for name, column in self._pool.items()}
        self._saved[order.shard] = Saved(file, "0123456789abcdef" * 4)
        return Result(
            order.shard, order.generation, columns, () if before is None else (before,), 1, 0.0
        )


class Phases:
    """Seconds spent in each of `PHASES` while this is open."""

    def __init__(self, clock: Clock = time.perf_counter) -> None:
        self._clock = clock
        self.seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)

    def __enter__(self) -> Phases:
        self._before = {name: getattr(self._owner(name), name) for name in PHASES}
        for name, function in self._before.items():
            setattr(self._owner(name), name, self._timed(name, function))
        return self

    def __exit__(self, *exc: object) -> None:
        for name, function in self._before.items():
            setattr(self._owner(name), name, function)

    def _owner(self, name: str) -> Any:
        return Controller if name.startswith("_") else controller

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            started = self._clock()
            made = function(*args)
            self.seconds[name] += self._clock() - started
            return made

        return timed


def run(
    layout: Layout, scheduler: Any, generations: int, after: Callable[[int], None]
) -> tuple[float, float]:
    """Run a controller on stubs; return its seconds, and the stubs'."""
    with tempfile.TemporaryDirectory() as folder:
        return drive(Path(folder), layout, scheduler, generations, after)


def drive(
    storage: Path,
    layout: Layout,
    scheduler: Any,
    generations: int,
    after: Callable[[int], None] = lambda generation: None,
    clock: Clock = time.perf_counter,
) -> tuple[float, float]:
    """Do what `run` does, in a folder that stays, by any clock."""
    stub = Stub(storage, layout, clock)

    def tell(event: Event) -> None:
        if isinstance(event, GenerationDone):
            after(event.generation)

    rules = Rules(scheduler, SPACE, 0, Objectives({"val_loss": 1}))
    stopping = Stopping(Storage(storage), None, rules.objectives, 0.0, tell)
    made = Controller(Storage(storage), Journal(storage), stub, layout, rules, tell, stopping)
    started = clock()
    made.run(generations)
    return clock() - started - stub.seconds, stub.seconds


def rate_row(name: str, layout: Layout, generations: int) -> list[str]:
    """Measure how many trial-results a second a scheduler's sweep can take in."""
    with Phases() as phases:
        seconds, _ = run(layout, SCHEDULERS[name], generations, lambda generation: None)
    rate = layout.population * generations / seconds
    parts = [f"{phases.seconds[phase] / generations:.2f}" for phase in PHASES]
    return [name, f"{rate:,.0f}", f"{seconds / generations:.2f}", *parts]


def memory_rows(
    layout: Layout, generations: int, scheduler: Any, points: int = 10
) -> list[list[str]]:
    """Measure this process's memory while many generations run."""
    rows: list[list[str]] = []
    every, before = max(1, generations // points), time.perf_counter()

    def after(generation: int) -> None:
        nonlocal before
        if generation % every == 0:
            now = time.perf_counter()
            taken, before = 1e3 * (now - before) / every, now
            rows.append([f"{generation:,}", f"{resident():.1f}", f"{taken:.1f}"])

    run(layout, scheduler, generations, after)
    return rows


def resident() -> float:
    """Return this process's resident memory, in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return float("nan")


def main(
    workers: Annotated[int, typer.Option(min=1, help="Stubs, a shard each.")] = 1000,
    slots: Annotated[int, typer.Option(min=1, help="Of each.")] = 1024,
    generations: Annotated[int, typer.Option(min=1, help="For each scheduler.")] = 4,
    memory: Annotated[int, typer.Option(min=1, help="Generations of the memory's run.")] = 10_000,
    history: Annotated[int, typer.Option(min=1, help="Generations that ASHA looks at.")] = 1000,
    output: Annotated[Path | None, typer.Option(help="Write the tables as Markdown.")] = None,
) -> None:
    """Measure the controller: decisions, journal and gather, with workers that take no time."""
    options = f"--workers {workers} --slots {slots} --generations {generations}"
    options += f" --memory {memory} --history {history}"
    report = Report("The controller", f"python benchmarks/controller.py {options}")
    small = Layout(variants=1, shards=8, slots=16)
    rows = memory_rows(
        small, memory, PBT()
    )  # first: what a large table leaves free would hide a leak
    layout = Layout(variants=1, shards=workers, slots=slots)
    report.say(
        f"{workers:,} workers of {slots:,} slots, as stubs that answer at once with random columns "
        f"({DIVERGED:.0%} of the trials diverged) and an empty file for each checkpoint; their own "
        "time does not count. Everything else is what a sweep's driver does, fsync included. "
        "Seconds are of one generation: orders for the shards, the gathered table, the decision, "
        "the table and the journal's line on disk, the removal of old checkpoints."
    )
    columns = ["scheduler", "trial-results/s", "s", "orders", "gather", "decide", "commit", "prune"]
    rates = [rate_row(name, layout, generations) for name in SCHEDULERS]
    report.table("Trial-results a second", columns, rates)
    report.say(
        f"Memory, in a run of its own before that: PBT, {small.shards} workers of {small.slots} "
        f"slots. From generation {rows[0][0]} to {rows[-1][0]} it grew by "
        f"{float(rows[-1][1]) - float(rows[0][1]):.1f} MiB."
    )
    columns = ["generation", "resident MiB", "ms a generation"]
    report.table("The driver's memory", columns, rows)
    report.say(
        "ASHA asks for every table before its own: each is kept in memory, and read from the "
        "storage once after a resume. A sweep of 512 slots."
    )
    rows = memory_rows(Layout(variants=1, shards=8, slots=64), history, ASHA())
    report.table("A scheduler that sees history", columns, rows)
    report.write(output)


if __name__ == "__main__":
    typer.run(main)
