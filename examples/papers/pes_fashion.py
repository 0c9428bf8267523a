"""The network of the PES paper (Vicol et al., ICML 2021): a rate and a momentum for every block.

An MLP of five hidden layers is trained on Fashion-MNIST by SGD with momentum for T steps, and λ has
a learning rate and a momentum for each of its weight matrices and biases. What counts is the mean
of the validation loss after all T steps. Truncated estimates look at windows of K steps: exact
gradients and ES forget at each what λ did before, PES and NRES do not.

The settings are those of the published code, reduced: images of 14x14 and layers of 32 units in
place of 28x28 and 100, shorter runs, and no number of units among λ.

The four files of Fashion-MNIST (MIT licence) are those of Debian's dataset-fashion-mnist, or of
github.com/zalandoresearch/fashion-mnist: `--data FOLDER`.
"""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import data_sets
import jax
import jax.numpy as jnp
import mnist
import numpy as np
import optax
import report
import typer
from tqdm import tqdm

import gradhpo

LAYERS, CLASSES = 5, 10
SIGMA, PARTICLES, RATE = 0.3, 10, 3e-2
RATES, MOMENTA = (1e-4, 1e-2), (0.01, 0.9)
"""Between which λ starts: uniform in the logarithm and the logit."""
DEBIAN = data_sets.DEBIAN / "fashion-mnist"
GET = "apt-get install dataset-fashion-mnist (Debian), or --data FOLDER with the four IDX files"


class Setting(NamedTuple):
    """How long, and how large."""

    T: int = 400
    """Inner steps of a run."""
    K: int = 10
    """Of a window."""
    width: int = 32
    """Units of a hidden layer."""
    batch: int = 50
    """Images of a training and of a validation batch."""


class Images(NamedTuple):
    """Pixels `(n, pixels)`, bytes, and labels `(n,)`; batches have them as floats."""

    x: Any
    y: Any


