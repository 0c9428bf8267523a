"""The toy problem of the Generalized Greedy paper (ICLR 2025 submission, §5.2, Fig. 2).

`L_val = ‖w‖² + 10‖sin w‖²`, `L_train = ½(w-λ)ᵀG(w-λ)` with `G = diag(1, ½)`, w₀ = (2, 2), λ₀ =
(1, 1); gradient descent with rate 0.1 on both levels, T inner steps in each of 1000 outer steps.
The paper leaves open whether the weights start anew from w₀ at every outer step or go on: both are
run. So that the ordering is not that of one point, random starts are run beside the paper's.
"""

from __future__ import annotations

import functools
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
from gradhpo.horizon import estimate_at, fresh_state

G = np.asarray([1.0, 0.5])
RATE = 0.1
PUBLISHED = [
    "Greedy 0.9 has the lowest L_val of the approximations",
    "cosine of Greedy 0.9 above T1-T2, T steps",
    "all steps",
]
READINGS = {"anew": "weights start anew from w₀", "on": "weights go on"}


def train_loss(w: jax.Array, lam: jax.Array, batch: Any) -> jax.Array:
    """Return `½(w-λ)ᵀG(w-λ)`."""
    del batch
    return 0.5 * jnp.sum(G * (w - lam) ** 2)


def val_loss(w: jax.Array, lam: jax.Array, batch: Any) -> jax.Array:
    """Return `‖w‖² + 10‖sin w‖²`."""
    del lam, batch
    return jnp.sum(w**2 + 10 * jnp.sin(w) ** 2)


def methods(T: int) -> dict[str, Any]:
    """Return the methods, each with a horizon of T inner steps."""
    inner, outer = optax.sgd(RATE), optax.sgd(RATE)

    def greedy(gamma: float) -> Any:
        return gradhpo.GreedyOptimizer(inner, outer, unroll_steps=T, gamma=gamma)

    def implicit(K: int) -> Any:
        neumann: Any = {"solver": "neumann", "neumann_rate": RATE}
        return gradhpo.ImplicitOptimizer(inner, outer, unroll_steps=T, K=K, **neumann)

    return {
        "full": gradhpo.UnrolledOptimizer(inner, outer, unroll_steps=T),
        "IFT(2)": implicit(2),
        "IFT(5)": implicit(5),
        "T1-T2": gradhpo.T1T2Optimizer(inner, outer),
        **{f"Greedy {gamma}": greedy(gamma) for gamma in (0.3, 0.5, 0.9)},
    }


class Trace(NamedTuple):
    """What a method did; the leading axes are the start and the outer step."""

    val_loss: jax.Array
    """At w_T of each outer step."""
    cosine: jax.Array
    """Of the estimate to the exact hypergradient through the same T steps."""
    whole_cosine: jax.Array
    """Of the estimate to the exact hypergradient through all inner steps since the last start."""


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def descend(
    optimizer: Any, T: int, outer_steps: int, reading: str, w_0: jax.Array, lam_0: jax.Array
) -> Trace:
    """Return the trace of each start, `w_0` and `lam_0` of shape `(starts, 2)`."""
    exact, task = methods(T)["full"], gradhpo.Task(jnp.zeros(T), 0.0, train_loss, val_loss)

    def outer_step(state: Any, n: jax.Array, w_0: jax.Array) -> tuple[Any, Trace]:
        truth = estimate_at(exact, state, task).hypergradient
        done = estimate_at(optimizer, fresh_state(optimizer, state), task)
        # A = I - RATE·G is the same at all steps, so n T-step products are a power of it.
        steps = T * (n + 1) if reading == "on" else T
        whole = (1 - (1 - RATE * G) ** steps) * jax.grad(val_loss)(done.params, None, None)
        w = w_0 if reading == "anew" else done.params
        moved = state.update(params=w, hyperparams=state.hyperparams - RATE * done.hypergradient)
        cosines = cosine(done.hypergradient, truth), cosine(done.hypergradient, whole)
        return moved, Trace(done.val_loss, *cosines)

    def from_start(w_0: jax.Array, lam_0: jax.Array) -> Trace:
        start, count = exact.init(w_0, lam_0), jnp.arange(outer_steps)
        return jax.lax.scan(lambda state, n: outer_step(state, n, w_0), start, count)[1]

    return jax.vmap(from_start)(w_0, lam_0)


