"""Data hyper-cleaning on scikit-learn's digits: a sweep for each method, on a Ray of this machine.

Every training image has a weight σ(λ_i) in the training loss. Labels are corrupted, the validation
images are clean, and the hypergradient of the validation loss turns the weights of corrupted
images down, inside each trial. The learning rate has no such gradient here: it differs between
trials, and population-based training moves it. Protocol of the Generalized Greedy paper (ICLR 2025
submission, §5.3) but for that rate: full batch, SGD with momentum 0.9, T = 10 inner steps for each
outer step, Adam 0.1 on λ, a CNN of three layers of 8 channels. Every method gets the same number of
inner and of outer steps.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import shutil
import warnings
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import typer
from papers import hypercleaning, report
from sklearn.datasets import load_digits

import gradhpo
from gradhpo.cluster import PBT, SearchSpace, Sweep, SweepResult, local_ray, loguniform

T = 10
OUTER_STEPS_IN_A_GENERATION = 4


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How large the experiment is."""

    train: int
    validation: int
    strides: tuple[int, int, int]
    outer_steps: int

    def describe(self, noise: float, trials: int) -> str:
        """Return the protocol in a sentence."""
        test = 1797 - self.train - self.validation
        return (
            f"{self.train} training images with label noise {noise:g}, {self.validation} clean for "
            f"validation, {test} for test; strides {self.strides}; {self.outer_steps} outer steps "
            f"of {T} inner steps; {trials} trials a method"
        )


PROTOCOLS = {
    "small": Protocol(train=500, validation=300, strides=(1, 2, 2), outer_steps=40),
    "full": Protocol(train=1000, validation=300, strides=(1, 1, 1), outer_steps=200),
    "tiny": Protocol(train=80, validation=40, strides=(1, 2, 2), outer_steps=8),
}

METHODS = {
    "PBT alone (First-Order)": "first-order",
    "One-Step": "one-step",
    "T1-T2 (DARTS)": "t1t2",
    "Greedy (0.9)": "greedy",
    "HyperDistill": "hyperdistill",
}


def problem(protocol: str, noise: float) -> gradhpo.Problem:
    """Return the hyper-cleaning problem; λ is a weight for each image, and the log of a rate."""
    sizes = PROTOCOLS[protocol]
    bunch: Any = load_digits()
    pixels = np.asarray(bunch.images, np.float32)[..., None] / 16
    labels = np.asarray(bunch.target, np.int32)
    cleaning = hypercleaning.problem(
        pixels, labels, sizes.train, sizes.validation, sizes.strides, noise
    )

    def init(key: jax.Array) -> tuple[Any, Any]:
        params, weights = cleaning.init(key)
        return params, {"weights": weights, "log_rate": jnp.log(0.1)}

    def train_loss(params: Any, lam: Any, batch: Any) -> jax.Array:
        return cleaning.train_loss(params, lam["weights"], batch)

    def val_loss(params: Any, lam: Any, batch: Any) -> jax.Array:
        return cleaning.val_loss(params, lam["weights"], batch)

    def metrics(params: Any, lam: Any, data: Any) -> dict[str, Any]:
        measured = cleaning.measure(params, lam["weights"], data)
        wrong = data["train"].y != data["train"].true_y
        return {
            "test_accuracy": measured["test_accuracy"],
            "auc": area_under_curve(wrong, -lam["weights"]),
        }

    return gradhpo.Problem(
        init, train_loss, val_loss, batch=cleaning.batch, metrics=metrics, data=cleaning.data
    )


def area_under_curve(positive: jax.Array, score: jax.Array) -> jax.Array:
    """Return the probability that a positive scores higher than a negative; ties count half."""
    above = (score[:, None] > score) + 0.5 * (score[:, None] == score)
    pairs = positive[:, None] & ~positive
    return jnp.sum(jnp.where(pairs, above, 0)) / jnp.sum(pairs)


