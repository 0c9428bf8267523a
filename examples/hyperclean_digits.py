"""Data hyper-cleaning on scikit-learn's digits: learn which training labels are wrong.

Every training image has a weight σ(λ_i) in the training loss. Labels are corrupted, the validation
images are clean, and the hypergradient of the validation loss turns the weights of corrupted
images down. Protocol of the Generalized Greedy paper (ICLR 2025 submission, §5.3): full batch, SGD
0.1 with momentum 0.9, T = 10 inner steps for each outer step, Adam 0.1 on λ, a CNN of three layers
of 8 channels. Every method gets the same number of inner and of outer steps.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.monitoring
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import optax
import typer
from papers import hypercleaning
from papers.hypercleaning import Images
from rich.console import Console
from rich.table import Table
from scipy.stats import t as student_t
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score

import gradhpo

T = 10


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How large the experiment is."""

    train: int
    validation: int
    strides: tuple[int, int, int]
    outer_steps: int

    def describe(self, noise: float, seeds: int) -> str:
        """Return the protocol in a sentence."""
        test = 1797 - self.train - self.validation
        return (
            f"{self.train} training images with label noise {noise:g}, {self.validation} clean for "
            f"validation, {test} for test; strides {self.strides}; {self.outer_steps} outer steps "
            f"of {T} inner steps; {seeds} seeds"
        )


SMALL = Protocol(train=500, validation=300, strides=(1, 2, 2), outer_steps=40)
FULL = Protocol(train=1000, validation=300, strides=(1, 1, 1), outer_steps=200)


def digits_problem(protocol: Protocol, noise: float) -> gradhpo.Problem:
    """Return the hyper-cleaning problem; split, corruption and weights are drawn from the key."""
    bunch: Any = load_digits()
    pixels = np.asarray(bunch.images, np.float32)[..., None] / 16
    labels = np.asarray(bunch.target, np.int32)
    sizes = (protocol.train, protocol.validation, protocol.strides)
    return hypercleaning.problem(pixels, labels, *sizes, noise)


class Outcome(NamedTuple):
    """What a method gave; the leading axis is the seed."""

    params: Any
    weights: np.ndarray
    """σ(λ), `(seeds, train)`."""
    val_curve: np.ndarray
    """Validation loss after each outer step, `(seeds, outer_steps)`."""
    test_accuracy: np.ndarray
    """At the end, `(seeds,)`."""
    steps_per_second: float
    """Inner steps of all seeds together, compilation excluded."""
    compiles: int


class CompileCounter:
    """Counts what XLA compiles while this is open."""

    def __init__(self) -> None:
        self.count = 0

    def __enter__(self) -> CompileCounter:
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def __exit__(self, *exc: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **kwargs: Any) -> None:
        del duration_secs, kwargs
        self.count += event == "/jax/core/compile/backend_compile_duration"


INNER = optax.sgd(0.1, momentum=0.9)
OUTER = optax.adam(0.1)


def methods() -> dict[str, gradhpo.BilevelOptimizer]:
    """Return the methods, which all move λ once in T inner steps."""

    def last_of_t(step: Any, **kwargs: Any) -> Any:
        del kwargs
        return step % T == T - 1

    every_t = optax.conditionally_mask(OUTER, last_of_t)
    return {
        "First-Order": gradhpo.FOOptimizer(INNER, every_t),
        "One-Step": gradhpo.OneStepOptimizer(INNER, every_t),
        "T1-T2 (DARTS)": gradhpo.T1T2Optimizer(INNER, every_t),
        "Greedy (0.9)": gradhpo.GreedyOptimizer(INNER, OUTER, unroll_steps=T, gamma=0.9),
        "HyperDistill": gradhpo.OnlineHypergradientOptimizer(INNER, every_t, gamma=0.9, T=T),
    }


