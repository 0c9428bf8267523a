"""Modes of the exact mixed derivatives: memory, FLOPs and time, a step at a time and unrolled."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import models
import optax
import typer
from measure import Report, cost, paired_ratio

import gradhpo
from gradhpo.hypergradient import MODES

INNER, OUTER = optax.adam(1e-3), optax.adam(1e-2)
PLAIN, *MIXED = MODES[1:]
SMALL = functools.partial(models.transformer, width=32, length=16, scanned=True)
DEEP, LONG = 24, 16
LENGTHS = (1, 4, LONG)
Make = Callable[..., gradhpo.BilevelOptimizer]


class Case(NamedTuple):
    """A problem to take steps on, and where its hyperparameters act."""

    start: tuple[Any, Any]
    losses: tuple[Any, Any]
    batches: tuple[Any, Any]


class Measured(NamedTuple):
    """A compiled step."""

    call: Callable[[], Any]
    flops: float
    memory: int


def at_the_loss(task: models.Task) -> Case:
    """λ: a weight for each training row, and a weight decay."""
    losses = (task.problem.train_loss, task.problem.val_loss)
    return Case(task.start(), losses, (task.train_batch, task.val_batch))


def at_the_inputs(task: models.Task) -> Case:
    """λ: a shift of the training inputs, which acts through the whole model."""
    params, fixed = task.start()

    def train_loss(params: Any, lam: Any, batch: Any) -> jax.Array:
        return task.problem.train_loss(params, fixed, batch | {"x": batch["x"] + lam})

    lam = jnp.zeros(task.train_batch["x"].shape[1:])
    losses = (train_loss, task.problem.val_loss)
    return Case((params, lam), losses, (task.train_batch, task.val_batch))


def measure(case: Case, optimizer: gradhpo.BilevelOptimizer) -> Measured:
    """Compile a step of the optimizer."""
    state = optimizer.init(*case.start)
    program = optimizer.lower_step(state, *case.batches, *case.losses).compile()
    return Measured(lambda: program(state, *case.batches, None), *cost(program))


def compare(case: Case, make: Make, settings: list[dict[str, Any]], rounds: int) -> list[list[str]]:
    """Measure settings of an optimizer against the first of them; a row of cells for each."""
    plain, *others = (measure(case, make(INNER, OUTER, **own)) for own in settings)
    rows = [[mib(plain.memory), "", "", ""]]
    for other in others:
        ratio, low, high = paired_ratio(other.call, plain.call, rounds)
        less = f"{plain.memory / other.memory:.1f}"
        time = f"{ratio:.2f} ({low:.2f}-{high:.2f})"
        rows.append([mib(other.memory), less, f"{other.flops / plain.flops:.2f}", time])
    return rows


def mib(size: int) -> str:
    """Return a size in MiB."""
    return f"{size / 2**20:.1f}"


def one_step_rows(rounds: int) -> list[list[str]]:
    """Measure One-Step, which takes one product a step."""
    tasks = {
        "MLP": models.mlp(),
        "CNN": models.cnn(),
        "8 blocks, checkpoint": SMALL(8, checkpoint=True),
    }
    rows: list[list[str]] = []
    for name, task in tasks.items():
        for place, case in (("loss", at_the_loss(task)), ("inputs", at_the_inputs(task))):
            settings: list[dict[str, Any]] = [{"mode": mode} for mode in MODES[1:]]
            cells = compare(case, gradhpo.OneStepOptimizer, settings, rounds)
            for own, row in zip(settings, cells, strict=True):
                rows.append([name, place, own["mode"], *row])
    return rows


def unrolled_rows(rounds: int) -> list[list[str]]:
    """Measure Unrolled by "forward-over-reverse" against plain reverse mode, through T steps."""
    chosen: list[tuple[str, models.Task, tuple[int, ...]]]
    chosen = [("MLP", models.mlp(), LENGTHS), ("CNN", models.cnn(4), LENGTHS)]
    for blocks in (2, 8, DEEP):
        lengths = LENGTHS if blocks == DEEP else (LONG,)
        chosen.append((f"{blocks} blocks", SMALL(blocks), lengths))
        checkpointed = SMALL(blocks, checkpoint=True)
        chosen.append((f"{blocks} blocks, checkpoint", checkpointed, lengths))
    rows: list[list[str]] = []
    for name, task, lengths in chosen:
        for T in lengths:
            settings: list[dict[str, Any]] = [{"mode": PLAIN}, {"mode": MIXED[0]}]
            make = functools.partial(gradhpo.UnrolledOptimizer, unroll_steps=T)
            plain, mixed = compare(at_the_loss(task), make, settings, rounds)
            rows.append([name, str(T), plain[0], *mixed])
    return rows


def deep_rows(rounds: int) -> list[list[str]]:
    """Measure every mode and rematerialization of Unrolled on the deepest model."""
    settings: list[dict[str, Any]] = [
        {"mode": mode, "remat": remat}
        for mode in (PLAIN, *MIXED)
        for remat in ("none", "sqrt", "step")
        if mode != MIXED[1] or remat == "none"
    ]
    make = functools.partial(gradhpo.UnrolledOptimizer, unroll_steps=LONG)
    case = at_the_loss(SMALL(DEEP, checkpoint=True))
    cells = compare(case, make, settings, rounds)
    return [[own["mode"], own["remat"], *row] for own, row in zip(settings, cells, strict=True)]


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Paired rounds for each ratio.")] = 3,
    output: Annotated[Path | None, typer.Option(help="Write the tables as Markdown.")] = None,
) -> None:
    """Measure the modes. Times are medians of paired ratios, with quartiles."""
    report = Report("Mixed modes", f"python benchmarks/mixed_modes.py --rounds {rounds}")
    load = os.getloadavg()[0]
    report.say(
        "Adam inside and outside, float32. Memory is XLA's own figure for the temporaries of the "
        "compiled step, in MiB; FLOPs too are XLA's, which counts the body of a loop (over blocks, "
        "over inner steps) once, whatever its length, and counts what is computed again under "
        "`checkpoint`. Times are medians (and quartiles) of the ratio over paired rounds. "
        "Transformers: scanned blocks of width 32 on 16 sequences of 16. The machine is shared "
        f"(load {load:.1f} at the start): a ratio within a tenth of 1 says nothing."
    )
    columns = ["model", "λ acts at", "mode", "MiB", "times less", "FLOPs", "time"]
    report.table("One-Step: one product a step", columns, one_step_rows(rounds))
    report.say(
        "Reverse-over-reverse shares the linearization that moves the weights, so it never takes "
        "more FLOPs: it is the default where there is one product a step. Where λ acts deep in a "
        "model whose blocks are rematerialized, the mixed modes need a fraction of its memory."
    )
    columns = ["model", "T", "MiB, plain", "MiB", "times less", "FLOPs", "time"]
    report.table(
        'Unrolled: "forward-over-reverse" against plain reverse mode',
        columns,
        unrolled_rows(rounds),
    )
    columns = ["mode", "remat", "MiB", "times less", "FLOPs", "time"]
    title = f"Unrolled, {DEEP} blocks with checkpoint, T = {LONG}"
    report.table(title, columns, deep_rows(rounds))
    report.write(output)


if __name__ == "__main__":
    typer.run(main)
