"""Few-shot sinusoid regression with ANIL: Table 4 and Fig. 8 of the HyperDistill paper (ICLR 2022).

Tasks `y = A sin(x - φ)`, A ~ U(0.1, 5), φ ~ U(0, π), x in [-5, 5], ten shots. A network of three
hidden layers of 100 ReLU units: its last layer is `w`, adapted to a task by T = 30 steps of SGD
(0.01, momentum 0.9); the layers before it are `λ`, shared by all tasks and moved by Adam (1e-3). In
each of M = 30 inner optimizations there are ten tasks, after which the initialization of `w` moves
to the mean of their `w_T` (Reptile, rate 1). The score is the mean squared error on 1000 new tasks.

γ is chosen by the error on 200 validation tasks, which are neither trained nor tested on.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
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
from gradhpo.state import prepare

T, TASKS, SHOTS, GAMMAS = 30, 10, 10, (0.9, 0.99, 0.999, 0.9999)
INNER, OUTER = optax.sgd(0.01, momentum=0.9), optax.adam(1e-3)
PUBLISHED = {
    "FO": "0.567 ± 0.193",
    "One-Step": "0.670 ± 0.283",
    "DrMAD": "1.086 ± 0.176",
    "Neumann-IFT(3,5)": "0.502 ± 0.146",
    "HyperDistill": "0.327 ± 0.052",
}


@dataclasses.dataclass(frozen=True)
class Reading:
    """What the paper leaves open."""

    init: str = "torch"
    """ "torch": all uniform in ±1/√fan_in. "lecun", "he": normal weights, zero biases."""
    resampled: bool = False
    """Whether a task's ten shots are drawn anew at every inner step."""
    validation: int = 10
    """A task's validation points."""

    def __str__(self) -> str:
        shots = "resampled" if self.resampled else "fixed"
        return f"{self.init}, shots {shots}, {self.validation} validation points"


READINGS = [
    Reading(),
    Reading(validation=100),
    Reading(resampled=True),
    Reading(init="lecun"),
    Reading(init="he"),
]


class Tasks(NamedTuple):
    """Amplitudes and phases, each of shape `(tasks,)`."""

    amplitude: jax.Array
    phase: jax.Array


class Points(NamedTuple):
    """Inputs and targets, each of shape `(tasks, points)`."""

    x: jax.Array
    y: jax.Array


def draw_tasks(key: jax.Array, count: int) -> Tasks:
    """Draw tasks."""
    first, second = jax.random.split(key)
    amplitude = jax.random.uniform(first, (count,), minval=0.1, maxval=5.0)
    return Tasks(amplitude, jax.random.uniform(second, (count,), maxval=jnp.pi))


def draw_points(key: jax.Array, tasks: Tasks, count: int) -> Points:
    """Draw points of each task, uniform in [-5, 5]."""
    x = jax.random.uniform(key, (len(tasks.phase), count), minval=-5.0, maxval=5.0)
    return Points(x, tasks.amplitude[:, None] * jnp.sin(x - tasks.phase[:, None]))


def init_layers(key: jax.Array, scheme: str) -> list[Any]:
    """Return the four layers of the network, each a kernel and a bias."""
    layers: list[Any] = []
    for sizes in itertools.pairwise((1, 100, 100, 100, 1)):
        key, first, second = jax.random.split(key, 3)
        if scheme == "torch":
            bound = sizes[0] ** -0.5
            kernel = jax.random.uniform(first, sizes, minval=-bound, maxval=bound)
            bias = jax.random.uniform(second, sizes[1:], minval=-bound, maxval=bound)
        else:
            gain = {"lecun": 1.0, "he": 2.0}[scheme]
            kernel = jax.random.normal(first, sizes) * (gain / sizes[0]) ** 0.5
            bias = jnp.zeros(sizes[1:])
        layers.append((kernel, bias))
    return layers


def features(lam: Any, x: jax.Array) -> jax.Array:
    """Map inputs of any shape to the last hidden layer, with a last axis of 100."""
    h = x[..., None]
    for kernel, bias in lam:
        h = jax.nn.relu(h @ kernel + bias)
    return h


def head_errors(w: Any, h: jax.Array, y: jax.Array) -> jax.Array:
    """Return each task's mean squared error, `(tasks,)`; `w` has a leading axis of tasks."""
    kernel, bias = w
    return jnp.mean(((h @ kernel + bias[:, None])[..., 0] - y) ** 2, axis=1)


def errors(w: Any, lam: Any, points: Points) -> jax.Array:
    """Return each task's mean squared error, `(tasks,)`."""
    return head_errors(w, features(lam, points.x), points.y)


def train_loss(w: Any, lam: Any, points: Points) -> jax.Array:
    """Return the sum over tasks, whose gradient in a task's weights is that of the task alone."""
    return jnp.sum(errors(w, lam, points))


def val_loss(w: Any, lam: Any, points: Points) -> jax.Array:
    """Return the mean over tasks, whose gradient in λ is the mean hypergradient."""
    return jnp.mean(errors(w, lam, points))


