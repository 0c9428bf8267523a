"""Curves and times on the board, in the board's own environment; `board.py` starts it.

Curves are taken where a batch is folded, see `Folded`; all times with the board's own losses, in
seconds of CPU of this process.
"""

from __future__ import annotations

import functools
import json
import threading
import time
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import typer
from benchopt.benchmark import Benchmark

PROBLEMS: dict[str, tuple[str, dict[str, Any]]] = {
    "small": ("simulated", {}),
    "small-10": ("simulated", {"dim_outer": 10}),
    "published": (
        "simulated",
        {"n_samples_inner": 32_768, "n_samples_outer": 1024, "dim_inner": 100, "dim_outer": 10},
    ),
    "cleaning-0.5": ("mnist", {"ratio": 0.5}),
    "cleaning-0.7": ("mnist", {"ratio": 0.7}),
    "cleaning-0.9": ("mnist", {"ratio": 0.9}),
}
"""A dataset of the board by name, and the parameters that differ from its own."""
THEIRS = {"SOBA": 5, "SABA": 5, "F2SA": 33, "StocBiO": 23}
"""Oracles in a step of the board's own solvers, counted as for ours."""
BATCH = 64
TURN = 320
"""Calls of oracles in a turn of a pair."""


class Entry(NamedTuple):
    """A solver of the board with its parameters."""

    solver: str
    parameters: dict[str, Any]
    calls: float
    """Of oracles, each of one batch, in a step."""


