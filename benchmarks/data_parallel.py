"""Data-parallel steps: collectives, bytes moved, and time against one device."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

if "XLA_FLAGS" not in os.environ:  # before JAX starts; it has no effect on other platforms
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import re

import jax
import models
import numpy as np
import typer
from measure import Report, paired_ratio
from step_cost import optimizers

import gradhpo
from gradhpo.parallel import data_parallel, make_mesh
from gradhpo.state import prepare

OPERATIONS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
SIZES = {"f64": 8, "f32": 4, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "pred": 1}


def collectives(hlo: str) -> tuple[int, int]:
    """Return how many collectives a program holds, and the bytes of their results."""
    count = moved = 0
    pattern = rf"= (.*?) (?:{'|'.join(OPERATIONS)})(?:-start)?\("
    for result in re.findall(pattern, hlo):
        count += 1
        for kind, shape in re.findall(r"(\w+)\[([\d,]*)\]", result):
            moved += SIZES.get(kind, 4) * int(np.prod([int(n) for n in shape.split(",") if n]))
    return count, moved


def row(
    task: models.Task, name: str, method: str, devices: int, backend: Any, rounds: int
) -> list[str]:
    """Measure a method's step on some devices against the same step on one."""
    one = optimizers()[method]
    many = data_parallel(one, make_mesh(data=devices), backend=backend)
    losses = (task.problem.train_loss, task.problem.val_loss)
    batches = (task.train_batch, task.val_batch)

    def stepper(optimizer: gradhpo.BilevelOptimizer) -> Any:
        state = prepare(optimizer.init(*task.start()))
        return lambda: optimizer.step(state, *batches, *losses)

    state = prepare(many.init(*task.start()))
    compiled = many.lower_step(state, *batches, *losses).compile()
    count, moved = collectives(str(compiled.as_text()))
    ratio, low, high = paired_ratio(stepper(many), stepper(one), rounds)
    times = f"{ratio:.2f} ({low:.2f}-{high:.2f})"
    efficiency = f"{100 / (ratio * devices):.0f}%"
    return [name, method, backend, str(devices), str(count), f"{moved:,}", times, efficiency]


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Paired rounds for each ratio.")] = 5,
    output: Annotated[Path | None, typer.Option(help="Write the table as Markdown.")] = None,
) -> None:
    """Measure data-parallel steps. Devices of one processor share its cores: none gains there."""
    report = Report("Data-parallel steps", "python benchmarks/data_parallel.py")
    report.say(
        "The same global batch on one device and divided over several; times are medians (and "
        "quartiles) of the ratio over paired rounds, efficiency is 1/(ratio x devices). CPU "
        "devices are threads of one processor, so their times show the cost of dividing, and no "
        "speedup. Collectives and their bytes are those of the compiled step; one in a loop's "
        "body counts once."
    )
    found = [n for n in (2, 4, 8) if n <= len(jax.devices())]
    rows: list[list[str]] = []
    for name in ("MLP", "transformer"):
        task = models.TASKS[name]()
        for method in optimizers():
            rows += [row(task, name, method, n, "shard_map", rounds) for n in found[-1:]]
        rows += [row(task, name, "One-Step", n, "shard_map", rounds) for n in found[:-1]]
        rows += [
            row(task, name, "One-Step", n, b, rounds) for b in ("auto", "pmap") for n in [found[-1]]
        ]
    columns = ["model", "method", "backend", "devices", "collectives", "bytes", "time / one device"]
    report.table("A step on several devices against one", [*columns, "efficiency"], rows)
    report.write(output)


if __name__ == "__main__":
    typer.run(main)