def optimizer(method: str) -> gradhpo.BilevelOptimizer:
    """Return a method; all move the weights of images once in T inner steps, by Adam."""

    def inner(lam: Any) -> optax.GradientTransformation:
        return optax.sgd(jnp.exp(lam["log_rate"]), momentum=0.9)

    def last_of_t(step: Any, **kwargs: Any) -> Any:
        del kwargs
        return step % T == T - 1

    adam = optax.adam(0.1)
    kinds = {"weights": "tuned", "log_rate": "fixed"}

    def outer(tuned: Any) -> optax.GradientTransformation:
        return optax.multi_transform({"tuned": tuned, "fixed": optax.set_to_zero()}, kinds)

    every_t = outer(optax.conditionally_mask(adam, last_of_t))
    made: dict[str, Any] = {
        "first-order": lambda: gradhpo.FOOptimizer(inner, every_t),
        "one-step": lambda: gradhpo.OneStepOptimizer(inner, every_t),
        "t1t2": lambda: gradhpo.T1T2Optimizer(inner, every_t),
        "greedy": lambda: gradhpo.GreedyOptimizer(inner, outer(adam), unroll_steps=T, gamma=0.9),
        "hyperdistill": lambda: gradhpo.OnlineHypergradientOptimizer(
            inner, every_t, gamma=0.9, T=T
        ),
    }
    return made[method]()


def sweep(
    method: str,
    protocol: str,
    noise: float,
    trials: int,
    workers: int,
    seed: int,
    storage: Path,
    executor: Any = "auto",
) -> Sweep:
    """Return the sweep of one method."""
    steps = OUTER_STEPS_IN_A_GENERATION * (1 if method == "greedy" else T)
    return Sweep(
        problem=f"{Path(__file__).absolute()}:problem",
        optimizer=f"{Path(__file__).absolute()}:optimizer",
        space=SearchSpace(
            hyperparams={"log_rate": loguniform(0.02, 0.5, stored="log")},
            choices={"method": [method], "protocol": [protocol], "noise": [noise]},
        ),
        population=trials,
        generations=PROTOCOLS[protocol].outer_steps // OUTER_STEPS_IN_A_GENERATION,
        steps_per_generation=steps,
        scheduler=PBT(quantile=0.25, factors=(0.8, 1.25)),
        storage=storage / method,
        seed=seed,
        shards=workers,
        batching="auto",
        workers=workers,
        executor=executor,
    )


def row(name: str, result: SweepResult, inner_steps: int) -> list[str]:
    """Return a method's line of the table."""
    best, accuracy = result.best, 100 * np.asarray(result.final["test_accuracy"])
    made = result.report
    speed = counts = "–"  # the sweep was done already
    if made is not None:
        speed = f"{made.generations * inner_steps * len(accuracy) / made.seconds:,.0f}"
        counts = f"{made.compiles} + {made.loads}"
    rate = np.exp(best.metrics["hyperparams.log_rate"])
    return [
        name,
        f"{100 * best.metrics['test_accuracy']:.1f}",
        f"{np.median(accuracy):.1f} ({accuracy.min():.1f}–{accuracy.max():.1f})",
        f"{100 * best.metrics['auc']:.1f}",
        f"{rate:.3f}",
        speed,
        counts,
    ]


def draw(results: dict[str, SweepResult], output: Path) -> str:
    """Draw curves, weights, and the images trusted least by the method that finds them best."""
    best = max(results, key=lambda name: results[name].best.metrics["auc"])
    figure: Any = plt.figure(figsize=(13, 4), layout="constrained")
    left, middle, right = figure.subfigures(1, 3, width_ratios=[1.2, 1, 1.1])

    axes = left.subplots()
    for name, result in results.items():
        curves = np.stack([values for _, values in result.history()])
        steps = OUTER_STEPS_IN_A_GENERATION * np.arange(1, len(curves) + 1)
        style = {"linestyle": "--", "color": "black"} if "First" in name else {}
        (line,) = axes.plot(steps, np.nanmin(curves, 1), label=name, **style)
        median = np.nanmedian(curves, 1)
        axes.fill_between(steps, np.nanmin(curves, 1), median, alpha=0.12, color=line.get_color())
    axes.set(xlabel="outer step", ylabel="validation loss (best to median)", title="Validation")
    axes.legend(fontsize=8)

    train = results[best].data["train"]
    corrupted = np.asarray(train.y != train.true_y)
    weights = 1 / (1 + np.exp(-np.asarray(results[best].best.hyperparams["weights"])))
    axes, bins = middle.subplots(), np.linspace(0, 1, 31).tolist()
    axes.hist(weights[~corrupted], bins, alpha=0.6, density=True, label="clean")
    axes.hist(weights[corrupted], bins, alpha=0.6, density=True, label="corrupted")
    axes.set(xlabel="weight σ(λ)", ylabel="density", title=f"Weights, {best}")
    axes.legend()

    right.suptitle(f"Trusted least, {best}: label given (true)", fontsize=10)
    for axes, i in zip(right.subplots(3, 5).ravel(), np.argsort(weights), strict=False):
        axes.imshow(train.x[i, :, :, 0], cmap="gray_r")
        given, true = int(train.y[i]), int(train.true_y[i])
        axes.set_title(f"{given} ({true})", fontsize=9, color="C3" if given != true else "C0")
        axes.axis("off")
    report.save(figure, output)
    return best


