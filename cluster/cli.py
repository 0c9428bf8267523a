"""The command `gradhpo`: start, resume, watch and read sweeps."""

from __future__ import annotations

import contextlib
import functools
import shlex
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from gradhpo import files
from gradhpo._version import __version__
from gradhpo.checkpoints import DamagedFile
from gradhpo.cluster import event_log, front, manifest, optuna_study
from gradhpo.cluster.check import check_storage
from gradhpo.cluster.events import Importing, Stopped
from gradhpo.cluster.failures import SweepError
from gradhpo.cluster.journal import Journal
from gradhpo.cluster.printable import printable
from gradhpo.cluster.result import SweepResult, Trial
from gradhpo.cluster.settings import folder_of
from gradhpo.cluster.storage import Storage
from gradhpo.cluster.sweep import Sweep
from gradhpo.export import save_orbax, save_safetensors, write_script
from gradhpo.lock import StorageInUse
from gradhpo.observers.named import named

STOPPED = 130
"""The exit status of a sweep that was told to stop before its end."""
UNTOLD = ("prepared", "compiling", "starting", "running", "finished")
"""Events that `status` leaves out."""


app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

Where = Annotated[str, typer.Argument(help="The sweep's folder, or its address.")]
Generations = Annotated[int | None, typer.Option(help="In all; more than before extends.")]
Workers = Annotated[int | None, typer.Option(help="Processes that hold shards.")]
Allow = Annotated[
    list[str] | None, typer.Option(help="What may differ from before: data, code, mesh.")
]
Patience = Annotated[int | None, typer.Option(help="End after so many without a best so far.")]
Target = Annotated[float | None, typer.Option(help="End at a metric this good.")]
Seconds = Annotated[float | None, typer.Option(help="End when this run has taken so long.")]
Track = Annotated[
    list[str] | None,
    typer.Option(help="csv=FILE, json=FILE, tensorboard=FOLDER, wandb=PROJECT, mlflow=EXPERIMENT."),
]
Which = Annotated[
    str | None,
    typer.Option(help="A trial of the front: its number, 17, or that after a generation, 17@5."),
]
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
            sys.exit(printable(f"gradhpo: {error}", lines=True))
        except KeyboardInterrupt:
            sys.exit("gradhpo: stopped; what is not saved yet is computed again on resume")

    return wrapped


def _version(asked: bool) -> None:
    if asked:
        _say(f"gradhpo {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Say which this is."),
    ] = False,
) -> None:
    """Sweeps of populations: hypergradients inside a trial, a scheduler between trials."""
    del version


@app.command()
@clear_errors
def sweep(
    file: Annotated[
        Path,
        typer.Argument(exists=True, dir_okay=False, help="The arguments of Sweep, in TOML."),
    ],
    storage: Annotated[str | None, typer.Option(help="The sweep's folder, or its address.")] = None,
    generations: Generations = None,
    workers: Workers = None,
    executor: Annotated[str | None, typer.Option(help="auto, local, processes or ray.")] = None,
    allow_changed: Allow = None,
    patience: Patience = None,
    target: Target = None,
    seconds: Seconds = None,
    track: Track = None,
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
        "stop": _stop(patience, target, seconds),
    }
    given = {name: value for name, value in changes.items() if value is not None}
    _run(Sweep.from_toml(file, **given), plot, allow_changed, track)


@app.command()
@clear_errors
def resume(
    storage: Where,
    generations: Generations = None,
    workers: Workers = None,
    address: Annotated[str | None, typer.Option(help="Of a Ray cluster to join.")] = None,
    allow_changed: Allow = None,
    patience: Patience = None,
    target: Target = None,
    seconds: Seconds = None,
    track: Track = None,
    plot: Plot = None,
) -> None:
    """Go on with the sweep that a storage holds, or extend it with --generations.

    This imports and runs the code that the storage names, and says so first.
    """
    changes = {"generations": generations, "workers": workers, "address": address}
    changes["stop"] = _stop(patience, target, seconds)
    given = {name: value for name, value in changes.items() if value is not None}
    _run(Sweep.from_storage(storage, **given), plot, allow_changed, track)