def cosine(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return the cosine of two vectors; NaN where both have come to rest, with no direction."""
    lengths = jnp.linalg.norm(a) * jnp.linalg.norm(b)
    return jnp.where(lengths > 1e-10, a @ b / lengths, jnp.nan)


def starts(key: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Return the paper's start, and after it random ones, uniform in ±3: each `(count, 2)`."""
    random = jax.random.uniform(key, (2, count, 2), minval=-3, maxval=3)
    published = jnp.asarray([[[2.0, 2.0]], [[1.0, 1.0]]])
    w_0, lam_0 = jnp.concatenate([published, random], axis=1)[:, :count]
    return w_0, lam_0


def row(name: str, trace: Trace) -> list[str]:
    """Return a method's numbers: of the paper's start, and over all starts."""
    final, first = trace.val_loss[:, -1], trace.val_loss[0]
    reached = str(int(np.argmax(first < 0.01)) + 1) if (first < 0.01).any() else "never"
    means = [np.nanmean(c, axis=1) for c in (trace.cosine, trace.whole_cosine)]
    own = [f"{final[0]:.4f}", reached, *(f"{mean[0]:.3f}" for mean in means)]
    return [name, *own, report.interval(final, 2), *(report.interval(mean) for mean in means)]


def verdicts(traces: dict[str, Trace]) -> list[list[str]]:
    """Return for the paper's start and for all starts whether the two claims hold.

    A loss counts as lowest within 1e-3, so that two methods in one minimum tie.
    """
    made: list[list[str]] = []
    for where, part in (("paper's start", slice(1)), ("mean of all starts", slice(None))):
        final = {name: trace.val_loss[part, -1].mean() for name, trace in traces.items()}
        others = [name for name in final if name not in ("full", "Greedy 0.9")]
        best = min(others, key=lambda name: final[name])
        gap = final["Greedy 0.9"] - final[best]
        low = "yes" if gap < -1e-3 else f"tied with {best}" if gap < 1e-3 else f"no, {best} is"
        above: list[str] = []
        for kind in ("cosine", "whole_cosine"):
            mean = {name: np.nanmean(getattr(t, kind)[part]) for name, t in traces.items()}
            higher = mean["Greedy 0.9"] > mean["T1-T2"]
            above.append("yes" if higher else "no")
        made.append([where, low, *above])
    return made


def draw(results: dict[tuple[int, str], dict[str, Trace]], output: Path) -> None:
    """Draw the validation loss and the cosine of the paper's start, a column for each case."""
    figure, grid = report.axes(len(results), rows=2)
    for column, ((T, reading), traces) in enumerate(results.items()):
        for index, (name, trace) in enumerate(traces.items()):
            style = {"color": f"C{index}" if index else "black", "label": name}
            steps = np.arange(1, trace.val_loss.shape[1] + 1)
            grid[0][column].plot(steps, trace.val_loss[0], **style)
            grid[1][column].plot(steps, trace.cosine[0], **style)
        title = f"T = {T}, {READINGS[reading]}"
        grid[0][column].set(yscale="log", ylim=(1e-8, 60), ylabel="validation loss", title=title)
        grid[1][column].set(ylabel="cosine to the exact hypergradient", xlabel="outer step")
        for axes in grid:
            axes[column].set_xscale("log")
    grid[0][0].legend(fontsize=8)
    report.save(figure, output)


def main(
    seeds: Annotated[int, typer.Option(min=1, help="Starts: the paper's, and random ones.")] = 20,
    seed: Annotated[int, typer.Option(help="The key of the random starts.")] = 0,
    outer_steps: Annotated[int, typer.Option(min=2, help="Outer steps.")] = 1000,
    output: Annotated[Path, typer.Option(help="The figure.")] = Path("out/toy.png"),
) -> None:
    """Reproduce Fig. 2 of the Greedy paper: validation loss and cosine on the toy problem."""
    report.writable(output)
    w_0, lam_0 = starts(jax.random.key(seed), seeds)
    cases = [(T, reading) for T in (5, 10) for reading in READINGS]
    results: dict[tuple[int, str], dict[str, Trace]] = {case: {} for case in cases}
    work = [(case, name) for case in cases for name in methods(case[0])]
    for case, name in tqdm(work, unit="run"):
        optimizer = methods(case[0])[name]
        trace = descend(optimizer, case[0], outer_steps, case[1], w_0, lam_0)
        results[case][name] = jax.device_get(trace)
    cosines = ["cosine, T steps", "cosine, all steps"]
    own = ["method", "paper's start: L_val", "steps to 0.01", *cosines]
    for (horizon, reading), traces in results.items():
        columns = [*own, f"{seeds} starts: L_val", *cosines]
        rows = [row(name, trace) for name, trace in traces.items()]
        report.table(f"T = {horizon}, {READINGS[reading]}", columns, rows)
    rows = [
        [f"T = {horizon}, {READINGS[reading]}", *found]
        for (horizon, reading), traces in results.items()
        for found in verdicts(traces)
    ]
    report.table("Published, and whether it appears", ["case", "start", *PUBLISHED], rows)
    draw(results, output)


if __name__ == "__main__":
    typer.run(main)