class Folded:
    """A loss of the board's quadratics, where each batch is one quadratic and not a mean of 64.

    The batches are the same ones throughout, so their Hessians and gradients at 0 are taken once.
    Equal to the board's own but for rounding, at a sixtieth of the arithmetic.
    """

    def __init__(self, loss: Any, samples: int, w: jax.Array, lam: jax.Array) -> None:
        if samples % BATCH:
            raise ValueError(f"{samples} samples are no whole number of batches of {BATCH}")
        nothing = jnp.zeros(w.size + lam.size, w.dtype)

        def of(start: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            def at(z: jax.Array) -> jax.Array:
                return loss(z[: w.size], z[w.size :], start=start, batch_size=BATCH)

            return at(nothing), jax.grad(at)(nothing), jax.hessian(at)(nothing)

        starts = jnp.arange(0, samples, BATCH)
        self._batches = jax.block_until_ready(jax.jit(lambda: jax.lax.map(of, starts))())
        self._all = jax.tree.map(lambda x: jnp.mean(x, 0, keepdims=True), self._batches)

    def __call__(
        self, w: jax.Array, lam: jax.Array, start: Any = 0, batch_size: int = BATCH
    ) -> Any:
        """Return the loss of a batch, or of all data."""
        kept = self._batches if batch_size == BATCH else self._all
        value, gradient, hessian = jax.tree.map(lambda x: x[start // batch_size], kept)
        z = jnp.concatenate([w, lam])
        return value + gradient @ z + z @ (hessian @ z) / 2


class Board:
    """The board's folder, and one of its problems."""

    def __init__(self, folder: Path, problem: str) -> None:
        benchmark = Benchmark(folder)
        dataset, parameters = PROBLEMS[problem]
        self.solvers = {solver.name: solver for solver in benchmark.get_solvers()}
        of_name = {dataset.name: dataset for dataset in benchmark.get_datasets()}
        self.objective = benchmark.get_benchmark_objective().get_instance()
        self.objective.set_dataset(of_name[dataset].get_instance(**parameters))
        self._folds = dataset == "simulated"

    @functools.cached_property
    def folded(self) -> dict[str, Folded]:
        """The losses with folded batches; none where a batch is no quadratic."""
        of = self.objective.get_objective()
        start = (of["inner_var0"], of["outer_var0"])
        levels = ("inner", "outer") if self._folds else ()
        return {f"f_{x}": Folded(of[f"f_{x}"], of[f"n_{x}_samples"], *start) for x in levels}

    def entry(self, name: str, step_size: float, outer_ratio: float) -> Entry:
        """Return a solver by its name here: the board's own, or a method of gradhpo's."""
        rates = {"step_size": step_size, "outer_ratio": outer_ratio}
        if name in THEIRS:
            more = {"delta_lmbda": 0.01} if name == "F2SA" else {}
            return Entry(name, rates | more, THEIRS[name])
        from benchmark_utils import gradhpo_methods

        calls = gradhpo_methods.CALLS[name]
        if name in gradhpo_methods.ALL_DATA:
            calls = self.batches_of_all(calls)
        return Entry("gradhpo", rates | {"method": name}, calls)

    def batches_of_all(self, oracles: tuple[int, int]) -> float:
        """Return how many oracles of a batch so many of all training and validation data are."""
        objective = self.objective.get_objective()
        return (
            oracles[0] * objective["n_inner_samples"] + oracles[1] * objective["n_outer_samples"]
        ) / BATCH

    def made(self, entry: Entry, eval_freq: int, folded: bool = False) -> Any:
        """Return the solver, compiled; with folded batches where the problem has them."""
        solver = self.solvers[entry.solver].get_instance(**entry.parameters, eval_freq=eval_freq)
        losses = self.folded if folded else {}
        solver.set_objective(**{**self.objective.get_objective(), **losses})
        return solver

    def seeded(self, solver: Any, seed: int) -> Any:
        """Return the solver with the batches of another seed."""
        inner, outer = jax.random.split(jax.random.PRNGKey(seed), 2)
        solver.state_inner_sampler = {**solver.state_inner_sampler, "key": inner}
        solver.state_outer_sampler = {**solver.state_outer_sampler, "key": outer}
        return solver

    def seconds(self, entry: Entry, epochs: int) -> float:
        """Return the seconds of a step on the board's own losses, of the median epoch."""
        steps = steps_of_turn(entry)
        return float(np.median(in_turns([self.made(entry, steps)], epochs))) / steps

    def metrics(self, solver: Any) -> dict[str, float]:
        """Return the board's own metrics of where a solver is."""
        found = self.objective.evaluate_result(**solver.get_result())
        return {name: float(value) for name, value in found.items()}


def curve(board: Board, solver: Any, points: int) -> list[dict[str, float]]:
    """Return the metrics at the start and after each epoch."""
    rows: list[dict[str, float]] = []

    def callback() -> bool:
        try:
            rows.append(board.metrics(solver))
        except ValueError:  # the board refuses NaN
            rows.append({"value": float("nan")})
        return len(rows) <= points and np.isfinite(rows[-1]["value"])

    solver.run(callback)
    return rows


class Turns:
    """A solver in a thread of its own, which takes an epoch when told."""

    def __init__(self, solver: Any) -> None:
        self._solver, self._began, self._taken = solver, threading.Semaphore(0), threading.Event()
        self._epochs, self._over = 0, False
        threading.Thread(target=solver.run, args=(self._callback,), daemon=True).start()
        self._wait()

    def take(self) -> float:
        """Return the seconds of the next epoch."""
        start = time.process_time()
        self._began.release()
        self._wait()
        return time.process_time() - start

    def end(self) -> None:
        """Let the solver return."""
        self._over = True
        self._began.release()

    def _wait(self) -> None:
        self._taken.wait()
        self._taken.clear()

    def _callback(self) -> bool:
        if self._epochs:
            jax.block_until_ready((self._solver.inner_var, self._solver.outer_var))
        self._epochs += 1
        self._taken.set()
        self._began.acquire()
        return not self._over


def in_turns(solvers: list[Any], rounds: int) -> np.ndarray:
    """Return the seconds of an epoch for each round and solver; each begins a round in its turn."""
    turns = [Turns(solver) for solver in solvers]
    for one in turns:
        one.take()
    times = np.empty((rounds, len(turns)))
    for k in range(rounds):
        for i in np.roll(np.arange(len(turns)), k):
            times[k, i] = turns[i].take()
    for one in turns:
        one.end()
    return times


def steps_of_turn(entry: Entry) -> int:
    """Return how many steps of a solver an epoch has that is timed."""
    return max(1, round(TURN / entry.calls))


def paired(board: Board, pair: tuple[Entry, Entry], steps: int, rounds: int) -> dict[str, Any]:
    """Return quartiles of the seconds of an epoch of ours and theirs, and of the ratios.

    Each is compiled four times, in turns too: where a program's data lie in memory is worth some
    hundredths, and stays as it is while the program lives.
    """
    ours, theirs = [0, 3, 5, 6], [1, 2, 4, 7]
    made = [board.made(pair[i in theirs], steps) for i in range(8)]
    taken = in_turns(made, rounds)
    times = np.stack([taken[:, ours].ravel(), taken[:, theirs].ravel()], axis=1)
    return {
        name: [float(x) for x in np.percentile(values, [25, 50, 75])]
        for name, values in (
            ("ours", times[:, 0]),
            ("theirs", times[:, 1]),
            ("ratio", times[:, 0] / times[:, 1]),
        )
    }


def main(
    folder: Annotated[Path, typer.Argument(help="The board's.")],
    results: Annotated[Path, typer.Argument(help="A JSON file that is added to.")],
    problem: Annotated[str, typer.Option(help=f"One of {', '.join(PROBLEMS)}.")] = "small",
    solvers: Annotated[str, typer.Option(help="Of the board or of gradhpo, with commas.")] = "",
    pairs: Annotated[str, typer.Option(help="ours:theirs, with commas, to be timed.")] = "",
    points: Annotated[int, typer.Option(help="Evaluations of a curve.")] = 100,
    calls: Annotated[int, typer.Option(help="Of oracles, after which it ends; 0: none.")] = 0,
    every: Annotated[int, typer.Option(help="Steps from one to the next, as on the board.")] = 128,
    seeds: Annotated[int, typer.Option(help="1, 2, and so on.")] = 5,
    timed: Annotated[int, typer.Option(help="Epochs that a solver is timed for; or 0.")] = 5,
    rounds: Annotated[int, typer.Option(help="Of paired times.")] = 5,
    step_size: Annotated[float, typer.Option()] = 0.1,
    outer_ratio: Annotated[float, typer.Option()] = 1.0,
) -> None:
    """Measure solvers on a problem of the board."""
    board = Board(folder, problem)
    found: dict[str, Any] = json.loads(results.read_text()) if results.exists() else {}

    def keep(kind: str, name: str, value: Any) -> None:
        found.setdefault(problem, {}).setdefault(kind, {})[name] = value
        results.write_text(json.dumps(found, indent=1))

    for name in filter(None, solvers.split(",")):
        entry = board.entry(name, step_size, outer_ratio)
        solver = board.made(entry, every, folded=True)
        most = min(points, int(calls / entry.calls / every)) if calls else points
        curves = [curve(board, board.seeded(solver, 1 + k), most) for k in range(seeds)]
        about = {
            "calls": entry.calls,
            "every": every,
            "seconds": board.seconds(entry, timed) if timed else None,
            "step_size": step_size,
            "outer_ratio": outer_ratio,
        }
        keep("curves", name, about | {"seeds": curves})
        last = np.median([rows[-1]["value"] for rows in curves])
        print(f"{name}: {last:.3g}, {about['seconds']} s a step", flush=True)
    for pair in filter(None, pairs.split(",")):
        ours, theirs = (board.entry(name, step_size, outer_ratio) for name in pair.split(":"))
        each = steps_of_turn(ours)
        keep("pairs", pair, {"steps": each} | paired(board, (ours, theirs), each, rounds))
        print(f"{pair}: {found[problem]['pairs'][pair]['ratio']}", flush=True)


if __name__ == "__main__":
    typer.run(main)
