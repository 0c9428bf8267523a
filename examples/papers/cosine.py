"""Cosine to the exact hypergradient over meta-training: Fig. 3, HyperDistill paper (ICLR 2022).

The problem of `sinusoid.py`. λ is moved by HyperDistill with γ = 0.99; at the beginning of every
inner optimization, each γ in {0, 0.9, 0.99, 0.999}, and One-Step, is followed over the next T = 30
inner steps with λ held, and its estimate at the end is compared with the exact hypergradient
through the same T steps. γ = 0 is One-Step with its second-order term scaled by θ. The paper leaves
open which batches it compares on: those of the run itself are used.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import report
import sinusoid
import typer
from tqdm import tqdm

import gradhpo
from gradhpo.horizon import estimate_at, fresh_state
from gradhpo.state import prepare

GAMMAS = (0.0, 0.9, 0.99, 0.999)
T, LOSSES = sinusoid.T, (sinusoid.train_loss, sinusoid.val_loss)


def compared() -> dict[str, Any]:
    """Return the methods whose estimates are compared with the exact one."""
    made: dict[str, Any] = {"One-Step": gradhpo.OneStepOptimizer(sinusoid.INNER)}
    for gamma in GAMMAS:
        made[f"HyperDistill {gamma:g}"] = sinusoid.hyperdistill(gamma)
    return made


class Cosines(NamedTuple):
    """Of each method, in the order of `compared`, at each inner optimization: `(M, methods)`."""

    whole: Any
    """Of the whole hypergradient."""
    second: Any
    """Of its second-order term alone, without the direct one, which all methods have exactly."""


def flat(tree: Any) -> jax.Array:
    """Return all numbers of a tree as a vector."""
    return jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(tree)])


def cosine(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return the cosine of two vectors."""
    return a @ b / (jnp.linalg.norm(a) * jnp.linalg.norm(b))


def at_start(state: Any, thetas: list[Any], trains: Any, val: Any) -> Cosines:
    """Return the cosines of one walk from `state`, `(methods,)`."""
    task = gradhpo.Task(trains, val, *LOSSES)
    exact = gradhpo.UnrolledOptimizer(sinusoid.INNER, unroll_steps=T)
    done = estimate_at(exact, fresh_state(exact, state), task)
    truth = flat(done.hypergradient)
    direct = flat(jax.grad(sinusoid.val_loss, 1)(done.params, state.hyperparams, val))
    rows: list[Any] = []
    for optimizer, theta in zip(compared().values(), thetas, strict=True):
        own = fresh_state(optimizer, state)
        if theta is not None:
            own = own.update(metadata={"theta": theta})
        g = flat(estimate_at(optimizer, own, task).hypergradient)
        rows.append(jnp.stack([cosine(g, truth), cosine(g - direct, truth - direct)]))
    return Cosines(*jnp.stack(rows, axis=1))


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(reading: sinusoid.Reading, M: int, keys: jax.Array) -> Cosines:
    """Meta-train with every seed, and compare at the beginning of every inner optimization."""
    mover = sinusoid.hyperdistill(0.99)

    def episode(carry: Any, key: jax.Array) -> Any:
        state, phi, thetas = carry
        trains, val = sinusoid.episode_data(key, reading)
        state = mover.reset(state, phi)
        found = at_start(state, thetas, trains, val)

        def inner_step(state: Any, train: Any) -> Any:
            return mover.advance(state, gradhpo.Task(train, val, *LOSSES)), None

        state, _ = jax.lax.scan(inner_step, state, trains)
        phi = jax.tree.map(lambda x: jnp.broadcast_to(x.mean(0), x.shape), state.params)
        return (state, phi, thetas), found

    def one(key: jax.Array) -> Cosines:
        start, data, calibration = jax.random.split(key, 3)
        *lam, w = sinusoid.init_layers(start, reading.init)
        stacked = jax.tree.map(lambda x: jnp.stack([x] * sinusoid.TASKS), w)
        state = prepare(mover.init(stacked, lam))
        batches = sinusoid.episode_data(calibration, reading)
        thetas: list[Any] = []
        for optimizer in compared().values():
            own = fresh_state(optimizer, state)
            ready = optimizer.calibrate(own, gradhpo.Task(*batches, *LOSSES))
            thetas.append(ready.metadata.get("theta"))
        state = state.update(metadata={"theta": thetas[1 + GAMMAS.index(0.99)]})
        keys = jax.random.split(data, M)
        return jax.lax.scan(episode, (state, state.params, thetas), keys)[1]

    return jax.lax.map(one, keys)


def draw(cosines: Cosines, output: Path) -> None:
    """Draw the mean over seeds, and the range."""
    figure, (panels,) = report.axes(2, width=6)
    for axes, values, what in zip(panels, cosines, ("whole", "second-order term"), strict=True):
        for index, name in enumerate(compared()):
            curve = values[:, :, index]
            steps = np.arange(1, curve.shape[1] + 1)
            (line,) = axes.plot(steps, curve.mean(0), label=name)
            low, high = curve.min(0), curve.max(0)
            axes.fill_between(steps, low, high, alpha=0.1, color=line.get_color())
        axes.set(xlabel="inner optimization", ylabel="cosine to the exact", title=what)
    panels[0].legend(fontsize=8)
    report.save(figure, output)


def main(
    seeds: Annotated[int, typer.Option(min=2, help="Runs.")] = 5,
    seed: Annotated[int, typer.Option(help="The key that they are split from.")] = 0,
    episodes: Annotated[int, typer.Option(min=1, help="M, inner optimizations.")] = 30,
    output: Annotated[Path, typer.Option(help="The figure.")] = Path("out/cosine.png"),
) -> None:
    """Reproduce Fig. 3 of the HyperDistill paper: cosine to the exact hypergradient for each γ."""
    report.writable(output)
    keys = jax.random.split(jax.random.key(seed), seeds)
    readings = sinusoid.READINGS[:2]
    found: dict[str, Cosines] = {}
    for reading in tqdm(readings, unit="reading"):
        cosines = jax.device_get(run(reading, episodes, keys))
        found[str(reading)] = cosines
        means = [np.nanmean(part, axis=1) for part in cosines]
        rows = [
            [name, *(report.interval(mean[:, i]) for mean in means)]
            for i, name in enumerate(compared())
        ]
        report.table(f"{reading}: mean over the run", ["method", "cosine", "second order"], rows)
    report.say("Published (Fig. 3, as summarized): a larger γ has a higher cosine than γ = 0.")
    draw(found[str(readings[0])], output)


if __name__ == "__main__":
    typer.run(main)