def load(folder: Path) -> dict[str, Images]:
    """Return five sevenths of the images to train on, and one to validate with, at half the side.

    Of MNIST's files that is 50,000 and 10,000, and its test images are left.
    """
    pixels, labels = mnist.load(folder)
    n, side = pixels.shape[:2]
    halves = pixels.reshape(n, side // 2, 2, side // 2, 2).mean((2, 4)).reshape(n, -1)
    x, y = np.asarray(255 * halves, np.uint8), labels
    first, second = n * 5 // 7, n * 6 // 7
    return {"train": Images(x[:first], y[:first]), "val": Images(x[first:second], y[first:second])}


def drawn(key: jax.Array, images: Images, *shape: int) -> Images:
    """Return images at random, with leading axes of this shape."""
    rows = jax.random.randint(key, shape, 0, len(images.y))
    return Images(images.x[rows].astype(jnp.float32) / 255, images.y[rows])


def start(key: jax.Array, pixels: int, width: int) -> tuple[list[jax.Array], dict[str, jax.Array]]:
    """Return the weights and biases, and λ, a number for each of them, to start from."""
    weights, rates, momenta = jax.random.split(key, 3)
    sizes = [pixels, *LAYERS * [width], CLASSES]
    params: list[jax.Array] = []
    for i, shape in enumerate(itertools.pairwise(sizes)):
        normal = jax.random.truncated_normal(jax.random.fold_in(weights, i), -2, 2, shape)
        params += [normal / np.sqrt(shape[0]), jnp.zeros(shape[1])]
    low, high = np.log(RATES), jax.scipy.special.logit(np.asarray(MOMENTA))
    lam = {
        "log_rate": jax.random.uniform(rates, (len(params),), minval=low[0], maxval=low[1]),
        "logit_momentum": jax.random.uniform(
            momenta, (len(params),), minval=high[0], maxval=high[1]
        ),
    }
    return params, lam


def inner(lam: dict[str, jax.Array]) -> optax.GradientTransformation:
    """Return SGD with a rate and a momentum of its own for each array."""
    rates, momenta = jnp.exp(lam["log_rate"]), jax.nn.sigmoid(lam["logit_momentum"])

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        trace = [m * b + g for m, b, g in zip(momenta, state, updates, strict=True)]
        return [-rate * b for rate, b in zip(rates, trace, strict=True)], trace

    return optax.GradientTransformation(lambda params: jax.tree.map(jnp.zeros_like, params), update)


def loss(params: list[jax.Array], lam: Any, images: Images) -> jax.Array:
    """Return the mean cross-entropy."""
    del lam
    x = images.x
    for i in range(0, len(params), 2):
        x = (jax.nn.relu(x) if i else x) @ params[i] + params[i + 1]
    return optax.losses.softmax_cross_entropy_with_integer_labels(x, images.y).mean()


def problem(data: dict[str, Images], setting: Setting, window: int) -> gradhpo.Problem:
    """Return the problem whose training batches come in stacks of a window, or alone for 1."""
    lengths = (window, setting.batch) if window > 1 else (setting.batch,)

    def init(key: jax.Array) -> Any:
        return start(key, data["train"].x.shape[1], setting.width)

    def batch(key: jax.Array, data: dict[str, Images]) -> tuple[Images, Images]:
        first, second = jax.random.split(key)
        val = drawn(second, data["val"], setting.batch)
        return drawn(first, data["train"], *lengths), val

    return gradhpo.Problem(
        init, loss, loss, batch, data=lambda key: jax.tree.map(jnp.asarray, data)
    )


def methods(setting: Setting) -> dict[str, tuple[Any, int]]:
    """Return by name the optimizers, and how many inner steps a step of each takes.

    Those that move λ at every inner step do it at a K-th of the rate: all go as far at most.
    """
    T, K = setting.T, setting.K
    walk: Any = {"unroll_steps": K, "batches": "stack"}
    drawn: Any = walk | {"particles": PARTICLES, "sigma": SIGMA, "objective": "mean"}
    outer, slow = optax.adam(RATE), optax.adam(RATE / K)
    return {
        f"PES, K = {K}": (gradhpo.PESOptimizer(inner, outer, **drawn), K),
        f"NRES, K = {K}": (gradhpo.NRESOptimizer(inner, outer, **drawn), K),
        f"ES, K = {K}": (gradhpo.ESOptimizer(inner, outer, **drawn), K),
        f"exact, K = {K}": (gradhpo.UnrolledOptimizer(inner, outer, **walk), K),
        "One-Step": (gradhpo.OneStepOptimizer(inner, slow), 1),
        "HyperDistill": (gradhpo.OnlineHypergradientOptimizer(inner, slow, gamma=0.99, T=T), 1),
    }


def itself(lam: Any) -> Any:
    """Return what is recorded of λ: all of it."""
    return lam


def tune(
    posed: gradhpo.Problem,
    optimizer: Any,
    episode: int,
    steps: int,
    key: jax.Array,
    points: int,
) -> Any:
    """Return λ at the start and after each of so many parts of a run, with a leading axis."""
    found = gradhpo.solve(
        posed,
        optimizer,
        steps,
        key,
        episode_length=episode,
        episode_init="fresh",
        record=itself,
        progress=False,
    )
    first = jax.tree.map(lambda x: x[None], posed.start(key)[1])
    taken = np.linspace(0, len(found.record["log_rate"]), points + 1).astype(int)
    return jax.tree.map(lambda a, b: np.concatenate([a, b])[taken], first, dict(found.record))


@functools.partial(jax.jit, static_argnums=3)
def objective(lams: Any, keys: jax.Array, data: dict[str, Images], setting: Setting) -> jax.Array:
    """Return the mean validation loss of runs of T steps at λ, `(λs, keys)`, from fresh weights."""

    def run(lam: Any, key: jax.Array) -> jax.Array:
        params: Any = start(key, data["train"].x.shape[1], setting.width)[0]
        optimizer = inner(lam)

        def step(carry: Any, key: jax.Array) -> tuple[Any, jax.Array]:
            params, state = carry
            first, second = jax.random.split(key)
            batch = drawn(first, data["train"], setting.batch)
            updates, state = optimizer.update(jax.grad(loss)(params, lam, batch), state)
            params: Any = optax.apply_updates(params, updates)
            return (params, state), loss(params, lam, drawn(second, data["val"], setting.batch))

        keys = jax.random.split(jax.random.fold_in(key, 1), setting.T)
        losses = jax.lax.scan(step, (params, optimizer.init(params)), keys)[1]
        return jnp.nan_to_num(losses, nan=np.log(CLASSES), posinf=np.log(CLASSES)).mean()

    return jax.lax.map(lambda lam: jax.vmap(lambda key: run(lam, key))(keys), lams)


def search(
    data: dict[str, Images], setting: Setting, inner_steps: int, key: jax.Array, points: int
) -> Any:
    """Return the best λ so far of a random search, as `tune` does: each is trained once."""
    count = max(points, inner_steps * (PARTICLES + 1) // setting.T)
    pixels = data["train"].x.shape[1]
    where, how = jax.random.split(key)
    lams = jax.vmap(lambda k: start(k, pixels, setting.width)[1])(jax.random.split(where, count))
    found = np.asarray(objective(lams, how[None], data, setting))[:, 0]
    ends = np.linspace(0, count, points + 1).astype(int)
    best = [int(np.argmin(found[: max(1, end)])) for end in ends]
    return jax.tree.map(lambda x: np.asarray(x)[np.asarray(best)], lams)


def row(name: str, made: np.ndarray, lams: list[Any]) -> list[str]:
    """Return a method's losses at the end, over seeds, and where λ then is, in the median."""
    last = made[:, -1]
    rates = np.exp(np.median([lam["log_rate"][-1] for lam in lams], axis=0))
    logits = np.median([lam["logit_momentum"][-1] for lam in lams], axis=0)
    spread = f"{last.min():.3f} to {last.max():.3f}"
    middle = f"{np.median(rates):.2g} ({rates.min():.2g} to {rates.max():.2g})"
    return [
        name,
        f"{np.median(last):.3f}",
        spread,
        middle,
        f"{np.median(1 / (1 + np.exp(-logits))):.2f}",
    ]


def draw(curves: dict[str, np.ndarray], steps: int, output: Path) -> None:
    """Draw the objective against the outer step, its median and range over seeds."""
    figure, ((panel,),) = report.axes(1, width=7)
    for index, (name, made) in enumerate(curves.items()):
        at = np.linspace(0, steps, made.shape[1])
        panel.plot(at, np.median(made, axis=0), color=f"C{index}", label=name)
        panel.fill_between(at, made.min(0), made.max(0), color=f"C{index}", alpha=0.15)
    panel.set(xlabel="outer step (of K inner steps)", ylabel="mean validation loss of T steps")
    panel.legend(fontsize=8)
    report.save(figure, output)


def main(
    data: Annotated[Path, typer.Option(help="A folder with the four files.")] = DEBIAN,
    seeds: Annotated[int, typer.Option(min=1, help="Of λ's start and all draws.")] = 3,
    steps: Annotated[int, typer.Option(min=10, help="Outer steps, of K inner ones.")] = 800,
    horizon: Annotated[int, typer.Option(min=10, help="T, a multiple of K = 10.")] = 400,
    width: Annotated[int, typer.Option(min=1, help="Units of a hidden layer.")] = 32,
    points: Annotated[int, typer.Option(min=1, help="Of a curve.")] = 8,
    runs: Annotated[int, typer.Option(min=1, help="Runs at each λ of a curve.")] = 3,
    output: Annotated[Path, typer.Option(help="The figure.")] = Path("out/pes_fashion.png"),
) -> None:
    """Tune rates and momenta by estimates of windows, and by a random search."""
    report.writable(output)
    setting = Setting(horizon, width=width)
    if horizon % setting.K:
        raise typer.BadParameter(f"--horizon must be a multiple of {setting.K}, got {horizon}")
    try:
        images = load(data)
    except FileNotFoundError as error:
        report.say(f"Skipped, as a file of Fashion-MNIST is missing: {error}. Get it by {GET}.")
        return
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    keys = list(jax.random.split(jax.random.key(0), seeds))
    judges = jax.random.split(jax.random.key(1), runs)
    curves: dict[str, np.ndarray] = {}
    rows: list[list[str]] = []
    inner_steps = steps * setting.K
    ways = {
        name: functools.partial(
            tune,
            problem(images, setting, window),
            optimizer,
            setting.T // window,
            inner_steps // window,
        )
        for name, (optimizer, window) in methods(setting).items()
    } | {"random search": functools.partial(search, images, setting, inner_steps)}
    for name, way in tqdm(ways.items(), desc="methods"):
        lams = [way(key, points) for key in keys]
        judged = [np.asarray(objective(lam, judges, images, setting)).mean(1) for lam in lams]
        curves[name] = np.stack(judged)
        rows.append(row(name, curves[name], lams))
    columns = ["method", "median", "range of seeds", "learning rates", "momentum"]
    report.table(
        f"Mean validation loss of T = {horizon} steps, after {steps} outer steps", columns, rows
    )
    draw(curves, steps, output)


if __name__ == "__main__":
    typer.run(main)
