"""Scaling on paper: what limits a sweep at 10, 1,000 and 100,000 accelerators.

What one process does is measured here: the driver's controller with stubs for workers, the state
machine that decides about workers, the bytes of what they write. Checkpoints, disks and collectives
come from the tables of the other benchmarks. The rest is multiplication.

    python benchmarks/scaling.py --output benchmarks/scaling.md
"""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from controller import PHASES, SCHEDULERS, Phases, drive, resident
from measure import Report

from gradhpo.checkpoints import Saved
from gradhpo.cluster import journal
from gradhpo.cluster.commands import Answered, Command, Job, Send, Start
from gradhpo.cluster.fleet import Fleet, Limits
from gradhpo.cluster.incarnations import Incarnations
from gradhpo.cluster.plan import Layout
from gradhpo.cluster.storage import Storage

HERE = Path(__file__).parent
SIZES = (10, 1_000, 100_000)
"""Accelerators: a worker and a shard for each."""
MEASURED = (10, 1_000, 10_000)
"""Of those that are measured; what is larger is computed from the last, in proportion."""
DIGEST = "0123456789abcdef" * 4
PULSE = 5.0
"""Seconds between two signs of life of a worker, at `heartbeat=60`."""
LOOKS = 20


def cell(file: str, row: str, column: str) -> float:
    """Return a number from a table of another benchmark's results."""
    table = [
        [text.strip() for text in line.strip("|\n ").split("|")]
        for line in (HERE / file).read_text().splitlines()
        if line.startswith("|")
    ]
    header = next(cells for cells in table if column in cells)
    found = next(cells for cells in table if cells[0] == row and len(cells) == len(header))
    return float(found[header.index(column)].replace(",", "").rstrip("%"))


# --- bytes ----------------------------------------------------------------------------------------

REDUCED: dict[str, Callable[[int, int, int], int]] = {
    "First-Order": lambda w, lam, T: w,
    "One-Step": lambda w, lam, T: 2 * w + lam,
    "T1-T2": lambda w, lam, T: 2 * (w + lam),
    "Greedy": lambda w, lam, T: T * (2 * w + lam),
    "HyperDistill": lambda w, lam, T: 3 * w + lam,
}
"""Bytes that a data-parallel step reduces beside its two losses: the gradients of w bytes of
weights and lam bytes of λ, where λ is not in the validation loss; T inner steps."""


def line_bytes(shards: int) -> int:
    """Return the bytes of a generation's line in the journal."""
    files = [f"checkpoints/000123/shard-{n:04d}-i1-{DIGEST[:16]}.arrays" for n in range(shards)]
    saved = [Saved(file, DIGEST) for file in files]
    best = {"score": 0.123456, "trial": 7, "slot": 7, "generation": 99, "checkpoint": saved[0]}
    table = Saved(f"tables/000123-{DIGEST[:16]}.arrays", DIGEST)
    entry = {"generation": 123, "table": table, "checkpoints": saved, "best": best, "seconds": 1.5}
    return len(journal.encode(entry))  # pyright: ignore[reportArgumentType]


def incarnations_bytes(shards: int) -> int:
    """Return the bytes that a worker reads for each checkpoint: who owns which shard."""
    with tempfile.TemporaryDirectory() as folder:
        Incarnations(folder).own({shard: shard + 1 for shard in range(shards)})
        return len(Storage(folder).incarnations.read_text())


# --- times ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Driven:
    """What a generation of the driver takes, workers and devices left out."""

    seconds: float
    phases: dict[str, float]
    table: int
    """Bytes."""
    memory: float
    """Resident, MiB."""


def driven(workers: int, slots: int, generations: int) -> Driven:
    """Measure the controller: one shard a worker, PBT; its own seconds, and none that it waits."""
    layout, clock = Layout(variants=1, shards=workers, slots=slots), time.process_time
    with tempfile.TemporaryDirectory() as folder, Phases(clock) as phases:
        seconds, _ = drive(Path(folder), layout, SCHEDULERS["PBT"], generations, clock=clock)
        tables = sorted(Path(folder, "tables").glob("*.arrays"))
        size, memory = tables[-1].stat().st_size, resident()
    parts = {name: phases.seconds[name] / generations for name in PHASES}
    return Driven(seconds / generations, parts, size, memory)


@dataclasses.dataclass(frozen=True)
class Decided:
    """What the fleet takes to decide."""

    first: float
    """Seconds to give every worker its shard for the first time."""
    look: float
    """Seconds for one look at one answer, in the middle of a generation."""


def decided(workers: int) -> Decided:
    """Measure a fleet in which every worker has one shard."""
    fleet = Fleet(Limits(workers), workers, itertools.count(1).__next__)
    runs = [Job("run", 0, shard, generation=0) for shard in range(workers)]
    starts = [one for one in fleet.ask(0.0, []) if isinstance(one, Start)]
    fleet.step(0.0, *(Answered(one.worker, one.call) for one in starts))
    began = time.process_time()
    sent = _sent(fleet.ask(0.0, runs))
    first = time.process_time() - began
    sent = _sent(fleet.step(0.0, *(Answered(one.worker, one.call) for one in sent)))
    assert len(sent) == workers, "all have their programs, and run"
    began = time.process_time()
    for one in sent[:LOOKS]:
        fleet.step(0.0, Answered(one.worker, one.call))
    looks = min(LOOKS, workers)
    return Decided(first, (time.process_time() - began) / looks)


def _sent(commands: list[Command]) -> list[Send]:
    return [one for one in commands if isinstance(one, Send)]


