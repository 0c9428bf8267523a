"""The command `gradhpo`: start, resume, watch and read sweeps."""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from gradhpo.checkpoints import DamagedFile
from gradhpo.cluster.failures import SweepError
from gradhpo.cluster.journal import Journal
from gradhpo.cluster.result import SweepResult
from gradhpo.cluster.sweep import EVENTS, Sweep, read_manifest
from gradhpo.lock import StorageInUse, holder

STOPPED = 130
"""The exit status of a sweep that was told to stop before its end."""


app = typer.Typer(
    help="Sweeps of populations: hypergradients inside a trial, a scheduler between trials.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

Storage = Annotated[Path, typer.Argument(help="The sweep's folder.")]
Generations = Annotated[int | None, typer.Option(help="In all; more than before extends.")]
Workers = Annotated[int | None, typer.Option(help="Processes that hold shards.")]
Plot = Annotated[Path | None, typer.Option(help="Draw all trials and the winner (PNG).")]


def clear_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Print what a person can do something about without a traceback of ours."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        errors = (
            SweepError,
            StorageInUse,
            DamagedFile,
            ValueError,
            TypeError,
            OSError,
            ImportError,
        )
        try:
            command(*args, **kwargs)
        except errors as error:
            sys.exit(f"gradhpo: {error}")
        except KeyboardInterrupt:
            sys.exit("gradhpo: stopped; the generation in flight is computed again on resume")

    return wrapped


@app.command()
@clear_errors
def sweep(
    file: Annotated[Path, typer.Argument(help="The arguments of Sweep, in TOML.")],
    storage: Annotated[str | None, typer.Option(help="The sweep's folder.")] = None,
    generations: Generations = None,
    workers: Workers = None,
    executor: Annotated[str | None, typer.Option(help="auto, local or ray.")] = None,
    plot: Plot = None,
) -> None:
    """Run the sweep that a TOML file describes; where its storage holds it already, go on.

    Options replace what the file says.
    """
    changes = {
        "storage": storage,
        "generations": generations,
        "workers": workers,
        "executor": executor,
    }
    given = {name: value for name, value in changes.items() if value is not None}
    _run(Sweep.from_toml(file, **given), plot)


@app.command()
@clear_errors
def resume(
    storage: Storage,
    generations: Generations = None,
    workers: Workers = None,
    plot: Plot = None,
) -> None:
    """Go on with the sweep that a storage holds, or extend it with --generations."""
    changes = {"generations": generations, "workers": workers}
    given = {name: value for name, value in changes.items() if value is not None}
    _run(Sweep.from_storage(storage, **given), plot)


@app.command()
@clear_errors
def status(storage: Storage) -> None:
    """Say how far a sweep is, who runs it, and what happened to it; changes nothing."""
    manifest, journal = read_manifest(storage), Journal(storage)
    done, total = journal.generation + 1, manifest["generations"]
    who = holder(storage)
    state = f"running ({who})" if who else "complete" if done >= total else "not running"
    print(f"{storage}: {state}, {done} of {total} generations")
    print(
        f"  {manifest['population']} trials in {manifest['shards']} shards, "
        f"{manifest['steps_per_generation']} steps a generation, metric {manifest['metric']}"
    )
    if journal.last and (found := journal.last[-1]["best"]) is not None:
        score = found["score"] * (1 if manifest["mode"] == "min" else -1)
        print(f"  best {score:.6g}: trial {found['trial']}, generation {found['generation'] + 1}")
    if who and done:
        seconds = journal.last[-1]["seconds"]
        print(f"  the last generation took {seconds:.1f} s; {(total - done) * seconds:.0f} s left")
    for what in journal.damaged:
        print(f"  {what}")
    events = storage / EVENTS
    lines = events.read_text().splitlines() if events.exists() else []
    for line in [line for line in lines if '"prepared"' not in line][-10:]:
        try:
            facts = json.loads(line)
        except ValueError:
            continue  # its writer was killed
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(facts.pop("time")))
        event = facts.pop("event")
        print(f"  {when} {event}: {', '.join(f'{k}={v}' for k, v in facts.items())}")
    if not who and done < total:
        print(f"To go on: gradhpo resume {storage}")


@app.command()
@clear_errors
def best(
    storage: Storage,
    output: Annotated[Path | None, typer.Option(help="Save its arrays (.npz).")] = None,
    plot: Plot = None,
) -> None:
    """Print the best trial so far."""
    result = _load(storage)
    _print_best(result)
    found = result.best
    for name, array in found.arrays.items():
        if name.startswith(".hyperparams"):
            print(f"  {name[len('.hyperparams') :] or 'hyperparams'} = {_short(array)}")
    if output is not None:
        arrays: dict[str, Any] = dict(found.arrays)
        np.savez(output, allow_pickle=False, **arrays)
        print(f"Arrays: {output}")
    _draw(result, plot)


def _load(storage: Path) -> SweepResult:
    return Sweep.from_storage(storage).result()


def _run(made: Sweep, plot: Path | None) -> None:
    result = made.run()
    _print_best(result)
    if (report := result.report) is not None:
        cached = f", {report.restores} times from JAX's cache" if report.restores else ""
        print(
            f"{report.generations} generations in {report.seconds:.1f} s after "
            f"{report.startup_seconds:.1f} s to start; the step was compiled {report.compiles} "
            f"times and loaded {report.loads} times{cached}; {report.workers_lost} workers lost"
        )
        print("  to start: " + report.start())
    _draw(result, plot)
    if result.generations < made.generations:
        sys.exit(STOPPED)


def _print_best(result: SweepResult) -> None:
    found = result.best
    print(f"Best: trial {found.number} after generation {found.generation + 1}")
    print("  " + ", ".join(f"{name} {value:.6g}" for name, value in found.metrics.items()))
    if found.lr_hyper is not None:
        print(f"  lr_hyper {found.lr_hyper:.6g}")
    if found.choices:
        print("  " + ", ".join(f"{name} {value}" for name, value in found.choices.items()))
    print(f"  lineage: {' → '.join(map(str, found.lineage))}")


def _draw(result: SweepResult, plot: Path | None) -> None:
    if plot is not None:
        result.plot(plot)
        print(f"Figure: {plot}")


def _short(array: np.ndarray) -> str:
    if array.size <= 8:
        return str(array.tolist())
    low, high = array.min(), array.max()
    return f"{array.dtype}{list(array.shape)}, from {low:.4g} to {high:.4g}"
