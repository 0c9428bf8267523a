"""The two toys of the PES paper (Vicol et al., ICML 2021): a rough loss, and a far influence.

Toy regression: two weights descend a landscape of bumps for T = 100 steps, and λ is the logarithm
of the learning rate at the first and at the last step, in between on a line; what counts is the sum
of the losses after every step. The landscape of λ has so many ridges that its exact gradient leads
nowhere, while the smoothed one falls to the bottom of the grid.

Influence balancing: a linear recurrence of 23 numbers without end, into which λ is added ten times
and taken off thirteen times. What it does at once has the wrong sign; only after many steps the
rest arrives.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import report
import typer
from tqdm import tqdm

import gradhpo

T, K = 100, 10
THETA = (-4.0, -4.0)
OUTER = optax.adam(1e-2, b1=0.99)
SIGMA = {"toy": 0.3, "influence": 0.1}


# --- Toy regression -----------------------------------------------------------------------------


def landscape(x: jax.Array) -> jax.Array:
    """Return the loss of two weights."""
    bumps = jnp.sin(x[1]) ** 2 * jnp.exp(-5 * x[0] ** 2)
    return jnp.sqrt(x[0] ** 2 + 5) - jnp.sqrt(5.0) + bumps + 0.25 * jnp.abs(x[1] - 100)


def loss(x: jax.Array, theta: jax.Array, batch: Any) -> jax.Array:
    """Return the loss that trains the weights, and that the learning rates are tuned for."""
    del theta, batch
    return landscape(x)


def rate(theta: jax.Array, t: Any) -> jax.Array:
    """Return the learning rate of step t, on a line from exp(θ₀) to exp(θ₁)."""
    first, last = jnp.exp(theta)
    return first * (T - t) / T + last * t / T


def inner(theta: jax.Array) -> optax.GradientTransformation:
    """Return the optimizer at these learning rates."""
    return optax.sgd(lambda count: rate(theta, count))


class Walk(NamedTuple):
    """The weights with what they have summed up, for a gradient of the sum."""

    x: Any
    t: Any
    total: Any


def summing(walk: Walk, theta: jax.Array, batch: Any) -> Walk:
    """Take one step, and add its loss to the sum."""
    del batch
    x = walk.x - rate(theta, walk.t) * jax.grad(landscape)(walk.x)
    return Walk(x, walk.t + 1, walk.total + landscape(x))


def total(walk: Walk, theta: jax.Array, batch: Any) -> jax.Array:
    """Return the sum of the losses so far."""
    del theta, batch
    return walk.total


def nothing(key: jax.Array) -> tuple[Any, Any]:
    """Return batches of no data."""
    del key
    return jnp.zeros(()), jnp.zeros(())


def start_toy(key: jax.Array) -> tuple[Any, Any]:
    """Return the weights and θ to start from."""
    del key
    return jnp.ones(2), jnp.asarray(THETA)


def start_walk(key: jax.Array) -> tuple[Any, Any]:
    """Return the same, with nothing summed up."""
    x, theta = start_toy(key)
    return Walk(x, jnp.zeros(()), jnp.zeros(())), theta


@jax.jit
def objective(theta: jax.Array) -> jax.Array:
    """Return the sum of the losses of a whole run at θ."""
    walk = start_walk(jax.random.key(0))[0]
    return jax.lax.fori_loop(0, T, lambda _, w: summing(w, theta, None), walk).total


def toy_methods() -> dict[str, tuple[Any, int]]:
    """Return by name the optimizers of the toy, and how many inner steps a step of each takes."""
    drawn: Any = {"particles": 100, "sigma": SIGMA["toy"], "objective": "mean"}
    return {
        "PES, K = 10": (gradhpo.PESOptimizer(inner, OUTER, K, **drawn), K),
        "NRES, K = 10": (gradhpo.NRESOptimizer(inner, OUTER, K, **drawn), K),
        "ES, K = 10": (gradhpo.ESOptimizer(inner, OUTER, K, **drawn), K),
        "exact, K = 10": (gradhpo.UnrolledOptimizer(None, OUTER, K, update_fn=summing), K),
        "exact, T = 100": (gradhpo.UnrolledOptimizer(None, OUTER, T, update_fn=summing), T),
    }


def descend(optimizer: Any, window: int, steps: int, keys: jax.Array) -> np.ndarray:
    """Return θ after each outer step, `(steps, keys, 2)`; every T inner steps start anew."""
    own = optimizer.update_fn is not None
    problem = gradhpo.Problem(
        start_walk if own else start_toy,
        total if own else loss,
        total if own else loss,
        batch=nothing,
    )
    found = gradhpo.solve(
        problem,
        optimizer,
        steps,
        keys,
        episode_length=T // window,
        lr_reptile=0.0,
        record=lambda theta: {"theta": theta},
        progress=False,
    )
    return np.asarray(found.record["theta"])


def grid(points: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the axis of a square grid of θ, and the objective on it, `(points, points)`."""
    axis = np.linspace(-6.0, 4.0, points)
    pairs = jnp.stack(jnp.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    values = jax.lax.map(objective, pairs, batch_size=1024)
    return axis, np.asarray(values).reshape(points, points)


# --- Influence balancing ------------------------------------------------------------------------

N, POSITIVE = 23, 10
A = 0.5 * (np.eye(N) + np.eye(N, k=1))
SIGNS = np.where(np.arange(N) < POSITIVE, 1.0, -1.0)


def recur(h: jax.Array, theta: jax.Array, batch: Any) -> jax.Array:
    """Take a step of the recurrence."""
    del batch
    return jnp.asarray(A, h.dtype) @ h + theta * jnp.asarray(SIGNS, h.dtype)


def target(h: jax.Array, theta: jax.Array, batch: Any) -> jax.Array:
    """Return half the squared distance of the first number from 1."""
    del theta, batch
    return 0.5 * (h[0] - 1) ** 2


def start_influence(key: jax.Array) -> tuple[Any, Any]:
    """Return the numbers and θ to start from."""
    del key
    return jnp.ones(N), jnp.asarray(0.5)


@jax.jit
def far(theta: jax.Array) -> jax.Array:
    """Return the loss after 500 steps at θ."""
    h = jax.lax.fori_loop(0, 500, lambda _, h: recur(h, theta, None), jnp.ones(N))
    return target(h, theta, None)


def influence_methods() -> dict[str, Any]:
    """Return by name the optimizers of influence balancing."""
    drawn: Any = {"update_fn": recur, "particles": 1000, "sigma": SIGMA["influence"]}
    exact = {
        f"exact, K = {k}": gradhpo.UnrolledOptimizer(unroll_steps=k, update_fn=recur)
        for k in (1, 10, 100)
    }
    return {
        "PES, K = 1": gradhpo.PESOptimizer(**drawn),
        "NRES, K = 1": gradhpo.NRESOptimizer(**drawn),
        "ES, K = 1": gradhpo.ESOptimizer(**drawn),
        **exact,
    }


def balance(optimizer: Any, steps: int, keys: jax.Array, lr_hyper: float = 1e-4) -> np.ndarray:
    """Return θ after each outer step, `(steps, keys)`; the recurrence goes on and on."""
    problem = gradhpo.Problem(start_influence, target, target, batch=nothing)
    found = gradhpo.solve(problem, optimizer, steps, keys, lr_hyper=lr_hyper, progress=False)
    return np.asarray(found.record["hyperparams"])


# --- The table and the figure -------------------------------------------------------------------


def scores(function: Any, trajectory: np.ndarray, every: int) -> np.ndarray:
    """Return the objective of every so many θ of a trajectory, the last too: `(points, keys)`."""
    taken = trajectory[::-every][::-1]
    flat = jnp.asarray(taken.reshape(-1, *taken.shape[2:]))
    values = jax.lax.map(function, flat, batch_size=1024)
    return np.asarray(values).reshape(taken.shape[:2])


def draw(
    curves: dict[str, np.ndarray],
    others: dict[str, np.ndarray],
    paths: dict[str, np.ndarray],
    points: int,
    every: int,
    output: Path,
) -> None:
    """Draw the toy's landscape with the paths of θ, and both toys' losses by outer step."""
    figure, (panels,) = report.axes(3, width=5.5)
    axis, values = grid(points)
    panels[0].pcolormesh(axis, axis, np.log10(values.T), cmap="viridis_r", rasterized=True)
    for index, (name, path) in enumerate(paths.items()):
        panels[0].plot(*path[:, 0].T, color=f"C{index}", label=name, linewidth=2)
    panels[0].set(xlabel="θ₀", ylabel="θ₁", title="log₁₀ of the summed loss, and paths of θ")
    for panel, found in zip(panels[1:], (curves, others), strict=True):
        for index, (name, made) in enumerate(found.items()):
            steps = np.arange(1, len(made) + 1) * every
            panel.plot(steps, np.median(made, axis=1), color=f"C{index}", label=name)
            panel.fill_between(steps, made.min(1), made.max(1), color=f"C{index}", alpha=0.2)
        panel.set(xlabel="outer step", yscale="log")
        panel.legend(fontsize=8)
    panels[1].set(title=f"Toy regression, T = {T}", ylabel="summed loss")
    panels[2].set(title="Influence balancing", ylabel="loss after 500 steps", ylim=(1e-16, 1e4))
    report.save(figure, output)


def row(name: str, made: np.ndarray, trajectory: np.ndarray) -> list[str]:
    """Return a method's range of losses over the seeds, at the end, and where λ then is."""
    last, where = made[-1], np.median(trajectory[-1], axis=0)
    spread = f"{last.min():.4g} to {last.max():.4g}"
    return [name, f"{np.median(last):.4g}", spread, np.array2string(where, precision=3)]


def main(
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of the draws.")] = 5,
    steps: Annotated[int, typer.Option(min=10, help="Outer steps of the toy.")] = 5000,
    balancing: Annotated[int, typer.Option(min=10, help="Of influence balancing.")] = 3000,
    points: Annotated[int, typer.Option(min=2, help="Of the grid, along an axis.")] = 300,
    output: Annotated[Path, typer.Option(help="The figure.")] = Path("out/pes.png"),
) -> None:
    """Run both toys with evolution strategies and exact gradients."""
    report.writable(output)
    keys, every = jax.random.split(jax.random.key(0), seeds), 10
    curves: dict[str, np.ndarray] = {}
    others: dict[str, np.ndarray] = {}
    paths: dict[str, np.ndarray] = {}
    rows: list[list[str]] = []
    for name, (optimizer, window) in tqdm(toy_methods().items(), desc="toy regression"):
        paths[name] = descend(optimizer, window, steps, keys)
        curves[name] = scores(objective, paths[name], every)
        rows.append(row(name, curves[name], paths[name]))
    columns = ["method", "median", "range of seeds", "λ"]
    best = grid(points)[1].min()
    title = f"Summed loss after {steps} outer steps; the least on a grid: {best:.4g}"
    report.table(title, columns, rows)
    rows = []
    for name, optimizer in tqdm(influence_methods().items(), desc="influence balancing"):
        trajectory = balance(optimizer, balancing, keys)
        others[name] = scores(far, trajectory, every)
        rows.append(row(name, others[name], trajectory))
    report.table(f"Loss after {balancing} outer steps; optimum at λ = -1/6", columns, rows)
    draw(curves, others, paths, points, every, output)


if __name__ == "__main__":
    typer.run(main)
