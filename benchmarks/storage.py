"""What a sweep's checkpoints cost: share of a generation, MB/s against the disk's own, memory.

Every row is a sweep in a process of its own, with checkpoints after every generation and with none
but the last, one after the other. The disk's own rate is that of `dd` with fsync, which writes as
many bytes to the same folder in turns with a checkpoint in one file, and with two files side by
side, as a worker with two shards writes them.

    python benchmarks/storage.py --output benchmarks/storage.md
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import typer
from measure import Report

import gradhpo
from gradhpo import checkpoints
from gradhpo.cluster import SearchSpace, Sweep, loguniform

SLOTS, STEPS, BATCH, HIDDEN = 8, 10, 32, 2
HEADER = (
    "weights a slot", "MB a generation", "files", "generation, s", "with checkpoints, s", "share",
    "at the end, s", "MB/s of dd", "one file, of dd", "two files, of dd", "MB/s read", "peak, GB",
    "without, GB",
)  # fmt: skip


def problem(weights: int) -> gradhpo.Problem:
    """Return a perceptron with about so many weights, all of them in square layers."""
    width = max(8, round((weights / HIDDEN) ** 0.5))

    def init(key: jax.Array) -> Any:
        layers = jax.random.normal(key, (HIDDEN, width, width)) / width**0.5
        return layers, {"log_decay": jnp.asarray(-9.0)}

    def loss(w: Any, batch: jax.Array) -> jax.Array:
        made = batch
        for layer in w:
            made = jax.nn.tanh(made @ layer)
        return jnp.mean((made - batch[:, ::-1]) ** 2)

    return gradhpo.Problem(
        init=init,
        train_loss=lambda w, lam, b: loss(w, b) + jnp.exp(lam["log_decay"]) * jnp.sum(w**2),
        val_loss=lambda w, lam, b: loss(w, b),
        batch=lambda key, data: tuple(jax.random.normal(key, (2, BATCH, width))),
        data=lambda key: jnp.zeros(()),
    )


def sweep(folder: str, weights: int, generations: int, every: int) -> dict[str, float]:
    """Run a sweep in this process; return its times and memory."""
    times: list[float] = []
    Sweep(
        problem=problem(weights),
        optimizer=gradhpo.OneStepOptimizer(optax.adam(1e-3), optax.adam(1e-2)),
        space=SearchSpace({"log_decay": loguniform(1e-6, 1e-3, stored="log")}),
        population=SLOTS,
        generations=generations,
        steps_per_generation=STEPS,
        storage=folder,
        executor="local",
        batching="map",
        checkpoint_every=every,
        progress=False,
    ).run(callback=lambda generation, table: times.append(time.perf_counter()))
    seconds = np.diff(times)
    return {
        "generation": statistics.median(seconds[:-1]),
        "end": float(seconds[-1]),
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    }


def disk(folder: Path, size: int, rounds: int = 9) -> list[str]:
    """Return MB/s of dd, what share of it checkpoints reach in one file and in two, and MB/s read.

    Medians of rounds in which they take turns.
    """
    rng = np.random.default_rng(0)
    arrays = {str(i): rng.random(size // 4 // 4, np.float32) for i in range(4)}
    halves = [{n: arrays[n] for n in part} for part in ("01", "23")]
    seconds: list[tuple[float, float, float, float]] = []
    with ThreadPoolExecutor(2) as pool:
        for _ in range(rounds):
            began = time.perf_counter()
            saved = checkpoints.save(folder, "written", arrays, {})
            one = time.perf_counter()
            checkpoints.load(folder, saved)
            read = time.perf_counter()
            list(pool.map(lambda i: checkpoints.save(folder, f"half-{i}", halves[i], {}), range(2)))
            two = time.perf_counter()
            counts = [f"bs={1 << 20}", f"count={max(1, size >> 20)}", "conv=fsync"]
            dd = ["dd", "if=/dev/zero", f"of={folder}/dd", *counts]
            subprocess.run(dd, check=True, capture_output=True)
            end = time.perf_counter()
            seconds.append((one - began, two - read, end - two, read - one))
            for path in folder.iterdir():
                path.unlink()
    mb, (_, _, by_dd, reading) = size / 1e6, map(statistics.median, zip(*seconds, strict=True))
    shares = [statistics.median(row[2] / row[which] for row in seconds) for which in (0, 1)]
    return [f"{mb / by_dd:.0f}", *(f"{share:.0%}" for share in shares), f"{mb / reading:.0f}"]


def row(weights: int, generations: int, place: Path) -> list[str]:
    """Measure one size."""
    measured: dict[int, dict[str, float]] = {}
    size = files = 0
    for every in (generations, 1):
        with tempfile.TemporaryDirectory(dir=place) as folder:
            asked = [str(weights), "--child", folder, "--generations", str(generations)]
            command = [sys.executable, __file__, *asked, "--every", str(every)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            measured[every] = json.loads(done.stdout.splitlines()[-1])
            found = list(Path(folder).glob(f"checkpoints/{generations - 1:06d}/*"))
            size, files = sum(path.stat().st_size for path in found), len(found)
    with tempfile.TemporaryDirectory(dir=place) as folder:
        rates = disk(Path(folder), size)
    plain, saving = measured[generations], measured[1]
    share = 1 - plain["generation"] / saving["generation"]
    return [
        f"{weights:,}", f"{size / 1e6:.0f}", str(files),
        f"{plain['generation']:.2f}", f"{saving['generation']:.2f}", f"{share:.1%}",
        f"{saving['end']:.2f}",
        *rates,
        f"{saving['peak']:.2f}", f"{plain['peak']:.2f}",
    ]  # fmt: skip


def main(
    weights: Annotated[list[int] | None, typer.Argument(help="Of a slot.")] = None,
    generations: Annotated[int, typer.Option(min=4, help="Of each sweep.")] = 6,
    place: Annotated[Path, typer.Option(help="A folder on the disk to measure.")] = Path("."),
    output: Annotated[Path | None, typer.Option(help="Write the table as Markdown.")] = None,
    child: Annotated[str, typer.Option(hidden=True)] = "",
    every: Annotated[int, typer.Option(hidden=True)] = 1,
) -> None:
    """Print the table, and write it where asked."""
    sizes = weights or [100_000, 1_000_000, 4_000_000, 16_000_000]
    if child:
        print(json.dumps(sweep(child, sizes[0], generations, every)))
        return
    rows: list[list[str]] = []
    for size in sizes:
        rows.append(row(size, generations, place))
        print(dict(zip(HEADER, rows[-1], strict=True)), flush=True)
    options = f"{' '.join(map(str, sizes))} --generations {generations}"
    report = Report("Checkpoints", f"python benchmarks/storage.py {options}")
    report.say(
        f"{SLOTS} slots in one shard, Adam, {STEPS} steps a generation, medians of {generations} "
        "generations, with checkpoints after every one and with none but the last, one after the "
        'other. "At the end" is what the last generation, after which nothing computes, waits for '
        "its files. dd writes as many bytes to the same folder, with fsync, in turns with "
        "checkpoints in one file, and in two side by side, as a worker with two shards writes them."
    )
    report.table("A generation", list(HEADER), rows)
    report.write(output)


if __name__ == "__main__":
    typer.run(main)
