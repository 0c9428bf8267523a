"""Populations: every layout against every other, "auto" against the best, and a loop by hand."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import by_hand
import jax
import jax.numpy as jnp
import models
import numpy as np
import optax
import typer
from measure import Report, paired_ratio

import gradhpo
from gradhpo.parallel import Population
from gradhpo.parallel.batching import CHUNKS

INNER, OUTER = optax.adam(1e-3), optax.adam(1e-2)


def seconds(population: Population, state: Any, keys: Any, steps: int) -> float:
    """Return how long a generation takes."""
    started = time.perf_counter()
    jax.block_until_ready(population.run(state, steps, keys))
    return time.perf_counter() - started


def layout_row(width: int, slots: int, steps: int, rounds: int) -> list[str]:
    """Measure all layouts of a population of MLPs."""
    problem = models.mlp(width).problem
    optimizer = gradhpo.OneStepOptimizer(INNER, OUTER)
    choices: list[Any] = ["map", *(c for c in CHUNKS if c < slots), "vmap"]
    made = {choice: Population(problem, optimizer, slots, batching=choice) for choice in choices}
    auto = Population(problem, optimizer, slots)
    state, keys = auto.init(jax.random.key(0)), jax.random.split(jax.random.key(1), slots)
    auto.run(state, steps, keys)
    best = dict.fromkeys(choices, np.inf)
    for population in made.values():
        seconds(population, state, keys, steps)  # compile
    for _ in range(rounds):
        for choice, population in made.items():
            best[choice] = min(best[choice], seconds(population, state, keys, steps))
    fastest = min(best.values())
    relative = [f"{fastest / best[c]:.2f}" if c in best else "–" for c in ("map", *CHUNKS, "vmap")]
    chosen = f"{auto.batching}"
    rate = f"{slots * steps / fastest:,.0f}"
    return [str(width), str(slots), *relative, chosen, f"{fastest / best[auto.batching]:.2f}", rate]


def hand_row(width: int, slots: int, steps: int, rounds: int) -> list[str]:
    """Measure a population against the trials one after another, in one compiled loop by hand."""
    task = models.mlp(width)
    step = by_hand.steps(task.problem.train_loss, task.problem.val_loss, INNER, OUTER)["One-Step"]
    population = Population(task.problem, gradhpo.OneStepOptimizer(INNER, OUTER), slots)
    state, keys = population.init(jax.random.key(0)), jax.random.split(jax.random.key(1), slots)
    population.run(state, steps, keys)

    def trial(given: Any) -> Any:
        carry, key = given

        def body(carry: Any, i: Any) -> Any:
            train, val = task.problem.draw(jax.random.fold_in(key, i), None)
            return step(carry, train, val)

        return jax.lax.scan(body, carry, jnp.arange(steps))

    loop: Any = jax.jit(lambda carries, keys: jax.lax.map(trial, (carries, keys)))
    carries: Any = jax.vmap(lambda w, lam: by_hand.start(w, lam, INNER, OUTER))(
        state.params, state.hyperparams
    )
    ratio, low, high = paired_ratio(
        lambda: population.run(state, steps, keys), lambda: loop(carries, keys), rounds
    )
    return [str(width), str(slots), str(population.batching), f"{ratio:.2f} ({low:.2f}-{high:.2f})"]


def outside_row(name: str, task: models.Task, slots: int, steps: int, rounds: int) -> list[str]:
    """Measure a population of CNNs against a Python loop of its trials' steps."""
    optimizer, losses = gradhpo.OneStepOptimizer(INNER, OUTER), task.problem
    population = Population(task.problem, optimizer, slots)
    state, keys = population.init(jax.random.key(0)), jax.random.split(jax.random.key(1), slots)
    population.run(state, steps, keys)
    first = optimizer.init(*task.start())

    def outside() -> Any:
        trial = first
        for _ in range(slots * steps):
            trial = optimizer.step(
                trial, task.train_batch, task.val_batch, losses.train_loss, losses.val_loss
            )
        return trial

    ratio, low, high = paired_ratio(lambda: population.run(state, steps, keys), outside, rounds)
    return [name, str(slots), str(population.batching), f"{ratio:.2f} ({low:.2f}-{high:.2f})"]


def main(
    widths: Annotated[str, typer.Option(help="Hidden units, with commas.")] = "4,16,64,256",
    slots: Annotated[str, typer.Option(help="Trials, with commas.")] = "8,64,512",
    steps: Annotated[int, typer.Option(min=1, help="Steps in a generation.")] = 5,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; the best time of each counts.")] = 3,
    output: Annotated[Path | None, typer.Option(help="Write the tables as Markdown.")] = None,
) -> None:
    """Measure layouts of populations of MLPs with One-Step, Adam inside and outside."""
    options = f"--widths {widths} --slots {slots} --steps {steps} --rounds {rounds}"
    report = Report("Populations", f"python benchmarks/population.py {options}")
    report.say(
        "MLPs of two hidden layers, batches of 64, λ of 257 numbers, One-Step. A layout's figure "
        "is the time of the fastest fixed layout over its own, each the best of interleaved "
        'rounds: 1.00 is the fastest. "auto" measured before, on other steps.'
    )
    counts = [int(n) for n in slots.split(",")]
    sizes = [int(n) for n in widths.split(",")]
    columns = ["width", "slots", "map", *map(str, CHUNKS), "vmap", "auto chose", "auto", "steps/s"]
    rows = [layout_row(width, n, steps, rounds) for width in sizes for n in counts]
    report.table("Layouts", columns, rows)
    columns = ["width", "slots", "layout", "time / loop by hand"]
    rows = [hand_row(width, counts[len(counts) // 2], steps, max(5, rounds)) for width in sizes]
    report.table("A population against its trials one after another, by hand", columns, rows)
    columns = ["convolutions", "slots", "layout", "time / Python loop of steps"]
    tasks = models.convolutions().items()
    rows = [outside_row(name, task, counts[0], steps, max(5, rounds)) for name, task in tasks]
    report.table("A population of CNNs against a Python loop of its trials' steps", columns, rows)
    report.write(output)


if __name__ == "__main__":
    typer.run(main)
