"""Which method, γ and horizon suit a problem: `gradhpo.diagnose` on five of them.

`toy`: the two-dimensional problem of the Greedy paper. `sinusoid`: features shared by ten
regression tasks. `digits`: a weight for each of 1000 training images, half of their labels wrong.
`layers`: the same with a network of two dense layers.
`decay`: a weight decay for each layer of an MLP on the digits, and its learning rate.
With `--solvers` it compares solvers, ranks and ridges of implicit differentiation.
"""

from __future__ import annotations

import dataclasses
import enum
import sys
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import population
import typer
from rich.console import Console
from sklearn.datasets import load_digits

import gradhpo

sys.path.append(str(Path(__file__).parent / "papers"))  # where its scripts find one another
from papers import dense_layers, hypercleaning, sinusoid, toy


class Case(NamedTuple):
    """A problem, its inner optimizer, and the outer one that moves λ before the diagnosis."""

    problem: gradhpo.Problem
    inner: Any
    outer: Any


def toy_case() -> Case:
    """Return the toy problem from the paper's start."""
    start, nothing = (jnp.full(2, 2.0), jnp.ones(2)), jnp.zeros(())
    problem = gradhpo.Problem(
        lambda key: start, toy.train_loss, toy.val_loss, lambda key: (nothing, nothing)
    )
    return Case(problem, optax.sgd(toy.RATE), optax.sgd(toy.RATE))


def sinusoid_case() -> Case:
    """Return one inner optimization of ten tasks, whose ten shots stay."""

    def init(key: jax.Array) -> Any:
        *lam, w = sinusoid.init_layers(key, "torch")
        return jax.tree.map(lambda x: jnp.stack([x] * sinusoid.TASKS), w), lam

    def data(key: jax.Array) -> Any:
        trains, val = sinusoid.episode_data(key, sinusoid.Reading(validation=100))
        return jax.tree.map(lambda x: x[0], trains), val

    losses = (sinusoid.train_loss, sinusoid.val_loss)
    problem = gradhpo.Problem(init, *losses, batch=lambda key, data: data, data=data)
    return Case(problem, sinusoid.INNER, sinusoid.OUTER)


def digits_case() -> Case:
    """Return hyper-cleaning with half of the labels replaced."""
    bunch: Any = load_digits()
    pixels = np.asarray(bunch.images, np.float32)[..., None] / 16
    labels = np.asarray(bunch.target, np.int32)
    problem = hypercleaning.problem(pixels, labels, 1000, 300, (2, 2, 1), noise=0.5)
    return Case(problem, optax.sgd(0.1, momentum=0.9), optax.adam(0.1))


def layers_case() -> Case:
    """Return the digits with a network 64-32-10."""
    case = digits_case()

    def losses(params: Any, images: hypercleaning.Images) -> jax.Array:
        logits = dense_layers.apply(params, dense_layers.flat(images.x))
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, images.y)

    problem = dataclasses.replace(
        case.problem,
        init=lambda key: (dense_layers.init(key, 64, 32, 10), jnp.zeros(1000)),
        train_loss=lambda w, lam, images: jnp.mean(jax.nn.sigmoid(lam) * losses(w, images)),
        val_loss=lambda w, lam, images: jnp.mean(losses(w, images)),
        metrics=None,
    )
    return case._replace(problem=problem)


def decay_case() -> Case:
    """Return the MLP with a weight decay for each layer; λ holds the learning rate too."""

    def inner(lam: Any) -> Any:
        return optax.adam(jnp.exp(lam["log_rate"]))

    return Case(population.digits_problem(width=32), inner, optax.adam(0.1))


CASES = {
    "toy": toy_case,
    "sinusoid": sinusoid_case,
    "digits": digits_case,
    "layers": layers_case,
    "decay": decay_case,
}
Name = enum.StrEnum("Name", list(CASES))


def solvers(case: str, inner: Any, horizon: int) -> dict[str, Any]:
    """Return One-Step, and implicit methods by solver, products with the Hessian, and ridge."""
    given = {
        "cg": [(5, 0.2), (5, 0.0), (10, 0.2), (10, 0.0), (3, 0.0)],
        "nystrom": [(10, 0.2), (20, 0.2)],
    }
    if case == "layers":  # all of whose weights are dense layers'
        given["kfac"] = [(10, 0.1), (10, 0.2), (10, 0.4), (10, 0.8), (1, 0.2)]
    made: dict[str, Any] = {"one-step": gradhpo.OneStepOptimizer(inner)}
    for solver, pairs in given.items():
        for K, ridge in pairs:
            settings: Any = {"solver": solver, "K": K, "damping": ridge}
            made[f"{solver} K={K} ρ={ridge:g}"] = gradhpo.ImplicitOptimizer(
                inner, unroll_steps=horizon, **settings
            )
    return made


def main(
    case: Annotated[Name, typer.Argument(help="The problem.")],
    steps: Annotated[int, typer.Option(min=0, help="One-Step steps before the diagnosis.")] = 100,
    horizon: Annotated[int, typer.Option(min=1, help="T.")] = 20,
    samples: Annotated[int, typer.Option(min=1, help="Walks.")] = 4,
    rounds: Annotated[int, typer.Option(min=0, help="Of timing; 0 for none.")] = 5,
    seed: Annotated[int, typer.Option(help="Decides everything.")] = 0,
    implicit: Annotated[
        bool, typer.Option("--solvers", help="Compare solvers of implicit differentiation.")
    ] = False,
    budget: Annotated[
        float | None, typer.Option(help="Seconds, after which methods are left out.")
    ] = None,
    output: Annotated[Path, typer.Option(help="The figure.")] = Path("out/diagnose.png"),
) -> None:
    """Train for a while, diagnose where that leads, and draw cosine against cost."""
    problem, inner, outer = CASES[case]()
    key = jax.random.key(seed)
    optimizer = gradhpo.OneStepOptimizer(inner, outer)
    state = optimizer.init(*problem.start(key))
    if steps:
        state = gradhpo.solve(problem, optimizer, steps, key).state
    output.parent.mkdir(parents=True, exist_ok=True)
    settings: Any = {"horizon": horizon, "samples": samples, "rounds": rounds, "budget": budget}
    chosen: Any = (
        {"methods": solvers(case.value, inner, horizon)} if implicit else {"inner_optimizer": inner}
    )
    found = gradhpo.diagnose(problem, state, key, **chosen, **settings)
    found.show()
    if rounds:
        found.plot(output)
        Console().print(f"Figure: {output}", highlight=False)


if __name__ == "__main__":
    typer.run(main)
