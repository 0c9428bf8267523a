"""Does one hypergradient run replace a swarm of fixed mixtures? On real text, at counted FLOPs.

Four parts, each a claim of docs/evidence.md: the comparison with a swarm, a useless domain, a
domain that changes later, and the transfer to a model 3.6 times as large. Takes about ten minutes
of a processor; `--part` takes one of them.
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


class Part(enum.StrEnum):
    """What can be run."""

    swarm = "swarm"
    useless = "useless"
    changed = "changed"
    transfer = "transfer"


def tuner(rate: float = 0.03) -> gradhpo.BilevelOptimizer:
    """Return One-Step, whose weights descend on the simplex with a floor of 0.005."""
    descent = mixture.entropic_descent(rate, floor=0.005)
    return gradhpo.OneStepOptimizer(INNER, optax.chain(mixture.scale_by_spread(), descent))


def tuned(mix: mixture.Mixture, steps: int, key: jax.Array) -> gradhpo.Solution:
    """Return a run that tunes the mixture."""
    return gradhpo.solve(mix.problem, tuner(), steps, key, record=["weights"], progress=False)


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


def with_changed(mix: mixture.Mixture, steps: int, seeds: int) -> None:
    """Print the weights before and after the reference becomes random bytes, and from anew."""
    spoilt = {**mix.domains, "reference": noise(len(mix.domains["reference"]))}
    lines: list[list[str]] = []
    for seed, key in enumerate(jax.random.split(jax.random.key(2), seeds)):
        before = tuned(mix, steps, key)
        now = mix.replace(domains=spoilt).continued(before, ["reference"])
        after = tuned(now, steps // 4, jax.random.fold_in(key, 1))
        anew = tuned(mix.replace(domains=spoilt), steps, jax.random.fold_in(key, 2))
        shown = [mixture.mean_weights(run) for run in (before, after, anew)]
        end = np.asarray(after.state.hyperparams["weights"])
        texts_ = [" ".join(f"{x:.3f}" for x in weights) for weights in (*shown, end)]
        lines.append([str(seed), *texts_])
    columns = ["seed", "before", "priced anew: mean", "a run from the start", "priced anew: end"]
    report.table(f"The reference becomes random bytes: {steps // 4} steps more", columns, lines)


def to_larger(mix: mixture.Mixture, steps: int, parts: int) -> None:
    """Print how a model 3.6 times as large orders mixtures, and how the found one does there."""
    found = mixture.mean_weights(tuned(mix, steps, jax.random.key(3)))
    grid = mixture.simplex_grid(3, parts)
    every = np.concatenate([grid, [np.full(3, 1 / 3)], [found]])
    keys = jax.numpy.repeat(jax.random.key(4)[None], len(every))
    losses: dict[int, Any] = {}
    for width in (32, 64):
        sized = text_mixture(width, rows=mix.rows, draw=mix.draw)
        losses[width] = mixture.train_fixed(sized, every, INNER, steps, keys)["test"]
    correlation = mixture.rank_correlation(*losses.values())
    columns = ["mixture", "width 32", "width 64"]
    order = np.argsort(losses[64])
    lines = [
        [" ".join(f"{x:.3f}" for x in every[i]), *(f"{x[i]:.4f}" for x in losses.values())]
        for i in order
    ]
    report.table("Mixtures at two sizes, best of the larger first", columns, lines)
    place = int(np.flatnonzero(order == len(every) - 1)[0]) + 1
    report.say(f"Rank correlation {correlation:.3f}; the found mixture is {place} of {len(every)}.")


def main(
    part: Annotated[list[Part] | None, typer.Option(help="Only this; repeat it.")] = None,
    steps: Annotated[int, typer.Option(min=4, help="Of a training.")] = 200,
    seeds: Annotated[int, typer.Option(min=1, help="How often.")] = 5,
    parts: Annotated[int, typer.Option(min=1, help="The swarm has weights in so many parts.")] = 8,
    rows: Annotated[int, typer.Option(min=3, help="Rows of a batch.")] = 24,
) -> None:
    """Run the claims of docs/evidence.md on data mixtures."""
    chosen = part or list(Part)
    mix = text_mixture(rows=rows, draw="sampled")
    sizes = ", ".join(f"{name} {x.size:,}" for name, x in texts().items())
    report.say(f"Bytes: {sizes}.")
    if Part.swarm in chosen:
        against_swarm(mix, steps, seeds, parts)
    if Part.useless in chosen:
        with_useless(mix, steps, seeds)
    if Part.changed in chosen:
        with_changed(mix, steps, seeds)
    if Part.transfer in chosen:
        to_larger(mix, steps, max(parts // 2, 1))


if __name__ == "__main__":
    typer.run(main)
