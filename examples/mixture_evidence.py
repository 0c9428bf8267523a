"""Does one hypergradient run replace a swarm of fixed mixtures? On real text, at counted FLOPs.

Two of the claims of docs/evidence.md are run by this script: the comparison with a swarm, and a
useless domain; `--part` takes one of them. The others are `papers/claims/mixture-*.toml`, which
`papers/evidence.py` runs: a domain that changes later, and the transfer to a larger model.
"""

from __future__ import annotations

import enum
from typing import Annotated, Any

import jax
import numpy as np
import optax
import typer
from papers import report
from text_domains import noise, text_mixture, texts

import gradhpo
from gradhpo import mixture

INNER = optax.adam(1e-2)
ONE_STEP = "One-Step"
RATE = 0.03
CHANGED = "reference"
"""The domain that becomes random bytes."""


class Part(enum.StrEnum):
    """What can be run."""

    swarm = "swarm"
    useless = "useless"


def tuner(rate: float = RATE) -> gradhpo.BilevelOptimizer:
    """Return One-Step, whose weights descend on the simplex with a floor of 0.005."""
    descent = mixture.entropic_descent(rate, floor=0.005)
    return gradhpo.OneStepOptimizer(INNER, optax.chain(mixture.scale_by_spread(), descent))


def tuned(mix: mixture.Mixture, steps: int, key: jax.Array, rate: float = RATE) -> gradhpo.Solution:
    """Return a run that tunes the mixture, or runs for several keys."""
    one_step = tuner(rate)
    return gradhpo.solve(mix.problem, one_step, steps, key, record=["weights"], progress=False)


def against_swarm(mix: mixture.Mixture, steps: int, seeds: int, parts: int) -> None:
    """Print the comparison with a swarm and with what else there is."""
    made = mixture.compare(
        mix,
        {ONE_STEP: tuner()},
        INNER,
        steps,
        jax.random.key(0),
        seeds=seeds,
        swarm=mixture.simplex_grid(3, parts),
        floor=0.005,
        progress=report.say,
    )
    rows = [[*row, report.interval(made.losses[row[0]], 4)] for row in made.rows()]
    columns = ["way", "python, reference, licences", "test loss", "of the gain", "trainings"]
    report.table(f"{steps} steps, {seeds} seeds", [*columns, "95% interval"], rows)
    less = made.losses["swarm"] - made.losses[ONE_STEP]
    share = made.flops[ONE_STEP] / made.flops["swarm"]
    report.say(f"The swarm's best less {ONE_STEP}, same seed: {report.interval(less, 4)} nats.")
    report.say(f"FLOPs of {ONE_STEP}, of the swarm's: {share:.1%}.")


def with_useless(mix: mixture.Mixture, steps: int, seeds: int) -> None:
    """Print the weights where random bytes are a fourth domain."""
    rows = len(mix.domains["licences"])
    more = mix.replace(domains={**mix.domains, "random bytes": noise(rows)})
    keys = jax.random.split(jax.random.key(1), seeds)
    runs = [tuned(more, steps, key) for key in keys]
    ends = [np.asarray(run.state.hyperparams["weights"]) for run in runs]
    means = [mixture.mean_weights(run) for run in runs]
    columns = ["seed", *more.names, "random bytes at the end"]
    lines = [
        [str(seed), *(f"{x:.3f}" for x in mean), f"{end[-1]:.4f}"]
        for seed, (mean, end) in enumerate(zip(means, ends, strict=True))
    ]
    report.table("With a useless domain: mean weights of the second half", columns, lines)