def online(period: int) -> Any:
    """Return Adam on λ, which moves it at every `period`-th inner step only."""

    def due(step: Any, **kwargs: Any) -> Any:
        del kwargs
        return step % period == period - 1

    return OUTER if period == 1 else optax.conditionally_mask(OUTER, due)


def methods() -> dict[str, Any]:
    """Return the methods; of the two numbers of Neumann-IFT(3,5) the paper's table names no more.

    Read as: terms of the series, and inner steps between two outer steps, in either order.
    """

    def implicit(terms: int, steps: int) -> Any:
        neumann: Any = {"solver": "neumann", "neumann_rate": 0.01, "K": terms}
        return gradhpo.ImplicitOptimizer(INNER, online(steps), **neumann)

    return {
        "FO": gradhpo.FOOptimizer(INNER, OUTER),
        "One-Step": gradhpo.OneStepOptimizer(INNER, OUTER),
        "DrMAD": gradhpo.DrMADOptimizer(INNER, OUTER, unroll_steps=T, batches="stack"),
        "Neumann-IFT(3,5)": implicit(terms=3, steps=5),
        "Neumann-IFT(5,3)": implicit(terms=5, steps=3),
        **{f"HyperDistill {gamma}": hyperdistill(gamma) for gamma in GAMMAS},
        "Unrolled": gradhpo.UnrolledOptimizer(INNER, OUTER, unroll_steps=T, batches="stack"),
    }


def hyperdistill(gamma: float) -> Any:
    """Return HyperDistill; θ is estimated before the first inner optimization, as M is below 50."""
    return gradhpo.OnlineHypergradientOptimizer(INNER, OUTER, gamma=gamma, T=T)


class Trace(NamedTuple):
    """The errors of a run, `()` unless said otherwise."""

    test: jax.Array
    """Mean over the test tasks after T steps."""
    validation: jax.Array
    """Mean over the validation tasks after T steps: γ is chosen by it."""
    curve: jax.Array
    """Validation loss of the training tasks after each inner optimization, `(M,)`."""


def episode_data(key: jax.Array, reading: Reading) -> tuple[Points, Points]:
    """Draw tasks: their shots at each inner step, `(T, tasks, shots)`, and validation points."""
    which, shots, val = jax.random.split(key, 3)
    tasks = draw_tasks(which, TASKS)
    if reading.resampled:
        keys = jax.random.split(shots, T)
        trains = jax.vmap(lambda key: draw_points(key, tasks, SHOTS))(keys)
    else:
        points = draw_points(shots, tasks, SHOTS)
        trains = jax.tree.map(lambda x: jnp.broadcast_to(x, (T, *x.shape)), points)
    return trains, draw_points(val, tasks, reading.validation)


def meta_train(
    optimizer: Any, reading: Reading, M: int, key: jax.Array
) -> tuple[Any, Any, jax.Array]:
    """Return the initialization of `w`, λ, and the curve of M inner optimizations."""
    start, data, calibration = jax.random.split(key, 3)
    *lam, w = init_layers(start, reading.init)
    state = optimizer.init(jax.tree.map(lambda x: jnp.stack([x] * TASKS), w), lam)
    losses = (train_loss, val_loss)
    if optimizer.calibration_period:
        state = optimizer.calibrate(
            state, gradhpo.Task(*episode_data(calibration, reading), *losses)
        )
    unrolls = isinstance(optimizer, gradhpo.DrMADOptimizer | gradhpo.UnrolledOptimizer)

    def episode(carry: tuple[Any, Any], key: jax.Array) -> tuple[Any, jax.Array]:
        state, phi = carry
        trains, val = episode_data(key, reading)
        state = optimizer.reset(state, phi)
        if unrolls:
            state = optimizer.advance(state, gradhpo.Task(trains, val, *losses))
        else:

            def inner_step(state: Any, train: Points) -> tuple[Any, None]:
                return optimizer.advance(state, gradhpo.Task(train, val, *losses)), None

            state, _ = jax.lax.scan(inner_step, state, trains)
        phi = jax.tree.map(  # Reptile with rate 1, over the tasks in parallel
            lambda x: jnp.broadcast_to(x.mean(0), x.shape), state.params
        )
        return (state, phi), state.metadata["val_loss"]

    keys = jax.random.split(data, M)
    (state, phi), curve = jax.lax.scan(episode, (prepare(state), state.params), keys)
    return jax.tree.map(lambda x: x[0], phi), state.hyperparams, curve


