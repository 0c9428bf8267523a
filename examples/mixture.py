"""Which proportions of three texts make the best model of a manual? One sweep of few runs, by Ray.

Every trial trains a small model of bytes, and moves the weights of its domains by hypergradients;
trials differ in their seeds and in the rate of that descent. Beside it a swarm of fixed mixtures,
the usual way, is another sweep. Both are batched populations, divided over the workers. The figure
has the weights over time, the losses by domain, and the swarm's cloud with the mixtures found.

Needs `pip install 'gradhpo[examples,cluster]'`; `--executor local` needs no Ray.
"""

from __future__ import annotations

import dataclasses
import functools
import shutil
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import typer
from papers import report
from text_domains import text_mixture, texts

import gradhpo
from gradhpo import mixture
from gradhpo.cluster import RandomSearch, SearchSpace, Sweep, SweepResult, categorical

INNER = optax.adam(1e-2)
RATES = [0.02, 0.04]
DOMAINS = ("python", "reference", "licences")
COLORS = "#2a86c4", "#d9762b", "#22997a"


@functools.cache
def mixed() -> mixture.Mixture:
    """Return the mixture, which also measures its domains on their last rows."""
    rows = texts()
    seen = {name: rows[name][-200:] for name in DOMAINS}
    domains = {name: rows[name][:-200] for name in DOMAINS}
    held_out = {"test": rows["test"], **seen}
    return text_mixture(domains=domains, held_out=held_out, draw="sampled")


def problem() -> gradhpo.Problem:
    """Return the problem whose λ are the domains' weights."""
    return mixed().problem


def optimizer(rate: float) -> gradhpo.BilevelOptimizer:
    """Return One-Step, whose weights descend on the simplex at this rate."""
    descent = mixture.entropic_descent(rate, floor=0.005)
    return gradhpo.OneStepOptimizer(INNER, optax.chain(mixture.scale_by_spread(), descent))


def grid(parts: int) -> np.ndarray:
    """Return the swarm's mixtures."""
    return mixture.simplex_grid(len(DOMAINS), parts)


def swarm_problem(parts: int) -> gradhpo.Problem:
    """Return the problem of a swarm: λ is the number of a mixture, and nothing is tuned."""
    held, mixtures = mixed().held, jnp.asarray(grid(parts))

    def at(lam: Any) -> dict[str, jax.Array]:
        return {"weights": mixtures[lam["number"].astype(int)]}

    def init(key: jax.Array) -> tuple[Any, Any]:
        return held.init(key)[0], {"number": jnp.float32(0)}

    def train_loss(params: Any, lam: Any, batch: Any) -> jax.Array:
        return mixed().train_loss(params, at(lam), batch)

    def val_loss(params: Any, lam: Any, batch: Any) -> jax.Array:
        del params, batch
        return 0 * lam["number"]

    def metrics(params: Any, lam: Any, data: Any) -> dict[str, jax.Array]:
        assert held.metrics is not None
        return held.metrics(params, at(lam), data)

    changes = {"init": init, "train_loss": train_loss, "val_loss": val_loss, "metrics": metrics}
    return dataclasses.replace(held, **changes)


def training() -> gradhpo.BilevelOptimizer:
    """Return what only trains."""
    return gradhpo.FOOptimizer(INNER, optax.set_to_zero())


def sweep(name: str, storage: Path, **settings: Any) -> SweepResult:
    """Run a sweep from its beginning."""
    folder = storage / name
    if (folder / "manifest.json").exists():
        shutil.rmtree(folder)  # an earlier demonstration's
    here = Path(__file__).absolute()
    for part in ("problem", "optimizer"):
        settings[part] = f"{here}:{settings[part]}"
    return Sweep(
        **settings,
        metric="target/manual",
        scheduler=RandomSearch(),
        storage=folder,
        batching="map",  # named, so that no sweep compares layouts
    ).run()


def by_trial(result: SweepResult, metric: str) -> np.ndarray:
    """Return a metric as `(generations, trials)`."""
    return np.asarray(result.table[metric]).reshape(result.generations, -1)


