"""A population of trials, batched in one program: which weight decay and which learning rate?

Each slot trains the same network with its own weights, learning rate and weight decay. The weight
decay of every layer is tuned by hypergradients inside a trial; the learning rate, a number that
differs between slots, is perturbed when losers copy winners (truncation selection, as in
population-based training). Nothing compiles after the first generation.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import optax
import typer
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from tqdm import tqdm

import gradhpo
from gradhpo.parallel import Population, compiled


def digits_problem(width: int) -> gradhpo.Problem:
    """Return an MLP on the digits: λ is a learning rate, and a weight decay for each layer."""
    bunch: Any = load_digits()
    pixels = np.asarray(bunch.data, np.float32) / 16
    labels = np.asarray(bunch.target, np.int32)
    parts = {"train": slice(0, 300), "val": slice(300, 900), "test": slice(900, None)}

    def init(key: jax.Array) -> tuple[Any, Any]:
        keys, sizes = jax.random.split(key, 3), (64, width, 10)
        weights = [
            jax.random.normal(key, shape) / np.sqrt(shape[0])
            for key, shape in zip(keys, itertools.pairwise(sizes), strict=False)
        ]
        log_rate = jax.random.uniform(keys[2], minval=jnp.log(1e-4), maxval=jnp.log(1e-1))
        return weights, {"log_rate": log_rate, "log_decay": jnp.full(2, -8.0)}

    def data(key: jax.Array) -> Any:
        order = jax.random.permutation(key, len(labels))
        x, y = jnp.asarray(pixels)[order], jnp.asarray(labels)[order]
        return {name: (x[part], y[part]) for name, part in parts.items()}

    def logits(params: Any, x: jax.Array) -> jax.Array:
        return jax.nn.relu(x @ params[0]) @ params[1]

    def cross_entropy(params: Any, batch: Any) -> jax.Array:
        x, y = batch
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits(params, x), y)
        return losses.mean()

    def train_loss(params: Any, lam: Any, batch: Any) -> jax.Array:
        decays = jnp.exp(lam["log_decay"])
        squares = jnp.stack([jnp.sum(w**2) for w in params])
        return cross_entropy(params, batch) + decays @ squares

    def val_loss(params: Any, lam: Any, batch: Any) -> jax.Array:
        del lam
        return cross_entropy(params, batch)

    def batch(key: jax.Array, data: Any) -> Any:
        rows = jax.random.randint(key, (64,), 0, 300)
        return jax.tree.map(lambda x: x[rows], data["train"]), data["val"]

    def metrics(params: Any, lam: Any, data: Any) -> dict[str, jax.Array]:
        x, y = data["test"]
        return {"test_accuracy": jnp.mean(jnp.argmax(logits(params, x), -1) == y)}

    return gradhpo.Problem(init, train_loss, val_loss, batch, metrics=metrics, data=data)


def trials(problem: gradhpo.Problem, slots: int, seed: int) -> Population:
    """Return the population: the rate is λ's own, and the outer optimizer moves the decays only."""
    decays = optax.multi_transform(
        {"tuned": optax.adam(0.1), "fixed": optax.set_to_zero()},
        {"log_rate": "fixed", "log_decay": "tuned"},
    )
    optimizer = gradhpo.OneStepOptimizer(
        inner_optimizer=lambda lam: optax.adam(jnp.exp(lam["log_rate"])), outer_optimizer=decays
    )
    return Population(problem, optimizer, slots, data_key=jax.random.key(seed))


def decide(losses: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return each slot's parent, and the change of its log learning rate.

    The worst quarter copies the best, and moves on from its rate; NaN ranks last.
    """
    order = np.argsort(np.where(np.isfinite(losses), losses, np.inf))
    quarter = max(1, len(losses) // 4)
    parents, change = np.arange(len(losses)), np.zeros(len(losses), np.float32)
    parents[order[-quarter:]] = rng.choice(order[:quarter], quarter)
    change[order[-quarter:]] = np.log(rng.choice([0.8, 1.25], quarter))
    return parents, change


def main(
    slots: Annotated[int, typer.Option(min=4, help="Trials, batched in one program.")] = 32,
    generations: Annotated[int, typer.Option(min=2, help="Between two, losers copy.")] = 12,
    steps: Annotated[int, typer.Option(min=1, help="Steps in a generation.")] = 25,
    width: Annotated[int, typer.Option(min=1, help="Hidden units.")] = 32,
    seed: Annotated[int, typer.Option(help="Decides everything.")] = 0,
    output: Annotated[Path, typer.Option(help="The figure.")] = Path("out/population.png"),
) -> None:
    """Train a population on the digits, and draw what its trials did."""
    mpl.use("agg")
    console, rng = Console(), np.random.default_rng(seed)
    problem = digits_problem(width)
    population = trials(problem, slots, seed)
    root = jax.random.key(seed)
    state = population.init(root)
    rows: list[np.ndarray] = []
    rates: list[np.ndarray] = []
    compiles = 0
    for generation in tqdm(range(generations), unit="generation"):
        keys = jax.random.split(jax.random.fold_in(root, generation), slots)
        state, metrics = population.run(state, steps, keys)
        rows.append(np.asarray(metrics["val_loss"][-1]))
        rates.append(np.exp(np.asarray(state.hyperparams["log_rate"])))
        if generation < generations - 1:
            parents, change = decide(rows[-1], rng)
            state = population.select(state, parents)
            moved = np.asarray(state.hyperparams["log_rate"]) + change
            state = state.update(hyperparams=state.hyperparams | {"log_rate": moved})
        compiles = compiles or compiled.counts().compiles
    best = int(np.nanargmin(rows[-1]))
    measured = jax.vmap(problem.measure, in_axes=(0, 0, None))(
        state.params, state.hyperparams, population.data
    )
    table = Table("generation", "best", "median", "diverged", "rate of the best")
    for generation, (row, rate) in enumerate(zip(rows, rates, strict=True)):
        numbers = f"{np.nanmin(row):.3f}", f"{np.nanmedian(row):.3f}", str(np.isnan(row).sum())
        table.add_row(str(generation), *numbers, f"{rate[np.nanargmin(row)]:.4f}")
    console.print(table)
    decays = np.exp(np.asarray(state.hyperparams["log_decay"][best]))
    console.print(
        f"Best trial: test accuracy {float(measured['test_accuracy'][best]):.3f}, learning rate "
        f"{rates[-1][best]:.4f}, weight decays {decays[0]:.1e} and {decays[1]:.1e}. Slots by "
        f'"{population.batching}"; programs compiled after the first generation: '
        f"{compiled.counts().compiles - compiles}.",
        highlight=False,
    )
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    left.plot(rows, color="C0", alpha=0.3)
    left.plot([np.nanmin(row) for row in rows], color="black", label="best")
    left.set(xlabel="generation", ylabel="validation loss", yscale="log")
    left.legend()
    right.plot(rates, color="C1", alpha=0.4)
    right.set(xlabel="generation", ylabel="learning rate", yscale="log")
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=120)
    console.print(f"Figure: {output}", highlight=False)


if __name__ == "__main__":
    typer.run(main)