def tune(
    optimizer: gradhpo.BilevelOptimizer,
    problem: gradhpo.Problem,
    protocol: Protocol,
    keys: jax.Array,
) -> Outcome:
    """Run one method on all seeds at once."""
    greedy = isinstance(optimizer, gradhpo.GreedyOptimizer)
    inner_steps = T * protocol.outer_steps
    per_step = T if greedy else 1
    with CompileCounter() as compiled:
        warm = gradhpo.solve(problem, optimizer, T // per_step, keys, progress=False)
        started = time.perf_counter()
        solution = gradhpo.solve(
            problem,
            optimizer,
            inner_steps // per_step,
            keys,
            eval_every=T // per_step,
            resume=warm,
        )
    seconds = time.perf_counter() - started
    return Outcome(
        solution.state.params,
        np.asarray(jax.nn.sigmoid(solution.state.hyperparams)),
        solution.evals["val_loss"].T,
        solution.evals["test_accuracy"][-1],
        (inner_steps - T) * len(keys) / seconds,
        compiled.count,
    )


def train_without_hpo(problem: gradhpo.Problem, protocol: Protocol, keys: jax.Array) -> Outcome:
    """Train as one would without this library: optax in a `scan`, all weights at σ(0)."""

    def step(carry: Any, data: Any) -> Any:
        params, opt_state, lam = carry
        grads = jax.grad(problem.train_loss)(params, lam, data["train"])
        updates, opt_state = INNER.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, lam

    def start(key: jax.Array) -> Any:
        params, lam = problem.start(key)
        return (params, INNER.init(params), lam), problem.start_data(key)

    @jax.jit
    @jax.vmap
    def outer_step(carry: Any, data: Any) -> Any:
        carry = jax.lax.fori_loop(0, T, lambda _, carry: step(carry, data), carry)
        return carry, problem.measure(carry[0], carry[2], data)

    with CompileCounter() as compiled:
        carry, data = jax.jit(jax.vmap(start))(keys)
        carry, measured = jax.block_until_ready(outer_step(carry, data))
        started, rows = time.perf_counter(), [measured]
        for _ in range(protocol.outer_steps - 1):
            carry, measured = outer_step(carry, data)
            rows.append(measured)
        jax.block_until_ready(carry)
    seconds = time.perf_counter() - started
    return Outcome(
        carry[0],
        np.asarray(jax.nn.sigmoid(carry[2])),
        np.stack([row["val_loss"] for row in rows], axis=1),
        np.asarray(rows[-1]["test_accuracy"]),
        (protocol.outer_steps - 1) * T * len(keys) / seconds,
        compiled.count,
    )


def interval(values: np.ndarray) -> str:
    """Return the mean with the half-width of its 95% interval (Student's t)."""
    half = student_t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return f"{100 * np.mean(values):.1f} ± {100 * half:.1f}"


def detection(weights: np.ndarray, corrupted: np.ndarray) -> np.ndarray:
    """Return for each seed the area under the ROC curve for finding corrupted labels by weight."""
    pairs = zip(corrupted, weights, strict=True)
    return np.asarray([roc_auc_score(wrong, -weight) for wrong, weight in pairs])


def same_bits(a: Any, b: Any) -> bool:
    """Whether two trees hold the same bits."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)


def table(outcomes: dict[str, Outcome], corrupted: np.ndarray) -> Table:
    """Return the results as a table."""
    columns = ("method", "test accuracy, %", "AUC, % of corrupted", "inner steps/s", "compiles")
    result = Table(*columns, title="Data hyper-cleaning, mean ± 95% interval over seeds")
    for name, outcome in outcomes.items():
        auc = interval(detection(outcome.weights, corrupted))
        speed, compiles = f"{outcome.steps_per_second:.0f}", str(outcome.compiles)
        result.add_row(name, interval(outcome.test_accuracy), auc, speed, compiles)
    return result


def draw(outcomes: dict[str, Outcome], train: Images, path: Path) -> str:
    """Draw curves, weights, and the images trusted least by the method that finds them best."""
    corrupted = np.asarray(train.y != train.true_y)
    best = max(outcomes, key=lambda name: detection(outcomes[name].weights, corrupted).mean())
    figure = plt.figure(figsize=(13, 4), layout="constrained")
    parts: Any = figure.subfigures(1, 3, width_ratios=[1.2, 1, 1.1])
    left, middle, right = parts

    axes = left.subplots()
    for name, outcome in outcomes.items():
        curve = outcome.val_curve
        style = {"linestyle": "--", "color": "black", "zorder": 5} if name == "without HPO" else {}
        outer = np.arange(1, curve.shape[1] + 1)
        (line,) = axes.plot(outer, curve.mean(0), label=name, **style)
        low, high = curve.min(0), curve.max(0)
        axes.fill_between(outer, low, high, alpha=0.12, color=line.get_color())
    axes.set(xlabel="outer step", ylabel="validation loss (mean and range)", title="Validation")
    axes.legend(fontsize=8)

    axes = middle.subplots()
    weights, bins = outcomes[best].weights, np.linspace(0, 1, 31).tolist()
    axes.hist(weights[~corrupted], bins, alpha=0.6, density=True, label="clean")
    axes.hist(weights[corrupted], bins, alpha=0.6, density=True, label="corrupted")
    axes.set(xlabel="weight σ(λ)", ylabel="density", title=f"Weights, {best}")
    axes.legend()

    right.suptitle(f"Trusted least, {best}, first seed: label given (true)", fontsize=10)
    for axes, i in zip(right.subplots(3, 5).ravel(), np.argsort(weights[0]), strict=False):
        axes.imshow(train.x[0, i, :, :, 0], cmap="gray_r")
        given, true = int(train.y[0, i]), int(train.true_y[0, i])
        axes.set_title(f"{given} ({true})", fontsize=9, color="C3" if given != true else "C0")
        axes.axis("off")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return best


def main(
    noise: Annotated[float, typer.Option(min=0, max=1, help="Share of labels replaced.")] = 0.3,
    seeds: Annotated[int, typer.Option(min=2, help="Runs, batched by vmap.")] = 5,
    seed: Annotated[int, typer.Option(help="The key that all of them are split from.")] = 0,
    full: Annotated[bool, typer.Option(help="The paper's full protocol, about an hour.")] = False,
    output: Annotated[Path, typer.Option(help="The figure.")] = Path("out/hyperclean_digits.png"),
) -> None:
    """Compare the hypergradient methods on digits with corrupted labels."""
    mpl.use("agg")
    console, protocol = Console(), FULL if full else SMALL
    console.print(f"Data hyper-cleaning: {protocol.describe(noise, seeds)}.", highlight=False)
    problem = digits_problem(protocol, noise)
    keys = jax.random.split(jax.random.key(seed), seeds)
    outcomes = {"without HPO": train_without_hpo(problem, protocol, keys)}
    for name, optimizer in methods().items():
        console.print(name, highlight=False)
        outcomes[name] = tune(optimizer, problem, protocol, keys)
    train: Images = jax.jit(jax.vmap(problem.start_data))(keys)["train"]
    console.print(table(outcomes, np.asarray(train.y != train.true_y)))
    same = same_bits(outcomes["First-Order"].params, outcomes["without HPO"].params)
    console.print(
        "λ is not in the validation loss, so First-Order must train as without HPO: "
        f"weights equal to the bit: {'yes' if same else 'NO'}."
    )
    best = draw(outcomes, train, output)
    console.print(f"{best} finds the corrupted labels best. Figure: {output}", highlight=False)


if __name__ == "__main__":
    typer.run(main)