@app.command()
@clear_errors
def stop(storage: Where) -> None:
    """Ask the driver of a sweep to end after the generation in flight, which is saved.

    So does a file `stop.txt` in the sweep's folder. `resume` goes on.

    A `solve(checkpoint=…)` of this folder ends within seconds, saved too.
    """
    place = folder_of(storage)
    who = Storage(place).files.holder()
    if who is None:
        sys.exit(printable(f"gradhpo: nobody runs {place}: there is nothing to stop"))
    Storage(place).ask_to_stop(f"gradhpo stop on {socket.gethostname()}")
    _say(f"{place}: {who} ends after the generation in flight, or the steps")


@app.command()
@clear_errors
def status(
    storage: Where,
    watch: Annotated[bool, typer.Option("--watch", help="Say it again until it is over.")] = False,
    every: Annotated[float, typer.Option(help="Seconds between two looks of --watch.")] = 2.0,
) -> None:
    """Say how far a sweep is, who runs it, and what happened to it; changes nothing."""
    place = folder_of(storage)
    _status(place)
    with contextlib.suppress(KeyboardInterrupt):
        while watch and Storage(place).files.holder():
            time.sleep(every)
            print("\x1b[2J\x1b[H" if sys.stdout.isatty() else "", flush=True)
            _status(place)


def _status(place: files.Where) -> None:
    about, journal = manifest.read(place), Journal(place)
    compared = manifest.compared(about)
    done, total = journal.generation + 1, about["generations"]
    who = Storage(place).files.holder()
    state = f"running ({who})" if who else "complete" if done >= total else "not running"
    _say(f"{place}: {state}, {done} of {total} generations")
    _say(
        f"  {_many(about['population'], 'trial')} in {_many(about['shards'], 'shard')}, "
        f"{about['steps_per_generation']} steps a generation, metric {', '.join(compared.names)}"
    )
    for found in sorted(front.of_journal(journal.last)):
        scores = _scores(compared.shown(found.scores), named=compared.several)
        what = "front" if compared.several else "best"
        _say(f"  {what} {scores}: trial {found.trial}, generation {found.generation + 1}")
    if who and done:
        seconds = journal.last[-1]["seconds"]
        _say(f"  the last generation took {seconds:.1f} s; {(total - done) * seconds:.0f} s left")
    if journal.last and not who and (why := journal.last[-1].get("stopped")):
        _say(f"  stopped: {why}")
    for what in journal.damaged:
        _say(f"  {what}")
    told = [facts for facts in event_log.read(place) if facts["event"] not in UNTOLD]
    for facts in told[-10:]:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(facts.pop("time")))
        event = facts.pop("event")
        known = ", ".join(f"{k}={v}" for k, v in facts.items() if v is not None)
        _say(f"  {when} {event}: {known}")
    if not who and done < total:
        _say(f"To go on: gradhpo resume {shlex.quote(str(place))}")


@app.command()
@clear_errors
def check(storage: Where) -> None:
    """Verify every file of a sweep, and repair what can be; exit status 1 if damage is left."""
    left = False
    for finding in check_storage(folder_of(storage)):
        _say(("" if finding.whole else "DAMAGED: ") + finding.text)
        left |= not finding.whole
    if left:
        sys.exit(1)


@app.command()
@clear_errors
def best(
    storage: Where,
    output: Annotated[Path | None, typer.Option(help="Save its arrays (.npz).")] = None,
    trial: Which = None,
    plot: Plot = None,
) -> None:
    """Print the best trial so far; of several objectives the front, or one of its trials."""
    result = SweepResult.from_storage(storage)
    if result.objectives.several and trial is None and output is None:
        _print_found(result)
        _draw(result, plot)
        return
    found = _chosen(result, trial)
    _print_trial(result, found)
    for name, array in found.arrays.items():
        if name.startswith(".hyperparams"):
            _say(f"  {name[len('.hyperparams') :] or 'hyperparams'} = {_short(array)}")
    if output is not None:
        arrays: dict[str, Any] = dict(found.arrays)
        np.savez(output, allow_pickle=False, **arrays)
        _say(f"Arrays: {output}")
    _draw(result, plot)