def changed(settings: dict[str, Any], method: str, keys: jax.Array) -> dict[str, Any]:
    """Return what the reference weighs, in %, after it has become random bytes.

    Either a quarter of a run goes on from where one ended before that, or a whole run begins anew.
    """
    steps = settings["steps"]
    mix = text_mixture(rows=settings["rows"], draw="sampled")
    spoilt = {**mix.domains, CHANGED: noise(len(mix.domains[CHANGED]))}
    changed_mix = mix.replace(domains=spoilt)
    before, after, anew = jax.vmap(lambda key: jax.random.split(key, 3), out_axes=1)(keys)
    if method == "priced anew":
        first, rate = tuned(mix, steps, before), settings.get("pricing_rate", RATE)
        runs = [
            tuned(changed_mix.continued(first, [CHANGED], run=i), steps // 4, key, rate)
            for i, key in enumerate(after)
        ]
        ends = np.stack([np.asarray(run.state.hyperparams["weights"]) for run in runs])
        means = np.stack([mixture.mean_weights(run) for run in runs])
    else:
        run = tuned(changed_mix, steps, anew)
        ends, means = np.asarray(run.state.hyperparams["weights"]), mixture.mean_weights(run)
    place = mix.names.index(CHANGED)
    return {"end": 100 * ends[:, place], "mean": 100 * means[:, place], "weights": means}


def transfer(settings: dict[str, Any], method: str, keys: jax.Array) -> dict[str, Any]:
    """Return how alike two sizes of the model order mixtures, and how a found one does there."""
    del method
    steps, widths = settings["steps"], settings["widths"]
    small, large = (text_mixture(width, rows=settings["rows"], draw="sampled") for width in widths)
    grid = mixture.simplex_grid(3, settings["parts"])
    rows: list[dict[str, Any]] = []
    for search, fresh in (jax.random.split(key) for key in keys):
        found = mixture.mean_weights(tuned(small, steps, search))
        every = np.concatenate([grid, [np.full(3, 1 / 3)], [found]])
        same = jax.numpy.repeat(fresh[None], len(every))
        few, many = (
            mixture.train_fixed(mix, every, INNER, steps, same)["test"] for mix in (small, large)
        )
        n = len(grid)
        rows.append(
            {
                "correlation": mixture.rank_correlation(few[:n], many[:n]),
                "place": 1 + np.sum(many[:n] < many[-1]),
                "uniform": many[n],
                "best": many[:n].min(),
                "found": many[-1],
                "small_losses": few,
                "large_losses": many,
                "weights": found,
            }
        )
    return stacked(rows)


def find(
    mix: mixture.Mixture, method: str, settings: dict[str, Any], keys: jax.Array
) -> tuple[np.ndarray, float]:
    """Return the mixture that a way finds with each key, `(seeds, domains)`, and a search's FLOPs.

    The swarm chooses by the validation rows of one model for each of its mixtures.
    """
    steps = settings["steps"]
    if method == "uniform":
        return np.tile(mix.first_weights, (len(keys), 1)), 0.0
    if method == "swarm":
        grid = mixture.simplex_grid(3, settings["parts"])
        every, each = np.tile(grid, (len(keys), 1)), jax.numpy.repeat(keys, len(grid))
        losses = mixture.train_fixed(mix, every, INNER, steps, each)["target/manual"]
        best = np.nanargmin(losses.reshape(len(keys), -1), axis=1)
        return grid[best], len(grid) * steps * mixture.training_flops(mix, INNER)
    one_step = tuner(settings["rate"])
    distilled = gradhpo.OnlineHypergradientOptimizer(
        INNER, one_step.outer_optimizer, gamma=settings["gamma"], scale="unit"
    )
    chosen = distilled if method == "HyperDistill" else one_step
    run = gradhpo.solve(mix.problem, chosen, steps, keys, record=["weights"], progress=False)
    return mixture.mean_weights(run), mixture.search_flops(mix, chosen, steps)


def judged(settings: dict[str, Any], method: str, keys: jax.Array) -> dict[str, Any]:
    """Return the test loss of new models, many for each seed, on the mixture that a way finds."""
    steps, models = settings["steps"], settings["models"]
    mix = text_mixture(rows=settings["rows"], draw="sampled")
    search, fresh = jax.vmap(jax.random.split, out_axes=1)(keys)
    found, cost = find(mix, method, settings, search)
    same = jax.vmap(lambda key: jax.random.split(key, models))(fresh).reshape(-1)
    every = np.repeat(found, models, axis=0)
    losses = mixture.train_fixed(mix, every, INNER, steps, same)["test"].reshape(-1, models)
    trainings = cost / (steps * mixture.training_flops(mix, INNER))
    shares = dict(zip(mix.names, found.T, strict=True))
    return {"test_loss": losses.mean(1), **shares, "cost": np.full(len(keys), trainings)}


def stacked(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what was measured with each seed, with a leading axis of seeds."""
    return {name: np.stack([np.asarray(row[name]) for row in rows]) for name in rows[0]}


PARTS = {"changed": changed, "transfer": transfer, "judged": judged}


def evidence(settings: dict[str, Any], method: str, keys: jax.Array) -> dict[str, Any]:
    """Return the measures of a method in a case of the registered claims."""
    return PARTS[settings["part"]](settings, method, keys)


def main(
    part: Annotated[list[Part] | None, typer.Option(help="Only this; repeat it.")] = None,
    steps: Annotated[int, typer.Option(min=4, help="Of a training.")] = 200,
    seeds: Annotated[int, typer.Option(min=1, help="How often.")] = 5,
    parts: Annotated[int, typer.Option(min=1, help="The swarm has weights in so many parts.")] = 8,
    rows: Annotated[int, typer.Option(min=3, help="Rows of a batch.")] = 24,
) -> None:
    """Run the first claims of docs/evidence.md on data mixtures."""
    chosen = part or list(Part)
    mix = text_mixture(rows=rows, draw="sampled")
    sizes = ", ".join(f"{name} {x.size:,}" for name, x in texts().items())
    report.say(f"Bytes: {sizes}.")
    if Part.swarm in chosen:
        against_swarm(mix, steps, seeds, parts)
    if Part.useless in chosen:
        with_useless(mix, steps, seeds)


if __name__ == "__main__":
    typer.run(main)
