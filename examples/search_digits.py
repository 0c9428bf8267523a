"""Who should choose settings that have no gradient? Four searches on the digits, on equal terms.

Every trial trains the same network. Its weight decays, one a layer, are tuned by hypergradients
inside the trial. The learning rate, the momentum, how many rows of a batch count (an integer) and
what is done to the images (a category) are numbers of the program that only the search moves:
population-based bandits (PB2) with new trials drawn by a sampler of Optuna, PB2 alone,
population-based training (PBT), and random search. All take the same number of trial-steps, with
the same seeds and data, and run the same compiled program.

Needs `pip install 'gradhpo[examples,search]' optuna`.
"""

from __future__ import annotations

import dataclasses
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
from sklearn.datasets import load_digits
from tqdm import tqdm

import gradhpo
from gradhpo.cluster import (
    NEW,
    PB2,
    PBT,
    Decision,
    OptunaSampler,
    RandomSearch,
    Sampler,
    Scheduler,
    SearchSpace,
    Sweep,
    SweepResult,
    Table,
    categorical,
    integer,
    loguniform,
    uniform,
)

ROWS = 32
"""Of a batch, of which a trial may count fewer."""
SPACE = {
    "log_rate": loguniform(1e-3, 3, stored="log"),
    "momentum": uniform(0, 0.97),
    "rows": integer(2, ROWS, log=True),
    "images": categorical([0, 1, 2]),
}
IMAGES = "as they are", "with noise", "moved by up to a pixel"
WIDTH = 32
PB2_OPTUNA, PB2_ALONE, PBT_ALONE, RANDOM = "PB2 + Optuna", "PB2", "PBT", "random search"


@dataclasses.dataclass(frozen=True)
class PB2WithNewcomers:
    """PB2 that begins wide: for some generations, losers make room for new trials.

    Where PB2 would let a loser copy a winner, a new trial begins, until the generation of this
    number; afterwards in place of diverged trials alone. A sampler thus hears of those that lost
    and of those that diverged, and draws what comes.
    """

    until: int

    def __call__(self, table: Table, space: SearchSpace, rng: np.random.Generator) -> Decision:
        """Decide."""
        made = PB2()(table, space, rng)
        loses = made.parents != np.arange(len(made.parents))
        anew = loses & (table.diverged() | (table.generation + 1 < self.until))
        changes = {n: c._replace(mask=c.mask & ~anew) for n, c in made.changes.items()}
        return Decision(np.where(anew, NEW, made.parents), changes)


