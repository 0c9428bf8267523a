"""Curves and paired times on the board, in the board's own environment; `board.py` starts it."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
import typer
from benchopt.benchmark import Benchmark

PROBLEMS: dict[str, tuple[str, dict[str, Any]]] = {
    "small": ("simulated", {}),
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
TURN = 640
"""Calls of oracles in a turn of a pair."""


class Entry(NamedTuple):
    """A solver of the board with its parameters."""

    solver: str
    parameters: dict[str, Any]
    calls: float
    """Of oracles, each of one batch, in a step."""


class Board:
    """The board's folder, and one of its problems."""

    def __init__(self, folder: Path, problem: str) -> None:
        benchmark = Benchmark(folder)
        dataset, parameters = PROBLEMS[problem]
        self.solvers = {solver.name: solver for solver in benchmark.get_solvers()}
        of_name = {dataset.name: dataset for dataset in benchmark.get_datasets()}
        self.objective = benchmark.get_benchmark_objective().get_instance()
        self.objective.set_dataset(of_name[dataset].get_instance(**parameters))

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

    def made(self, entry: Entry, eval_freq: int) -> Any:
        """Return the solver, compiled."""
        solver = self.solvers[entry.solver].get_instance(**entry.parameters, eval_freq=eval_freq)
        solver.set_objective(**self.objective.get_objective())
        return solver

    def seeded(self, solver: Any, seed: int) -> Any:
        """Return the solver with the batches of another seed."""
        inner, outer = jax.random.split(jax.random.PRNGKey(seed), 2)
        solver.state_inner_sampler = {**solver.state_inner_sampler, "key": inner}
        solver.state_outer_sampler = {**solver.state_outer_sampler, "key": outer}
        return solver

    def metrics(self, solver: Any) -> dict[str, float]:
        """Return the board's own metrics of where a solver is."""
        found = self.objective.evaluate_result(**solver.get_result())
        return {name: float(value) for name, value in found.items()}


def curve(board: Board, solver: Any, points: int) -> dict[str, Any]:
    """Return the metrics at the start and after each epoch, and the seconds of the epochs."""
    rows, seconds = [], [0.0]
    solver.inner_var, solver.outer_var = solver.inner_var0, solver.outer_var0
    began = time.perf_counter()

    def callback() -> bool:
        nonlocal began
        jax.block_until_ready((solver.inner_var, solver.outer_var))
        if rows:
            seconds.append(seconds[-1] + time.perf_counter() - began)
        try:
            rows.append(board.metrics(solver))
        except ValueError:  # the board refuses NaN
            rows.append({"value": float("nan")})
        began = time.perf_counter()
        return len(rows) <= points and np.isfinite(rows[-1]["value"])

    solver.run(callback)
    return {"seconds": seconds, "rows": rows}


class Turns:
    """A solver in a thread of its own, which takes an epoch when told."""

    def __init__(self, solver: Any) -> None:
        self._solver, self._began, self._taken = solver, threading.Semaphore(0), threading.Event()
        self._epochs, self._over = 0, False
        threading.Thread(target=solver.run, args=(self._callback,), daemon=True).start()
        self._wait()

    def take(self) -> float:
        """Return the seconds of the next epoch."""
        start = time.perf_counter()
        self._began.release()
        self._wait()
        return time.perf_counter() - start

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


def paired(ours: Any, theirs: Any, rounds: int) -> dict[str, list[float]]:
    """Return quartiles of the seconds of an epoch of both, and of the ratio of the pairs."""
    turns = [Turns(ours), Turns(theirs)]
    for one in turns:
        one.take()
    times = np.empty((rounds, 2))
    for k in range(rounds):
        for i in (0, 1) if k % 2 else (1, 0):
            times[k, i] = turns[i].take()
    for one in turns:
        one.end()
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
    calls: Annotated[int, typer.Option(help="Of oracles for each solver.")] = 64_000,
    points: Annotated[int, typer.Option(help="Where a curve is evaluated.")] = 100,
    seeds: Annotated[int, typer.Option(help="1, 2, and so on.")] = 5,
    rounds: Annotated[int, typer.Option(help="Of paired times.")] = 21,
    step_size: Annotated[float, typer.Option()] = 0.1,
    outer_ratio: Annotated[float, typer.Option()] = 1.0,
    label: Annotated[str, typer.Option(help="Added to the names of the solvers.")] = "",
) -> None:
    """Measure solvers on a problem of the board."""
    board = Board(folder, problem)
    found: dict[str, Any] = json.loads(results.read_text()) if results.exists() else {}

    def keep(kind: str, name: str, value: Any) -> None:
        found.setdefault(problem, {}).setdefault(kind, {})[name] = value
        results.write_text(json.dumps(found, indent=1))

    for name in filter(None, solvers.split(",")):
        entry = board.entry(name, step_size, outer_ratio)
        steps = max(1, round(calls / points / entry.calls))
        solver = board.made(entry, steps)
        curves = [curve(board, board.seeded(solver, 1 + k), points) for k in range(seeds)]
        about = {"calls": steps * entry.calls, "step_size": step_size, "outer_ratio": outer_ratio}
        keep("curves", name + label, about | {"seeds": curves})
        last = [of["rows"][-1]["value"] for of in curves]
        print(f"{name}: {np.median(last):.3g} after {curves[0]['seconds'][-1]:.1f} s", flush=True)
    for pair in filter(None, pairs.split(",")):
        entries = [board.entry(name, step_size, outer_ratio) for name in pair.split(":")]
        steps = max(1, round(TURN / entries[0].calls))
        made = [board.made(entry, steps) for entry in entries]
        keep("pairs", pair, {"steps": steps} | paired(*made, rounds))
        print(f"{pair}: {found[problem]['pairs'][pair]['ratio']}", flush=True)


if __name__ == "__main__":
    typer.run(main)