@app.command()
@clear_errors
def report(
    storage: Where,
    output: Annotated[Path, typer.Option(help="The file of HTML; replaced.")] = Path("report.html"),
    watch: Annotated[
        bool, typer.Option("--watch", help="Serve it on this machine's loopback, live.")
    ] = False,
    port: Annotated[int, typer.Option(help="Of --watch; 0 for a free one.")] = 0,
) -> None:
    """Write a report of a sweep, or of a run of solve(checkpoint=…), as one file of HTML."""
    from gradhpo.cluster import reporting

    if watch:
        with reporting.report_server(storage, port) as server:
            _say(f"{server.address} (Ctrl-C ends it)")
            with contextlib.suppress(KeyboardInterrupt):
                threading.Event().wait()
        _say("No longer served.")
        return
    made = reporting.write_report(storage, output)
    _say(f"{made}: {made.stat().st_size / 1e6:.1f} MB")


@app.command()
@clear_errors
def doctor() -> None:
    """Say what there is to use: devices, versions, extras; and what a sweep would take."""
    from gradhpo.cluster import doctor

    for line in doctor.findings():
        _say(line)


@app.command()
@clear_errors
def init(
    folder: Annotated[Path, typer.Argument(help="Where; made if it is missing.")] = Path(),
) -> None:
    """Write a small problem.py and a sweep.toml that run as they are; replaces nothing."""
    from gradhpo.cluster.starter import write_starter

    for path in write_starter(folder):
        _say(f"wrote {path}")
    where = "" if folder == Path() else f"cd {shlex.quote(str(folder))} && "
    _say(f"Next: {where}gradhpo sweep sweep.toml")


@app.command()
@clear_errors
def export(
    storage: Where,
    optuna: Annotated[str | None, typer.Option(help="An Optuna storage: sqlite:///a.db")] = None,
    study: Annotated[str | None, typer.Option(help="The study's name.")] = None,
    safetensors: Annotated[Path | None, typer.Option(help="A file for the best trial.")] = None,
    orbax: Annotated[Path | None, typer.Option(help="A folder for the best trial.")] = None,
    script: Annotated[
        Path | None, typer.Option(help="A .py for the best trial's λ(t); imports the sweep's code.")
    ] = None,
    trial: Which = None,
) -> None:
    """Hand a sweep, finished or running, to other tools; its best trial to other programs."""
    result = SweepResult.from_storage(storage)
    if optuna is None and safetensors is None and orbax is None and script is None:
        raise ValueError("say what to export: --optuna, --safetensors, --orbax or --script")
    if optuna is not None:
        made = optuna_study.export_study(result.where, optuna, study)
        _say(f"Optuna: {len(made.trials)} trials in the study {made.study_name!r}")
    if safetensors is not None:
        saved = save_safetensors(safetensors, _chosen(result, trial))
        _say(f"{safetensors}: {', '.join(saved)}")
    if orbax is not None:
        save_orbax(orbax, _chosen(result, trial))
        _say(f"{orbax}: params and hyperparams, for StandardCheckpointer().restore")
    if script is not None:
        known = manifest.read(result.where)
        given = manifest.settings(known)
        references = [given[name] for name in manifest.OBJECTS if name in given]
        _say(Importing(references, known["sys_path"]).line())
        found = _chosen(result, trial)
        write_script(script, result.trajectory(found))
        _say(f"{script}: λ(t) of {found.number}; its numbers are in {script.stem}.npz")


