"""A sweep against Ray Tune and against a loop by hand: trial-steps a second on the same cores."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import hand_loop
import numpy as np
import trials
import typer
from measure import Report, cores

from gradhpo.cluster import PBT, SearchSpace, Sweep, loguniform
from gradhpo.cluster.events import Event, GenerationDone
from gradhpo.cluster.storage import Storage


class Row(NamedTuple):
    """What was measured of one way to run the trials."""

    name: str
    rate: float
    """Trial-steps a second, once running."""
    startup: float
    """Seconds until the first generation (of any trial) was done."""
    generations: float
    """Measured, of all trials."""
    layout: str = "–"
    parts: str = ""
    """Where the start went, as the sweep says."""


class Generations:
    """Observes when generations were saved, and how long the first took to compute."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.first = 0.0

    def observe(self, event: Event) -> None:
        """Take note of one."""
        if isinstance(event, GenerationDone):
            self.first = self.first or event.seconds
            self.times.append(time.perf_counter())


def this_sweep(workers: int, n: int, steps: int, generations: int, again: bool = False) -> Row:
    """Measure a sweep through Ray, in two shards however many workers hold them."""
    with tempfile.TemporaryDirectory() as folder:
        sweep = Sweep(
            problem="trials:problem",
            optimizer="trials:optimizer",
            space=SearchSpace({"log_decay": loguniform(trials.LOW, trials.HIGH, stored="log")}),
            population=n,
            generations=generations,
            steps_per_generation=steps,
            scheduler=PBT(trials.QUANTILE, trials.RESAMPLE, trials.FACTORS),
            storage=folder,
            shards=cores(),
            workers=workers,
            executor="ray",
            progress=False,
        )
        seen = Generations()
        result = sweep.run(observers=[seen])
        assert result.report is not None
        assert result.report.workers_lost == 0
        layout = str(json.loads(Storage(folder).programs.read_text())[0]["batching"])
    seconds = np.diff(seen.times)
    name = f"this sweep, {workers} worker{'s' if workers > 1 else ''}{', again' * again}"
    # A generation is told when it is durable, which is one later.
    start, parts = result.report.startup_seconds + seen.first, result.report.start()
    return Row(name, _rate(n, steps, seconds), start, len(seconds), layout, parts)


def by_hand(processes: int, n: int, steps: int, generations: int) -> Row:
    """Measure the loop by hand."""
    seconds, startup, layout = hand_loop.measure(processes, n, steps, generations)
    name = f"by hand, {processes} process{'es' if processes > 1 else ''}"
    return Row(name, _rate(n, steps, seconds), startup, len(seconds), layout)


def ray_tune(best: bool, n: int, steps: int, generations: int, budget: float) -> Row:
    """Measure Ray Tune."""
    import tune_trials

    rate, startup, results = tune_trials.measure(best, n, steps, generations, budget)
    name = "Ray Tune, its best" if best else "Ray Tune, defaults"
    return Row(name, rate * steps, startup, results / n)


def _rows(n: int, steps: int, generations: int, budget: float) -> Iterator[Row]:
    for measure in (
        lambda: this_sweep(cores(), n, steps, generations),
        lambda: this_sweep(cores(), n, steps, generations, again=True),
        lambda: by_hand(cores(), n, steps, generations),
        lambda: by_hand(1, n, steps, generations),
        lambda: this_sweep(1, n, steps, generations),
        lambda: ray_tune(True, n, steps, generations, budget),
        lambda: ray_tune(False, n, steps, generations, budget),
    ):
        row = measure()
        print(f"{n} trials, {row.name}: {row.rate:,.0f} trial-steps/s", flush=True)
        yield row


def _rate(n: int, steps: int, seconds: Any) -> float:
    return n * steps / float(np.median(seconds))


def main(
    populations: Annotated[str, typer.Option(help="Trials, with commas.")] = "64,256",
    steps: Annotated[int, typer.Option(min=1, help="Of a trial in a generation.")] = 100,
    generations: Annotated[int, typer.Option(min=2, help="The first is not measured.")] = 12,
    budget: Annotated[float, typer.Option(help="Seconds for each run of Ray Tune.")] = 40,
    output: Annotated[Path | None, typer.Option(help="Write the tables as Markdown.")] = None,
) -> None:
    """Measure population-based training of MLPs with One-Step in four ways."""
    counts = [int(text) for text in populations.split(",")]
    with tempfile.TemporaryDirectory() as cache:
        os.environ["GRADHPO_CACHE"] = cache  # the first sweep of a size finds nothing in it
        # Before the report, which starts JAX here: a sweep's driver does without.
        rows = {n: list(_rows(n, steps, generations, budget)) for n in counts}
    options = f"--populations {populations} --steps {steps} --generations {generations}"
    report = Report("Sweeps", f"python benchmarks/sweep.py {options} --budget {budget:g}")
    report.say(
        f"Population-based training of MLPs of two hidden layers of {trials.WIDTH}, batches of 64, "
        f"λ of 257 numbers, One-Step, {steps} steps in a generation, all on {cores()} cores. Rates "
        "are of the median generation; start-up is what comes before, Ray's own start too, and the "
        "first generation. The layout is a model's choice on a CPU; elsewhere one that starts "
        "again finds it in the user's cache. "
        f"Ray Tune gets {budget:g} s (or {generations} generations): its rate is that of all "
        "results after the first one, and counts the starts of its other trials, which it runs "
        f"{cores()} at a time, one an actor. By hand nothing is written to disk, and processes do "
        "not exchange trials; a sweep saves every trial in every generation."
    )
    for n in counts:
        columns = ["", "trial-steps/s", "this sweep is", "start-up, s", "generations", "layout"]
        ours = rows[n][0].rate
        lines = [
            [
                row.name,
                f"{row.rate:,.0f}",
                f"{ours / row.rate:.2f}×",
                f"{row.startup:.1f}",
                f"{row.generations:.1f}",
                row.layout,
            ]
            for row in rows[n]
        ]
        report.table(f"{n} trials", columns, lines)
        tune = next(row.startup for row in rows[n] if row.name == "Ray Tune, its best")
        starts = [
            [row.name, f"{row.startup:.1f}", f"{row.startup / tune:.2f}×", row.parts]
            for row in rows[n]
            if row.parts
        ]
        columns = ["", "to the first generation, s", "Ray Tune's", "of these"]
        report.table(f"Starts of {n} trials", columns, starts)
    report.write(output)


if __name__ == "__main__":
    typer.run(main)
