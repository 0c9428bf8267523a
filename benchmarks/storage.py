"""What a sweep's checkpoints cost: share of a generation, MB/s against the disk's own, memory.

Every row is a sweep in a process of its own, with checkpoints after every generation and with none
but the last, one after the other; `dd` writes as many bytes to the same folder, with fsync.

    python benchmarks/storage.py --output benchmarks/storage.md
"""

from __future__ import annotations

import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import typer

import gradhpo
from gradhpo import checkpoints
from gradhpo.cluster import SearchSpace, Sweep, loguniform

SLOTS, STEPS, BATCH, HIDDEN = 8, 10, 32, 2
HEADER = (
    "weights a slot", "MB a generation", "files", "generation, s", "with checkpoints, s", "share",
    "at the end, s", "MB/s written", "MB/s of dd", "of dd", "MB/s read", "peak, GB", "without, GB",
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


def disk(folder: Path, size: int, parts: int, rounds: int = 3) -> tuple[float, float, float]:
    """Return MB/s of a checkpoint that is written, of dd, and of one that is read; medians."""
    rng = np.random.default_rng(0)
    arrays = {str(i): rng.random(size // parts // 4, np.float32) for i in range(parts)}
    rates: list[tuple[float, float, float]] = []
    for _ in range(rounds):
        started = time.perf_counter()
        saved = checkpoints.save(folder, "written", arrays, {})
        written = time.perf_counter()
        checkpoints.load(folder, saved)
        read = time.perf_counter()
        (folder / saved.file).unlink()
        counts = [f"bs={1 << 20}", f"count={max(1, size >> 20)}", "conv=fsync"]
        began = time.perf_counter()
        subprocess.run(
            ["dd", "if=/dev/zero", f"of={folder}/dd", *counts], check=True, capture_output=True
        )
        ended = time.perf_counter()
        (folder / "dd").unlink()
        rates.append((written - started, ended - began, read - written))
    mb = size / 1e6
    seconds = [statistics.median(column) for column in zip(*rates, strict=True)]
    return mb / seconds[0], mb / seconds[1], mb / seconds[2]


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
        written, dd, read = disk(Path(folder), size, parts=3)
    plain, saving = measured[generations], measured[1]
    share = 1 - plain["generation"] / saving["generation"]
    return [
        f"{weights:,}", f"{size / 1e6:.0f}", str(files),
        f"{plain['generation']:.2f}", f"{saving['generation']:.2f}", f"{share:.1%}",
        f"{saving['end']:.2f}",
        f"{written:.0f}", f"{dd:.0f}", f"{written / dd:.0%}", f"{read:.0f}",
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
    lines = [HEADER, ["---"] * len(HEADER), *rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    about = (
        f"{platform.platform()}, Python {platform.python_version()}, jax {jax.__version__}, "
        f"gradhpo {gradhpo.__version__}, {len(jax.devices())} CPU device"
    )
    text = f"{__doc__.splitlines()[0] if __doc__ else ''}\n\n{about}\n\n{table}\n"
    print(text)
    if output is not None:
        output.write_text(text)


if __name__ == "__main__":
    typer.run(main)