def searches(generations: int, population: int) -> dict[str, tuple[Scheduler, Sampler | None]]:
    """Return by name what decides between generations, and what draws new trials."""
    tpe = OptunaSampler("TPESampler", multivariate=True, n_startup_trials=population)
    return {
        PB2_OPTUNA: (PB2WithNewcomers(until=max(2, generations // 4)), tpe),
        PB2_ALONE: (PB2(), None),
        PBT_ALONE: (PBT(), None),
        RANDOM: (RandomSearch(), None),
    }


def logits(params: Any, x: jax.Array) -> jax.Array:
    """Map images `(n, 64)` to logits `(n, 10)`."""
    return jax.nn.relu(x @ params["in"]) @ params["out"]


def cross_entropy(params: Any, batch: Any) -> jax.Array:
    """Return the loss of each row."""
    x, y = batch
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y)


def moved(key: jax.Array, x: jax.Array) -> jax.Array:
    """Return images `(n, 64)`, each moved by up to a pixel in both directions."""
    padded = jnp.pad(x.reshape(-1, 8, 8), ((0, 0), (1, 1), (1, 1)))
    corners = jax.random.randint(key, (len(x), 2), 0, 3)
    cut = jax.vmap(lambda image, corner: jax.lax.dynamic_slice(image, corner, (8, 8)))
    return cut(padded, corners).reshape(x.shape)


def problem() -> gradhpo.Problem:
    """Return an MLP on 300 digits, 600 others for validation; λ is what is searched, and decays."""
    bunch: Any = load_digits()
    pixels = np.asarray(bunch.data, np.float32) / 16
    labels = np.asarray(bunch.target, np.int32)
    parts = {"train": slice(0, 300), "val": slice(300, 900), "test": slice(900, None)}

    def init(key: jax.Array) -> tuple[Any, Any]:
        keys = jax.random.split(key)
        weights = {
            "in": jax.random.normal(keys[0], (64, WIDTH)) / 8,
            "out": jax.random.normal(keys[1], (WIDTH, 10)) / np.sqrt(WIDTH),
        }
        log_decay = {"in": jnp.float32(-8), "out": jnp.float32(-8)}
        return weights, {"log_decay": log_decay} | {name: jnp.float32(0) for name in SPACE}

    def data(key: jax.Array) -> Any:
        order = jax.random.permutation(key, len(labels))
        x, y = jnp.asarray(pixels)[order], jnp.asarray(labels)[order]
        return {name: (x[part], y[part]) for name, part in parts.items()}

    def train_loss(params: Any, lam: Any, batch: Any) -> jax.Array:
        x, y = batch
        losses = cross_entropy(params, (x[lam["images"].astype(int)], y))
        squares = jax.tree.map(lambda d, w: jnp.exp(d) * jnp.sum(w**2), lam["log_decay"], params)
        counted = jnp.arange(ROWS) < lam["rows"]
        return jnp.sum(losses * counted) / lam["rows"] + sum(jax.tree.leaves(squares))

    def val_loss(params: Any, lam: Any, batch: Any) -> jax.Array:
        del lam
        return cross_entropy(params, batch).mean()

    def batch(key: jax.Array, data: Any) -> Any:
        keys = jax.random.split(key, 4)
        x, y = (a[jax.random.randint(keys[0], (ROWS,), 0, 300)] for a in data["train"])
        noisy = x + 0.2 * jax.random.normal(keys[1], x.shape)
        seen = jax.random.randint(keys[2], (64,), 0, 600)
        train = jnp.stack([x, noisy, moved(keys[3], x)]), y
        return train, jax.tree.map(lambda a: a[seen], data["val"])

    def metrics(params: Any, lam: Any, data: Any) -> dict[str, jax.Array]:
        x, y = data["test"]
        return {"test_accuracy": jnp.mean(jnp.argmax(logits(params, x), -1) == y)}

    return gradhpo.Problem(init, train_loss, val_loss, batch, metrics=metrics, data=data)


def validation(data: Any) -> Any:
    """Return the whole validation set, by which trials are compared."""
    return data["val"]


def optimizer() -> gradhpo.BilevelOptimizer:
    """Return One-Step, which moves the decays, and leaves what is searched alone."""
    labels = {"log_decay": "tuned"} | dict.fromkeys(SPACE, "fixed")
    outer = optax.multi_transform({"tuned": optax.adam(0.1), "fixed": optax.set_to_zero()}, labels)
    return gradhpo.OneStepOptimizer(
        lambda lam: optax.sgd(jnp.exp(lam["log_rate"]), momentum=lam["momentum"]), outer
    )


def sweep(name: str, seed: int, sizes: tuple[int, int, int], storage: Path) -> Sweep:
    """Return the sweep of one search and one seed."""
    population, generations, steps = sizes
    scheduler, sampler = searches(generations, population)[name]
    return Sweep(
        problem=f"{Path(__file__).absolute()}:problem",
        optimizer=f"{Path(__file__).absolute()}:optimizer",
        validation=f"{Path(__file__).absolute()}:validation",
        metric="validation_loss",
        space=SearchSpace(SPACE),
        population=population,
        generations=generations,
        steps_per_generation=steps,
        scheduler=scheduler,
        sampler=sampler,
        storage=storage / name.replace(" ", "") / str(seed),
        seed=seed,
        batching="vmap",  # named, so that no sweep compares layouts, and all have the same
        executor="local",
        progress=False,
    )


def run(made: Sweep, resume: bool) -> SweepResult:
    """Run a sweep, from its beginning unless it is to go on."""
    folder = Path(made.storage)
    if not resume and (folder / "manifest.json").exists():
        shutil.rmtree(folder)  # an earlier demonstration's
    return made.run()


def best_so_far(result: SweepResult) -> np.ndarray:
    """Return the lowest validation loss up to each generation."""
    return np.fmin.accumulate([np.nanmin(losses) for _, losses in result.history()])


def row(name: str, results: list[SweepResult], others: list[SweepResult]) -> list[str]:
    """Return a search's line of the table, beside random search's if that ran."""
    scores, compared = ([r.best.score for r in some] for some in (results, others))
    less = "" if others in ([], results) else report.interval(np.subtract(scores, compared), 4)
    accuracy = [100 * result.best.metrics["test_accuracy"] for result in results]
    new = [(result.table["parent"] == NEW).sum() for result in results]
    return [
        name,
        report.interval(scores, 4),
        less,
        report.interval(accuracy, 2),
        f"{np.mean(new):.0f}",
        f"{np.mean([len(result.copies) for result in results]):.0f}",
    ]


def draw(results: dict[str, list[SweepResult]], steps: int, output: Path) -> None:
    """Draw the best so far, and the learning rate of the populations, against trial-steps."""
    figure, ((left, right),) = report.axes(2, width=5.5)
    for name, some in results.items():
        curves = np.stack([best_so_far(result) for result in some])
        shape = (*curves.shape, -1)
        rates = np.stack([result.table["hyperparams.log_rate"] for result in some]).reshape(shape)
        taken = steps * rates.shape[-1] * np.arange(1, curves.shape[1] + 1)
        for axes, values in ((left, curves), (right, np.exp(np.median(rates, axis=2)))):
            (line,) = axes.plot(taken, np.median(values, 0), label=name)
            low, high = values.min(0), values.max(0)
            axes.fill_between(taken, low, high, alpha=0.12, color=line.get_color())
    seeds = f"median and range of {len(next(iter(results.values())))} seeds"
    left.set(ylabel="best validation loss so far", yscale="log", title=seeds.capitalize())
    right.set(ylabel="learning rate, median of the trials", yscale="log")
    for axes in (left, right):
        axes.set(xlabel="trial-steps")
    left.legend()
    report.save(figure, output)


def main(
    search: Annotated[list[str] | None, typer.Option(help="Of them only this; repeat it.")] = None,
    population: Annotated[int, typer.Option(min=4, help="Trials at a time.")] = 16,
    generations: Annotated[int, typer.Option(min=2, help="Between two, a search decides.")] = 24,
    steps: Annotated[int, typer.Option(min=1, help="Steps in a generation.")] = 25,
    seeds: Annotated[int, typer.Option(min=1, help="Sweeps of each search.")] = 5,
    first_seed: Annotated[int, typer.Option(min=0, help="Decides everything.")] = 0,
    storage: Annotated[Path, typer.Option(help="Holds the sweeps.")] = Path("out/search"),
    resume: Annotated[bool, typer.Option(help="Go on with what the storage holds.")] = False,
    output: Annotated[Path, typer.Option(help="The figure.")] = Path("out/search_digits.png"),
) -> None:
    """Compare PB2 with a sampler of Optuna, PB2, PBT and random search at equal trial-steps."""
    plt.switch_backend("agg")
    output, sizes = report.writable(output), (population, generations, steps)
    known = list(searches(generations, population))
    if unknown := set(search or []) - set(known):
        accepted = ", ".join(known)
        raise typer.BadParameter(f"search must be one of {accepted}, got {sorted(unknown)[0]}")
    names = [name for name in known if not search or name in search]
    report.say(
        f"{population} trials at a time, {generations} generations of {steps} steps: "
        f"{population * generations * steps:,} trial-steps for each search and seed."
    )
    # Every sweep is made before the first one runs: what is wrong with one is said at once.
    sweeps = [
        (name, sweep(name, seed, sizes, storage))
        for seed in range(first_seed, first_seed + seeds)
        for name in names
    ]
    results: dict[str, list[SweepResult]] = {name: [] for name in names}
    for name, made in tqdm(sweeps, unit="sweep"):
        results[name].append(run(made, resume))
    report.table(
        f"Settings without a gradient, {seeds} seeds: mean ± 95% interval",
        [
            *("search", "best validation loss", f"less {RANDOM}, same seed"),
            *("its test accuracy, %", "trials drawn", "copies"),
        ],
        [row(name, some, results.get(RANDOM, [])) for name, some in results.items()],
    )
    reports = [result.report for some in results.values() for result in some if result.report]
    counted = sum(made.compiles for made in reports), len(reports)
    report.say("Programs of a step compiled: {}, for {} sweeps that ran.".format(*counted))
    images = [IMAGES[int(result.best.settings["images"])] for result in results[names[0]]]
    report.say(f"The best of {names[0]} saw images {'; '.join(images)}.")
    draw(results, steps, output)


if __name__ == "__main__":
    typer.run(main)