def onto_triangle(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return where mixtures `(…, 3)` lie in a triangle: the first left, the second right."""
    return weights[..., 1] + weights[..., 2] / 2, weights[..., 2] * np.sqrt(3) / 2


def draw(
    tuned: SweepResult,
    steps: np.ndarray,
    paths: np.ndarray,
    swarm: np.ndarray,
    losses: np.ndarray,
    output: Path,
) -> None:
    """Draw weights over time, losses by domain, and the swarm's cloud with what was found.

    Args:
      tuned: the sweep of tuned trials.
      steps: `(generations,)`: of training, at the end of each.
      paths: `(generations, trials, domains)`: the weights then.
      swarm: `(n, domains)`: fixed mixtures.
      losses: `(n,)`: of the target, with each.
      output: the figure's file.
    """
    figure, ((left, middle, right),) = report.axes(3, width=4.6)
    for index, (name, color) in enumerate(zip(DOMAINS, COLORS, strict=True)):
        left.plot(steps, paths[:, :, index], color=color, alpha=0.35, linewidth=1)
        left.plot(steps, paths[:, :, index].mean(1), color=color, linewidth=2.5, label=name)
        middle.plot(steps, by_trial(tuned, name).mean(1), color=color, linewidth=2, label=name)
    middle.plot(
        steps, by_trial(tuned, "test").mean(1), color="black", linewidth=2.5, label="manual"
    )
    left.set(xlabel="step", ylabel="weight", ylim=(0, None), title="weights, every trial and mean")
    middle.set(xlabel="step", ylabel="nats a byte", title="loss on rows never trained on")
    x, y = onto_triangle(swarm)
    right.fill([0, 1, 0.5], [0, 0, np.sqrt(3) / 2], color="#7d8891", alpha=0.1)
    cloud = right.scatter(x, y, c=losses, cmap="viridis_r", s=70, label="swarm of fixed mixtures")
    x, y = onto_triangle(paths.mean(1))
    right.plot(x, y, color=COLORS[1], linewidth=2)
    x, y = onto_triangle(paths[len(paths) // 2 :].mean(0))
    right.scatter(x, y, marker="*", s=130, color=COLORS[1], edgecolor="black", label="found")
    for (a, b), name in zip(((0, -0.07), (1, -0.07), (0.5, 0.9)), DOMAINS, strict=True):
        right.text(a, b, name, ha="center")
    right.set(title="the manual's loss, by mixture", xlim=(-0.1, 1.1), ylim=(-0.15, 1.0))
    right.set_axis_off()
    figure.colorbar(cloud, ax=right, label="nats a byte", shrink=0.7)
    for axes in (left, middle):
        axes.legend()
    right.legend(loc="upper center", bbox_to_anchor=(0.5, 0.02), ncol=2, fontsize=8)
    report.save(figure, output)


def main(
    seeds: Annotated[int, typer.Option(min=1, help="Tuned trials of each rate.")] = 4,
    generations: Annotated[int, typer.Option(min=2, help="Of which each ends in a table.")] = 10,
    steps: Annotated[int, typer.Option(min=1, help="Steps in a generation.")] = 20,
    parts: Annotated[int, typer.Option(min=1, help="The swarm's weights are in such parts.")] = 8,
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = 2,
    executor: Annotated[str, typer.Option(help='"ray", "processes" or "local".')] = "ray",
    storage: Annotated[Path, typer.Option(help="Holds the sweeps.")] = Path("out/mixture"),
    output: Annotated[Path, typer.Option(help="The figure.")] = Path("out/mixture.png"),
) -> None:
    """Find a mixture of three texts by hypergradients, and by a swarm of fixed mixtures."""
    plt.switch_backend("agg")
    output = report.writable(output)
    where: dict[str, Any] = {"executor": executor, "workers": workers}
    tuned = sweep(
        "tuned",
        storage,
        problem="problem",
        optimizer="optimizer",
        space=SearchSpace(choices={"rate": RATES}),
        population=seeds * len(RATES),
        generations=generations,
        steps_per_generation=steps,
        **where,
    )
    paths = np.stack([by_trial(tuned, f"weight/{name}") for name in DOMAINS], axis=-1)
    found = paths[len(paths) // 2 :].mean((0, 1))
    mixtures = grid(parts)
    numbers = list(range(len(mixtures)))
    swarm = sweep(
        "swarm",
        storage,
        problem="swarm_problem",
        optimizer="training",
        space=SearchSpace({"number": categorical(numbers)}, choices={"parts": [parts]}),
        points=[{"number": number} for number in numbers],
        population=len(mixtures),
        generations=1,
        steps_per_generation=generations * steps,
        **where,
    )
    order = np.asarray(swarm.table["hyperparams.number"]).astype(int)
    losses = np.empty(len(mixtures))
    losses[order] = np.asarray(swarm.table["target/manual"])
    uniform, best = np.full(3, 1 / 3), mixtures[np.nanargmin(losses)]
    compared = {"uniform": uniform, "the swarm's best": best, "found": found}
    keys = jax.numpy.repeat(jax.random.split(jax.random.key(99), 3), 3)
    anew = mixture.train_fixed(
        mixed(), np.tile(list(compared.values()), (3, 1)), INNER, generations * steps, keys
    )["test"].reshape(3, 3)
    step = mixture.training_flops(mixed(), INNER)
    one = mixture.search_flops(mixed(), optimizer(RATES[0]), 1) / step
    costs = 0, len(mixtures), one * seeds * len(RATES)
    report.table(
        "A new model on each mixture, three seeds",
        ["mixture", ", ".join(DOMAINS), "test loss", "search, in trainings"],
        [
            [name, " ".join(f"{x:.3f}" for x in p), report.interval(row, 4), f"{cost:.1f}"]
            for (name, p), row, cost in zip(compared.items(), anew.T, costs, strict=True)
        ],
    )
    report.say(f"A single tuned run costs {one:.1f} trainings.")
    draw(tuned, steps * np.arange(1, generations + 1), paths, mixtures, losses, output)


if __name__ == "__main__":
    typer.run(main)