def adapted_error(phi: Any, lam: Any, key: jax.Array, count: int) -> jax.Array:
    """Return the mean error on new tasks, of 100 points each, after T steps on ten fixed shots."""
    which, shots, query = jax.random.split(key, 3)
    tasks = draw_tasks(which, count)
    points = draw_points(shots, tasks, SHOTS)
    h = features(lam, points.x)  # once: λ does not move here

    def task_loss(w: Any) -> jax.Array:
        return jnp.sum(head_errors(w, h, points.y))

    def step(carry: Any, _: None) -> Any:
        w, opt_state = carry
        updates, opt_state = INNER.update(jax.grad(task_loss)(w), opt_state)
        return (optax.apply_updates(w, updates), opt_state), None

    w = jax.tree.map(lambda x: jnp.stack([x] * count), phi)
    (w, _), _ = jax.lax.scan(step, (w, INNER.init(w)), length=T)
    return val_loss(w, lam, draw_points(query, tasks, 100))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def run(optimizer: Any, reading: Reading, M: int, keys: jax.Array) -> Trace:
    """Run all seeds, one after another in one program: faster than `vmap` on a CPU."""

    def one(key: jax.Array) -> Trace:
        train, validation, test = (jax.random.fold_in(key, i) for i in range(3))
        phi, lam, curve = meta_train(optimizer, reading, M, train)
        ends = adapted_error(phi, lam, test, 1000), adapted_error(phi, lam, validation, 200)
        return Trace(*ends, curve)

    return jax.lax.map(one, keys)


def choose_gamma(traces: dict[str, Trace]) -> str:
    """Return the HyperDistill with the least mean error on the validation tasks."""
    named = [name for name in traces if name.startswith("HyperDistill")]
    return min(named, key=lambda name: np.nan_to_num(traces[name].validation, nan=np.inf).mean())


def rows(traces: dict[str, Trace]) -> list[list[str]]:
    """Return a row for each method; differences are between runs of the same seed."""
    chosen = choose_gamma(traces)
    made: list[list[str]] = []
    for name, trace in traces.items():
        difference = "" if name == chosen else report.interval(trace.test - traces[chosen].test)
        published = PUBLISHED.get("HyperDistill" if name == chosen else name, "")
        shown = f"{name} (chosen)" if name == chosen else name
        ours = report.interval(trace.test), report.interval(trace.validation)
        made.append([shown, published, *ours, difference])
    return made


def verdict(traces: dict[str, Trace]) -> str:
    """Say whether HyperDistill is below FO and One-Step, and whether the intervals say so too."""
    best, parts = traces[choose_gamma(traces)].test, list[str]()
    for name in ("FO", "One-Step"):
        gap = traces[name].test - best
        clear = gap.mean() - report.half_width(gap) > 0
        parts.append(f"{name}: {'yes' if gap.mean() > 0 else 'no'}{', clear of 0' * bool(clear)}")
    return "; ".join(parts)


def draw(results: dict[Reading, dict[str, Trace]], output: Path) -> None:
    """Draw the curves of the first reading, and the test errors of all."""
    figure, ((left, right),) = report.axes(2, width=6)
    first = next(iter(results.values()))
    chosen = choose_gamma(first)
    shown = [name for name in first if name == chosen or not name.startswith("HyperDistill")]
    for name in shown:
        curve = first[name].curve.mean(0)
        left.plot(np.arange(1, len(curve) + 1), curve, label=name)
    left.set(xlabel="inner optimization", ylabel="validation loss, mean over seeds", yscale="log")
    left.legend(fontsize=8)
    for index, (reading, traces) in enumerate(results.items()):
        names = [name if name in traces else choose_gamma(traces) for name in shown]
        names = [choose_gamma(traces) if n.startswith("HyperDistill") else n for n in names]
        ends = np.asarray([traces[name].test.mean() for name in names])
        bars = [report.half_width(traces[name].test) for name in names]
        places = np.arange(len(names)) + 0.12 * (index - len(results) / 2)
        right.errorbar(places, ends, bars, fmt="o", markersize=4, label=str(reading))
    right.set_xticks(range(len(shown)), [name.split(" ")[0] for name in shown], rotation=30)
    right.set(ylabel="test error, mean and 95% interval", yscale="log")
    right.legend(fontsize=7)
    report.save(figure, output)


def main(
    seeds: Annotated[int, typer.Option(min=2, help="Runs of each method.")] = 5,
    seed: Annotated[int, typer.Option(help="The key that they are split from.")] = 0,
    episodes: Annotated[int, typer.Option(min=1, help="M, inner optimizations.")] = 30,
    readings: Annotated[
        int, typer.Option(min=1, max=len(READINGS), help="How many readings of the paper to try.")
    ] = 2,
    output: Annotated[Path, typer.Option(help="The figure.")] = Path("out/sinusoid.png"),
) -> None:
    """Reproduce Table 4 of the HyperDistill paper: test error of ANIL on sinusoids."""
    report.writable(output)
    keys = jax.random.split(jax.random.key(seed), seeds)
    results: dict[Reading, dict[str, Trace]] = {reading: {} for reading in READINGS[:readings]}
    with tqdm(total=len(results) * len(methods()), unit="run") as bar:
        for reading, traces in results.items():
            for name, optimizer in methods().items():
                traces[name] = jax.device_get(run(optimizer, reading, episodes, keys))
                bar.update()
            columns = ["method", "published", "test error", "validation tasks", "less HyperDistill"]
            report.table(str(reading), columns, rows(traces))
    for reading, traces in results.items():
        report.say(f"{reading}: HyperDistill below {verdict(traces)}.")
    draw(results, output)


if __name__ == "__main__":
    typer.run(main)
