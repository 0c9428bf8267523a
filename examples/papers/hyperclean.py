"""Data hyper-cleaning: the protocol of Table 2 of the Generalized Greedy paper (ICLR 2025 subm.).

Labels of 1000 training images are replaced at random with probability 0.3 or 0.5, and each image
has a weight σ(λ_i) in the training loss; a clean validation set tells how to move λ. Full batch,
SGD 0.1 with momentum 0.9, T = 10 inner steps in each of 200 outer steps, Adam 0.1 on λ, a CNN of
three layers of 8 channels. The weights go on from one outer step to the next. The paper leaves the
size of the validation set open: `--validation` takes several.

On scikit-learn's digits (1,797 scans of 8x8), which need no download; `--data mnist-5k`,
`fashion-mnist` and `mnist`, which the paper used, are read where `data_sets.py` finds them.
"""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import data_sets
import hypercleaning
import jax
import jax.numpy as jnp
import numpy as np
import optax
import report
import seeds as seeds_of
import typer
from sklearn.metrics import roc_auc_score
from tqdm import tqdm

import gradhpo
from gradhpo.horizon import estimate_at

T = 10
TEST_IMAGES = 2000
"""At most, of those that a set keeps for test."""
INNER, OUTER = optax.sgd(0.1, momentum=0.9), optax.adam(0.1)
PUBLISHED = {
    0.3: {"no HPO": 70.5, "T1-T2": 66.9, "IFT(5)": 72.0, "Greedy 0.9": 87.1},
    0.5: {"no HPO": 51.5, "T1-T2": 51.9, "IFT(5)": 54.1, "Greedy 0.9": 77.7},
}


def methods() -> dict[str, Any]:
    """Return the methods, and the exact one. First-Order, with no λ in L_val, is no HPO."""
    neumann: Any = {"solver": "neumann", "neumann_rate": 0.1, "K": 5}
    return {
        "no HPO": LastOf(gradhpo.FOOptimizer(INNER, OUTER), T),
        "T1-T2": LastOf(gradhpo.T1T2Optimizer(INNER, OUTER), T),
        "IFT(5)": gradhpo.ImplicitOptimizer(INNER, OUTER, unroll_steps=T, **neumann),
        "Greedy 0.9": gradhpo.GreedyOptimizer(INNER, OUTER, unroll_steps=T, gamma=0.9),
        "exact, 10 steps": gradhpo.UnrolledOptimizer(INNER, OUTER, unroll_steps=T),
    }


class LastOf(gradhpo.BilevelOptimizer):
    """A method of one inner step that moves λ once in `T`: it estimates at the last of them."""

    def __init__(self, method: gradhpo.BilevelOptimizer, T: int) -> None:
        super().__init__(method.inner_optimizer, method.outer_optimizer)
        self.method, self.steps = method, T

    def init(
        self, params: Any, hyperparams: Any, *, model_state: Any = None
    ) -> gradhpo.BilevelState:
        """Return the method's first state."""
        return self.method.init(params, hyperparams, model_state=model_state)

    def compute_hypergradient(
        self, state: Any, train_batch: Any, val_batch: Any, train_loss_fn: Any, val_loss_fn: Any
    ) -> Any:
        """Return the method's hypergradient at the last of the steps."""
        task = gradhpo.Task(train_batch, val_batch, train_loss_fn, val_loss_fn)
        return self.estimate(state, task).hypergradient

    def estimate(self, state: gradhpo.BilevelState, task: gradhpo.Task) -> gradhpo.Estimate:
        """Take the steps on the same batch."""
        stack = jax.tree.map(
            lambda x: jnp.broadcast_to(x, (self.steps, *x.shape)), task.train_batch
        )
        return estimate_at(self.method, state, dataclasses.replace(task, train_batch=stack))


class Outcome(NamedTuple):
    """What a run gave; stacked over seeds, `(seeds, …)`."""

    accuracy: Any
    """On the test images after each evaluation, `(evaluations,)`."""
    weights: Any
    """σ(λ), `(train,)`."""
    corrupted: Any
    """Whether a training label is wrong, `(train,)`."""
    steps: Any
    """Outer steps at each evaluation, `(evaluations,)`, the same for all seeds."""


def tune(optimizer: Any, problem: gradhpo.Problem, outer_steps: int, keys: jax.Array) -> Outcome:
    """Run all seeds as one population."""
    with warnings.catch_warnings():
        # That First-Order moves no weight is what its row is there for.
        warnings.simplefilter("ignore", gradhpo.UnreachedWarning)
        runs = seeds_of.run(problem, optimizer, outer_steps, keys, evaluations=20)
    accuracy = runs.evals["test_accuracy"].T
    weights = np.asarray(jax.nn.sigmoid(runs.state.hyperparams))
    train = runs.data["train"]
    return Outcome(accuracy, weights, train.y != train.true_y, runs.steps)


def evidence(settings: dict[str, Any], method: str, keys: jax.Array) -> dict[str, Any]:
    """Return a method's measures in a case, each of them with a number for each seed."""
    outcome = tune(methods()[method], problem(settings), settings["outer_steps"], keys)
    percent = 100 * outcome.accuracy
    return {
        "test_accuracy": percent[:, -1],
        "highest": percent.max(axis=1),
        "auc": detection(outcome),
        "curve": percent.T,
    }