def _stop(patience: int | None, target: float | None, seconds: float | None) -> Any:
    """Return the table that TOML would have."""
    given = {"patience": patience, "target": target, "seconds": seconds}
    return {name: value for name, value in given.items() if value is not None} or None


def _say(text: str) -> None:
    """Print a line; what a terminal would obey in texts from a storage is shown, and not sent."""
    print(printable(text))


def _many(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _run(
    made: Sweep, plot: Path | None, allowed: list[str] | None, track: list[str] | None
) -> None:
    result = made.run(observers=list(map(named, track or ())), allow_changed=allowed or ())
    _print_found(result)
    if (report := result.report) is not None:
        cached = f", {report.restores} times from JAX's cache" if report.restores else ""
        _say(
            f"{report.generations} generations in {report.seconds:.1f} s after "
            f"{report.startup_seconds:.1f} s to start; the step was compiled "
            f"{_many(report.compiles, 'time')} and loaded {_many(report.loads, 'time')}{cached}; "
            f"{_many(report.workers_lost, 'worker')} lost"
        )
        print("  to start: " + report.start())
    _draw(result, plot)
    expected = any(isinstance(event, Stopped) and event.expected for event in made.events)
    if result.generations < made.generations and not expected:
        sys.exit(STOPPED)


def _chosen(result: SweepResult, which: str | None) -> Trial:
    """Return the best trial, or the one of the front that a person names.

    A front may have a trial several times, as it was after several generations.
    """
    if which is None and not result.objectives.several:
        return result.best
    entries = {f"{trial.number}@{trial.generation + 1}": trial for trial in result.front}
    named = ", ".join(entries)
    if which is None:
        raise ValueError(f"of several objectives no trial is the best: --trial, one of {named}")
    there = [name for name in entries if which in (name, name.partition("@")[0])]
    if len(there) > 1:
        several = f"as it was after several generations: --trial, one of {', '.join(there)}"
        raise ValueError(f"trial {which} is on the front {several}")
    if not there:
        raise ValueError(f"trial {which} is not on the front, which has {named}")
    return entries[there[0]]


def _print_found(result: SweepResult) -> None:
    """Print the best trial, or a line for each of the front."""
    if not result.objectives.several:
        _print_trial(result, result.best)
        return
    _say(f"The front, of {result.objectives}:")
    for trial in result.front:
        has = _scores({**trial.settings, **trial.choices}, named=True)
        when = f"trial {trial.number} after generation {trial.generation + 1}"
        _say(f"  {_scores(trial.scores, named=True)}: {when}{f', {has}' if has else ''}")


def _scores(numbers: Mapping[str, Any], named: bool) -> str:
    """Return numbers in a line, with their names or without."""
    shown = {n: f"{x:.6g}" if isinstance(x, float) else str(x) for n, x in numbers.items()}
    return ", ".join(f"{n} {text}" if named else text for n, text in shown.items())


def _print_trial(result: SweepResult, found: Trial) -> None:
    kind = "On the front" if result.objectives.several else "Best"
    which = f"trial {found.number} after generation {found.generation + 1}"
    _say(f"{kind}: {which}, {_scores(found.scores, named=True)}")
    others = {name: value for name, value in found.metrics.items() if name not in found.scores}
    _say(f"  {_scores(others, named=True)}")
    if found.lr_hyper is not None:
        _say(f"  lr_hyper {found.lr_hyper:.6g}")
    if found.choices:
        _say("  " + ", ".join(f"{name} {value}" for name, value in found.choices.items()))
    _say(f"  lineage: {' → '.join(map(str, found.lineage))}")


def _draw(result: SweepResult, plot: Path | None) -> None:
    if plot is not None:
        result.plot(plot)
        _say(f"Figure: {plot}")


def _short(array: np.ndarray) -> str:
    if array.size <= 8:
        return str(array.tolist())
    low, high = array.min(), array.max()
    return f"{array.dtype}{list(array.shape)}, from {low:.4g} to {high:.4g}"