# --- tables ---------------------------------------------------------------------------------------


def driver_row(workers: int, slots: int, made: Driven, times: float = 1) -> list[str]:
    """Return what a generation of the driver takes: as measured, or so many times as much."""
    about = "≈ " if times != 1 else ""
    parts = [f"{about}{times * x:.3f}" for x in (made.seconds, *made.phases.values())]
    sizes = [f"{line_bytes(workers):,}", f"{about}{times * made.table:,.0f}"]
    memory = "–" if about else f"{made.memory:,.0f}"
    return [f"{workers:,}", f"{workers * slots:,}", *parts, *sizes, memory]


def fleet_row(workers: int, made: Decided, times: float = 1) -> list[str]:
    """Return what the fleet takes: as measured, or so many times as much."""
    about = "≈ " if times != 1 else ""
    return [f"{workers:,}", *(f"{about}{1e3 * times * x:,.2f}" for x in (made.first, made.look))]


def grown_row(workers: int, slots: int, weights: int, seconds: float) -> list[str]:
    """Return what multiplication says of a generation of so many seconds."""
    per_weight = cell("storage.md", "1,000,000", "MB a generation") / 8  # slots of a million
    disk = cell("storage.md", "1,000,000", "MB/s of dd") / 1e3
    gigabytes = workers * slots * per_weight * weights / 1e9
    owned = workers * incarnations_bytes(workers) / 1e9
    return [
        f"{workers:,}",
        f"{gigabytes:,.0f}",
        f"{gigabytes / seconds:,.1f}",
        f"{gigabytes / seconds / disk:,.1f}",
        f"{owned:,.3f}",
        f"{1000 * line_bytes(workers) / 1e9:,.3f}",
        f"{workers / PULSE:,.0f}",
    ]


def reduced_row(method: str, weights: int, lam: int, T: int, link: float) -> list[str]:
    """Return what a data-parallel step reduces, and how long a ring of fast links takes for it."""
    moved = REDUCED[method](4 * weights, 4 * lam, T)
    steps = T if method == "Greedy" else 1
    least = 2 * moved / (link * 1e9)
    return [method, str(steps), f"{moved / 1e6:,.0f}", f"{1e3 * least:,.1f}"]


def main(
    slots: Annotated[int, typer.Option(min=1, help="Trials of an accelerator.")] = 8,
    weights: Annotated[int, typer.Option(min=1, help="Of a trial.")] = 10_000_000,
    lam: Annotated[int, typer.Option(min=0, help="Numbers in λ.")] = 1_000,
    unroll: Annotated[int, typer.Option(min=1, help="Inner steps of Greedy.")] = 5,
    seconds: Annotated[float, typer.Option(min=0.1, help="Of a generation.")] = 60,
    link: Annotated[float, typer.Option(min=0.1, help="Assumed GB/s between devices.")] = 50,
    generations: Annotated[int, typer.Option(min=2, help="Measured at each size.")] = 3,
    output: Annotated[Path | None, typer.Option(help="Write the tables as Markdown.")] = None,
) -> None:
    """Compute what limits a sweep at 10, 1,000 and 100,000 accelerators."""
    report = Report("Scaling on paper", "python benchmarks/scaling.py")
    report.say(
        f"A worker and a shard of {slots} trials for each accelerator; PBT. Measured here, in "
        "seconds of one core, without what waits for the disk: the driver's part of a "
        "generation, workers as stubs; the state machine that decides about workers; and what "
        "is written. What has ≈ is computed from the row before, in proportion. docs/scaling.md "
        "says what it means."
    )
    columns = ["accelerators", "trials", "driver, s", "orders", "gather", "decide", "commit"]
    columns += ["prune", "journal line, B", "table, B", "resident, MiB"]
    rows = [driver_row(n, slots, driven(n, slots, generations)) for n in MEASURED[:-1]]
    last, times = driven(MEASURED[-1], slots, generations), SIZES[-1] / MEASURED[-1]
    rows += [driver_row(MEASURED[-1], slots, last), driver_row(SIZES[-1], slots, last, times)]
    report.table("The driver", columns, rows)
    columns = ["workers", "first assignment, ms", "a look, ms"]
    rows = [fleet_row(n, decided(n)) for n in MEASURED[:-1]]
    largest = decided(MEASURED[-1])
    rows += [fleet_row(MEASURED[-1], largest), fleet_row(SIZES[-1], largest, times)]
    report.table("The fleet", columns, rows)
    columns = ["accelerators", "checkpoints, GB", "GB/s", "disks", "ownership read, GB"]
    columns += ["journal of 1,000 generations, GB", "signs of life a second"]
    report.say(
        f"Trials of {weights:,} weights with Adam, a generation of {seconds:g} s, checkpoints "
        "after every one, over the whole generation; a disk is the one of storage.md."
    )
    rows = [grown_row(n, slots, weights, seconds) for n in SIZES]
    report.table("What grows with the sweep", columns, rows)
    report.say(
        f"A data-parallel step with {weights:,} weights and {lam:,} numbers in λ, float32, by the "
        "formulas that the bytes of data_parallel.md obey; ms are the least that a ring takes at "
        f"{link:g} GB/s, an assumption."
    )
    columns = ["method", "inner steps", "reduced, MB", "ms at least"]
    rows = [reduced_row(method, weights, lam, unroll, link) for method in REDUCED]
    report.table("A data-parallel step", columns, rows)
    report.write(output)


if __name__ == "__main__":
    typer.run(main)