def main(
    method: Annotated[list[str] | None, typer.Option(help="Of them only this; repeat it.")] = None,
    noise: Annotated[float, typer.Option(min=0, max=1, help="Share of labels replaced.")] = 0.3,
    trials: Annotated[int, typer.Option(min=2, help="Of each method, all workers together.")] = 8,
    workers: Annotated[int, typer.Option(min=1, help="Ray actors.")] = 2,
    seed: Annotated[int, typer.Option(min=0, help="Decides everything.")] = 0,
    full: Annotated[bool, typer.Option(help="The paper's full protocol; takes hours.")] = False,
    protocol: Annotated[str, typer.Option(help="small, full or tiny.")] = "small",
    storage: Annotated[Path, typer.Option(help="Holds the sweeps.")] = Path("out/hyperclean"),
    resume: Annotated[bool, typer.Option(help="Go on with what the storage holds.")] = False,
    executor: Annotated[str, typer.Option(help="auto, local or ray.")] = "auto",
    output: Annotated[Path, typer.Option(help="The figure.")] = Path("out/hyperclean_digits.png"),
) -> None:
    """Compare the hypergradient methods on digits with corrupted labels, a sweep for each."""
    # That First-Order moves no weight is what its row is there for.
    warnings.filterwarnings("ignore", "FOOptimizer", gradhpo.UnreachedWarning)
    plt.switch_backend("agg")
    output, protocol = report.writable(output), "full" if full else protocol
    if protocol not in PROTOCOLS:
        raise typer.BadParameter(f"protocol must be one of {', '.join(PROTOCOLS)}")
    if trials % workers:
        raise typer.BadParameter(f"trials must be a multiple of {workers} workers, got {trials}")
    if unknown := set(method or []) - set(METHODS.values()):
        accepted = ", ".join(METHODS.values())
        raise typer.BadParameter(f"method must be one of {accepted}, got {sorted(unknown)[0]}")
    chosen = {name: m for name, m in METHODS.items() if not method or m in method}
    report.say(f"Data hyper-cleaning: {PROTOCOLS[protocol].describe(noise, trials)}.")
    settings = (protocol, noise, trials, workers, seed, storage, executor)
    sweeps = {name: sweep(m, *settings) for name, m in chosen.items()}
    results: dict[str, SweepResult] = {}
    ray = executor != "local" and importlib.util.find_spec("ray") is not None
    with local_ray(workers) if ray else contextlib.nullcontext():
        for name, made in sweeps.items():
            report.say(f"{name}: gradhpo status {made.storage}")
            folder = Path(made.storage)
            if not resume and (folder / "manifest.json").exists():
                shutil.rmtree(folder)  # an earlier demonstration's
            results[name] = made.run()
    report.table(
        "Data hyper-cleaning: each method's best trial by validation loss",
        [
            *("method", "test accuracy, %", "of the population, %", "AUC, % of corrupted"),
            *("learning rate", "inner steps/s", "compiled + loaded"),
        ],
        [row(n, r, OUTER_STEPS_IN_A_GENERATION * T) for n, r in results.items()],
    )
    if (alone := results.get("PBT alone (First-Order)")) is not None:
        still = bool((alone.best.hyperparams["weights"] == 0).all())
        report.say(
            "λ is not in the validation loss, so First-Order must leave every weight alone, and "
            "shows what the sweep does without hypergradients: weights unmoved: "
            f"{'yes' if still else 'NO'}."
        )
    best = draw(results, output)
    report.say(f"{best} finds the corrupted labels best.")


if __name__ == "__main__":
    typer.run(main)