def problem(settings: dict[str, Any]) -> gradhpo.Problem:
    """Return the problem of a case."""
    found = data_sets.read(settings["data"])
    test = found.some_for_test(settings["test"])
    strides = (2, 2, 1) if found.test is None else (2, 2, 2)
    sizes = (settings["train"], settings["validation"], strides, settings["noise"])
    return hypercleaning.problem(found.x, found.y, *sizes, test)


def detection(outcome: Outcome) -> list[float]:
    """Return each seed's area under the ROC curve, in %, for finding wrong labels by weight."""
    pairs = zip(outcome.corrupted, outcome.weights, strict=True)
    return [100 * float(roc_auc_score(wrong, -weight)) for wrong, weight in pairs]


def rows(outcomes: dict[str, Outcome], noise: float) -> list[list[str]]:
    """Return a row for each method; differences are between runs of the same seed."""
    made: list[list[str]] = []
    base = 100 * outcomes["no HPO"].accuracy[:, -1]
    for name, outcome in outcomes.items():
        final, best = 100 * outcome.accuracy[:, -1], 100 * outcome.accuracy.max(axis=1)
        published = str(PUBLISHED.get(noise, {}).get(name, ""))
        less = "" if name == "no HPO" else report.interval(final - base, 1)
        found = report.interval(detection(outcome), 1)
        made.append(
            [name, published, report.interval(final, 1), less, report.interval(best, 1), found]
        )
    return made


def verdict(outcomes: dict[str, Outcome]) -> str:
    """Say whether Greedy is above T1-T2 and IFT, and whether the interval says so too."""
    parts: list[str] = []
    for name in ("T1-T2", "IFT(5)"):
        gap = 100 * (outcomes["Greedy 0.9"].accuracy - outcomes[name].accuracy)[:, -1]
        clear = gap.mean() - report.half_width(gap) > 0
        answer = "yes" if gap.mean() > 0 else "no"
        parts.append(f"{name}: {answer}{', clear of 0' * bool(clear)} ({report.interval(gap, 1)})")
    return "; ".join(parts)


def draw(results: dict[str, dict[str, Outcome]], output: Path) -> None:
    """Draw the test accuracy against the outer step, a panel for each case."""
    figure, (panels,) = report.axes(len(results), width=5)
    for axes, (title, outcomes) in zip(panels, results.items(), strict=True):
        for name, outcome in outcomes.items():
            style = {"color": "black", "linestyle": "--"} if name == "no HPO" else {}
            curve = 100 * outcome.accuracy
            steps = outcome.steps
            (line,) = axes.plot(steps, curve.mean(0), label=name, **style)
            low, high = curve.min(0), curve.max(0)
            axes.fill_between(steps, low, high, alpha=0.12, color=line.get_color())
        axes.set(xlabel="outer step", ylabel="test accuracy, %: mean and range", title=title)
    panels[0].legend(fontsize=8)
    report.save(figure, output)


def main(
    noise: Annotated[list[float], typer.Option(help="Share of labels replaced; repeat.")] = [0.5],  # noqa: B006
    validation: Annotated[list[int], typer.Option(help="Validation images; repeat.")] = [300],  # noqa: B006
    data: Annotated[str, typer.Option(help="digits, mnist-5k, fashion-mnist or mnist.")] = "digits",
    train: Annotated[int, typer.Option(min=2, help="Training images.")] = 1000,
    outer_steps: Annotated[int, typer.Option(min=1, help="Outer steps.")] = 200,
    seeds: Annotated[int, typer.Option(min=2, help="Runs of each method.")] = 3,
    seed: Annotated[int, typer.Option(help="The key that they are split from.")] = 0,
    output: Annotated[Path, typer.Option(help="The figure.")] = Path("out/hyperclean.png"),
) -> None:
    """Reproduce Table 2 of the Greedy paper: test accuracy with corrupted training labels."""
    report.writable(output)
    try:
        found = data_sets.read(data)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error)) from None
    spare = int(found.test is None)
    for share in noise:
        if not 0 <= share <= 1:
            raise typer.BadParameter(f"--noise must be in [0, 1], got {share:g}")
    for size in validation:
        if size < 1 or train + size + spare > len(found.y):
            most = f"--train and --validation must leave some of {len(found.y)} images for test"
            raise typer.BadParameter(f"{most}, got {train} and {size}")
    keys = jax.random.split(jax.random.key(seed), seeds)
    results: dict[str, dict[str, Outcome]] = {}
    cases = [(share, size) for share in noise for size in validation]
    columns = ["method", "published, MNIST", "test accuracy, %", "less no HPO"]
    with tqdm(total=len(cases) * len(methods()), unit="run") as bar:
        for share, size in cases:
            case = f"noise {share:g}, {size} validation images"
            outcomes = results.setdefault(case, {})
            case_of = {"data": data, "noise": share, "train": train, "validation": size}
            made = problem(case_of | {"test": TEST_IMAGES})
            for name, optimizer in methods().items():
                bar.set_postfix_str(name)
                outcomes[name] = tune(optimizer, made, outer_steps, keys)
                bar.update()
            found = [*columns, "highest on the way", "AUC, wrong labels, %"]
            report.table(case, found, rows(outcomes, share))
    for case, outcomes in results.items():
        report.say(f"{case}: Greedy above {verdict(outcomes)}.")
    draw(results, output)


if __name__ == "__main__":
    typer.run(main)
