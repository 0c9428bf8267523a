"""`Sweep`: a population over many devices and hosts, that survives what happens to them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import time
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal

import jax
import numpy as np

from gradhpo import checkpoints
from gradhpo._version import __version__
from gradhpo.cluster import executors, importing, report, schedulers
from gradhpo.cluster.controller import Controller, Layout, Rules
from gradhpo.cluster.executors import Executor, RayExecutor, RaySettings
from gradhpo.cluster.failures import SweepError
from gradhpo.cluster.journal import FILE, Journal
from gradhpo.cluster.orders import Prepared, Spec
from gradhpo.cluster.result import Report, SweepResult
from gradhpo.cluster.schedulers import PBT, Scheduler
from gradhpo.cluster.space import SearchSpace
from gradhpo.cluster.timings import Timings
from gradhpo.errors import (
    UnreachedWarning,
    check_count,
    check_hashable,
    check_number,
    warn_user,
)
from gradhpo.host import check_once
from gradhpo.interrupts import deferred
from gradhpo.lock import FolderLock
from gradhpo.optimizer import BilevelOptimizer
from gradhpo.problem import Problem
from gradhpo.timetable import EpisodeInit, starts_fresh

MANIFEST, PROGRAMS, EVENTS = "manifest.json", "programs.json", "events.jsonl"
PLACEMENTS = ("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD")
IDENTITY = (
    *("problem", "optimizer", "data", "space", "population", "steps_per_generation", "shards"),
    *("scheduler", "metric", "mode", "seed", "mesh", "x64"),
    *("episode_length", "lr_reptile", "episode_init", "lr_schedule"),
)
"""What makes a run this very run; the rest of a manifest may differ when it is resumed."""
OLDER = {
    "episode_length": None,
    "lr_reptile": 1.0,
    "episode_init": "reptile",
    "lr_schedule": None,
    "streams": None,
}
"""What a manifest says that does not have these names yet."""
STREAMS = "by trial and step"
"""How randomness is drawn; runs that drew it otherwise can be read, and not resumed."""


class Sweep:
    """Tunes a population of trials: hypergradients inside a trial, a scheduler between trials.

    A generation is `steps_per_generation` compiled steps of every trial; then the scheduler
    decides who copies whom. The final table depends on the arguments above `workers` alone: not
    on how many workers there are, which of them die, or how often the driver is started again
    (on one kind of hardware, and at one `batching`).

    Args:
      problem: `"package.module:name"` or `"folder/file.py:name"` of a `Problem` or of a function
        that returns one (it may take choices of the space, and `data`); or such an object itself,
        which the command line cannot resume. `Problem.batches` may be anything but an iterator,
        which could not be read again after a failure; a trial's n-th step takes the n-th pair of
        its stream, see `Problem`.
      optimizer: likewise, a `BilevelOptimizer`.
      space: what differs between trials.
      population: trials at a time, in all. With choices in the space it is divided equally among
        their combinations.
      generations: how many. A larger number than before extends a sweep that is done.
      steps_per_generation: steps that a trial takes in one.
      storage: a folder for all that must last, seen by all workers under this path.
      scheduler: `PBT`, `SuccessiveHalving`, `RandomSearch`, or any function of
        `(table, space, rng)`; see `schedulers`.
      metric: what is compared: one of the five metrics of a step, or a name of `Problem.metrics`.
      mode: "min" or "max".
      seed: decides all randomness, from 0 to 2³² - 1.
      shards: into how many the population is divided; by default the smallest number that fits
        `workers` and the choices. Part of what the numbers depend on.
      batching: the layout of a shard's slots, see `Population`. "auto" is measured once, and kept
        in the storage.
      mesh: `{"trial": a, "data": b}`: the devices of a worker, over which slots and batches are
        divided.
      data: arrays for the problem's function, handed out once for each node: a pytree of NumPy
        arrays, or a reference to a function that returns one.
      episode_length: as in `solve`: steps after which a trial's weights start anew from its φ,
        moved by Reptile; None for one long episode.
      lr_reptile: Reptile step size, with `episode_length`.
      episode_init: as in `solve`: where an episode starts, "reptile" or "fresh".
      lr_schedule: a traceable function of the trial's step, counted from 0, or a reference to one:
        a factor on the space's `lr_hyper`.
      workers: how many processes (or gangs of them) hold shards, at most.
      resources: of each process: `num_cpus`, `num_gpus`, `memory`, or any of Ray's by name.
      processes: of each worker; several are one JAX job that holds one shard together.
      executor: "ray"; "local": in this process; "auto": "ray" where it is installed.
      address: of a Ray cluster to join, or "auto"; by default `RAY_ADDRESS`, and without that a
        Ray of this machine only, started here and stopped again.
      env: environment variables of the workers.
      runtime_env: more of Ray's runtime environment, such as `working_dir` or `pip`.
      deadline: seconds after which a worker that does not answer is replaced; by default one
        minute and ten times the longest generation so far.
      start_deadline: the same for starting and compiling.
      wait: seconds to wait for resources that the cluster does not have yet, with an autoscaler.
      placement: how Ray places the processes of a worker: "PACK", "SPREAD", "STRICT_PACK" or
        "STRICT_SPREAD".
      progress: False for no output; see `run`.

    Raises:
      TypeError, ValueError: naming the argument, before anything starts.
    """

    def __init__(
        self,
        problem: Any,
        optimizer: Any,
        space: SearchSpace,
        population: int,
        generations: int,
        steps_per_generation: int,
        storage: str | Path,
        scheduler: Scheduler | None = None,
        metric: str = "val_loss",
        mode: Literal["min", "max"] = "min",
        seed: int = 0,
        shards: int | None = None,
        batching: Any = "auto",
        mesh: Mapping[str, int] | None = None,
        data: Any = None,
        episode_length: int | None = None,
        lr_reptile: float = 1.0,
        episode_init: EpisodeInit = "reptile",
        lr_schedule: Any = None,
        *,
        workers: int = 1,
        resources: Mapping[str, float] | None = None,
        processes: int = 1,
        executor: Literal["auto", "local", "ray"] = "auto",
        address: str | None = None,
        env: Mapping[str, str] | None = None,
        runtime_env: Mapping[str, Any] | None = None,
        deadline: float | None = None,
        start_deadline: float = 600,
        wait: float = 0,
        placement: str = "PACK",
        progress: bool | None = None,
    ) -> None:
        for name, value, kind in (
            ("problem", problem, Problem),
            ("optimizer", optimizer, BilevelOptimizer),
        ):
            if isinstance(value, str):
                importing.check_reference(name, value)
            elif not isinstance(value, kind) and not callable(value):
                accepted = f"{importing.ACCEPTED}, a {kind.__name__}, or a function that makes one"
                raise TypeError(f"{name} must be {accepted}, got {value!r}")
        if isinstance(problem, Problem):
            check_once(problem.batches)
        if not isinstance(space, SearchSpace):
            raise TypeError(f"space must be a SearchSpace, got {space!r}")
        self.population = check_count("population", population)
        self.generations = check_count("generations", generations)
        self.steps = check_count("steps_per_generation", steps_per_generation)
        self.workers = check_count("workers", workers)
        self.seed = check_count("seed", seed, 0)
        if self.seed >= 2**32:
            raise ValueError(f"seed must be below 2**32, got {seed}")
        self.scheduler = PBT() if scheduler is None else scheduler
        if not callable(self.scheduler) or isinstance(self.scheduler, type):
            accepted = "PBT(…), SuccessiveHalving(…), RandomSearch(…) or a function"
            raise TypeError(f"scheduler must be {accepted}, got {scheduler!r}")
        if processes != 1 and batching == "auto":
            raise ValueError(
                'processes above 1 need a batching other than "auto", which every process would '
                "measure on its own"
            )
        for name, value, accepted in (
            ("mode", mode, ("min", "max")),
            ("executor", executor, ("auto", "local", "ray")),
            ("placement", placement, PLACEMENTS),
        ):
            if value not in accepted:
                raise ValueError(f"{name} must be one of {accepted}, got {value!r}")
        if executor == "ray" and not executors.has_ray():
            raise ImportError('executor="ray" needs Ray: pip install gradhpo[cluster]')
        self._check_mesh(mesh)
        for name, value in (("env", env), ("runtime_env", runtime_env), ("resources", resources)):
            if value is not None and not isinstance(value, Mapping):
                raise TypeError(f"{name} must be a dictionary, got {value!r}")
        for name, value, accepted, right in (
            ("storage", storage, "the path of a folder", isinstance(storage, str | Path)),
            ("address", address, "a string", address is None or isinstance(address, str)),
            ("progress", progress, "None, True or False", progress in (None, True, False)),
        ):
            if not right:
                raise TypeError(f"{name} must be {accepted}, got {value!r}")
        if isinstance(data, str):
            importing.check_reference("data", data)
        _check_episodes(episode_length, lr_reptile, episode_init)
        episode_length = None if episode_length is None else int(episode_length)
        self.lr_schedule = _checked_schedule(lr_schedule, space)
        self.episode_length, self.lr_reptile = episode_length, float(lr_reptile)
        self.episode_init: EpisodeInit = episode_init
        self.problem, self.optimizer, self.space = problem, optimizer, space
        self.metric, self.mode, self.batching = metric, mode, batching
        self.mesh = None if mesh is None else dict(mesh)
        self.storage, self._data, self._progress = Path(storage).absolute(), data, progress
        self.executor: str = executor
        self._folders = _sys_path()
        self.layout = self._divide(shards)
        self._ray = RaySettings(
            workers=min(self.workers, self.layout.shards),
            resources=_check_resources(resources),
            processes=check_count("processes", processes),
            env={str(k): str(v) for k, v in (env or {}).items()},
            runtime_env=dict(runtime_env or {}),
            address=address,
            deadline=None if deadline is None else _seconds("deadline", deadline),
            start_deadline=_seconds("start_deadline", start_deadline),
            wait=check_number("wait", wait, 0, float("inf")),
            placement=placement,
        )
        if processes > 1 and executor == "local":
            raise ValueError('processes is for Ray; executor="local" has one')
        self.events: list[tuple[str, dict[str, Any]]] = []
        """What happened in `run`, as `(event, facts)`: workers lost, programs prepared, …"""

    @classmethod
    def from_toml(cls, path: str | Path, **changes: Any) -> Sweep:
        """Return the sweep that a TOML file describes, by the names of the arguments above.

        `space` and `scheduler` are tables: `[space.hyperparams]`, `scheduler = {name = "PBT"}`.

        Raises:
          ValueError: for what is not TOML, or an unknown or missing name.
          OSError: if the file cannot be read.
        """
        with open(path, "rb") as file:
            try:
                settings = tomllib.load(file)
            except tomllib.TOMLDecodeError as error:
                raise ValueError(f"{path}: {error}") from None
        return cls._from_settings(settings | changes, str(path))

    @classmethod
    def from_storage(cls, storage: str | Path, **changes: Any) -> Sweep:
        """Return the sweep that a storage holds, to resume it or to read its result.

        Raises:
          SweepError: if there is none, or it was made from objects of a program, which only that
            program can make again.
        """
        storage = Path(storage)
        manifest = read_manifest(storage)
        named = ("problem", "optimizer", "lr_schedule")
        objects = [name for name in named if "object" in (manifest[name] or ())]
        if not _importable(manifest["scheduler"]):
            objects.append("scheduler")
        if objects:
            raise SweepError(
                f"{storage} was made by a program, with {' and '.join(objects)} given as objects: "
                "run that program again, and it goes on. (With references such as "
                f"{importing.ACCEPTED} the command line can.)"
            )
        settings: dict[str, Any] = {
            name: manifest[name] for name in (*IDENTITY, "generations", "batching", "how")
        }
        for name in ("problem", "optimizer", "lr_schedule"):
            settings[name] = settings[name] and settings[name]["reference"]
        if settings["data"] is not None and "reference" not in settings["data"]:
            raise SweepError(f"{storage} was made by a program that gave data=: run that again")
        settings["data"] = settings["data"] and settings["data"]["reference"]
        settings |= settings.pop("how")
        if settings.pop("x64") != jax.config.jax_enable_x64:  # pyright: ignore
            jax.config.update("jax_enable_x64", manifest["x64"])
        importing.extend_path(manifest["sys_path"])
        given = {name: value for name, value in settings.items() if value is not None}
        made = cls._from_settings(given | {"storage": str(storage)} | changes, str(storage))
        made._folders = tuple(dict.fromkeys([*manifest["sys_path"], *made._folders]))
        return made

    def run(
        self, callback: Callable[[int, dict[str, np.ndarray]], Any] | None = None
    ) -> SweepResult:
        """Run to the end, or go on where an earlier run of this very sweep stopped.

        Shows a progress bar on a terminal (with tqdm), and a line every few seconds elsewhere.
        Ctrl-C, or a SIGTERM, lets the generation in flight finish, saves it, and says how to go
        on; a second one does not wait.

        Args:
          callback: called as `callback(generation, table)` after each generation that this run
            computes, counted from 1, when it is saved; each column of the table is
            `(population,)`.

        Raises:
          SweepError: if the storage holds another run, or the sweep cannot go on; with the
            worker's own traceback where one failed.
          StorageInUse: if another driver holds the storage.
          OSError: if the storage cannot be written.
        """
        self._check_storage()
        self.events = []
        lock = FolderLock(self.storage, "storage", "sweep")
        try:
            data = self._load_data()
            self._claim(data)
            return self._run(data, callback)
        finally:
            lock.release()

    def result(self) -> SweepResult:
        """Return what is done so far, from the storage; nothing runs."""
        return self._result(self._load_data(), None)

    # --- running --------------------------------------------------------------------------------

    def _run(self, data: Any, callback: Callable[..., Any] | None) -> SweepResult:
        began = time.perf_counter()
        journal = Journal(self.storage)
        done = journal.generation + 1
        sign = 1 if self.mode == "min" else -1
        steps = self.population * self.steps
        display = report.Display(self._progress, self.generations, done, steps, self.metric, sign)
        rules = Rules(self.scheduler, self.space, self.seed, self.metric, sign)
        spec = self._spec()
        computed: list[int] = []

        def notify(event: str, **facts: Any) -> None:
            if event == "generation":
                computed.append(facts["entry"]["generation"])
                display.generation(facts["entry"], facts["columns"])
                if callback is not None:
                    callback(facts["entry"]["generation"] + 1, facts["columns"])
                return
            self.events.append((event, facts))
            self._log(event, facts)
            if (line := report.describe(event, facts)) is not None:
                display.say(line)

        with display:
            if done:
                notify("resumed", generation=done)
                left = "going on" if done < self.generations else "generations= more extends it"
                display.say(f"{self.storage}: {done} generations are done; {left}")
            for what in journal.damaged:
                notify("journal damaged", what=what)
            if done >= self.generations:
                return self._result(data, None)
            display.say(f"{self.storage}: starting, and compiling the step")
            timings = Timings()
            with timings("executor"):
                executor = executors.open_executor(
                    self.executor, spec, data, self.layout.shards, self._ray, notify
                )
            try:
                with timings("workers"):
                    prepared = self._prepare(executor, notify)
                controller = Controller(self.storage, journal, executor, self.layout, rules, notify)
                display.begin()
                started = time.perf_counter()

                def stop(name: str) -> None:
                    controller.stop = True
                    display.say(f"{name}: finishing this generation; once more to stop at once")

                with deferred(stop):
                    controller.run(self.generations)
                seconds = time.perf_counter() - started
                compiles = executor.xla_compiles() if isinstance(executor, RayExecutor) else []
            finally:
                executor.close()
            made = self._report(
                prepared, compiles, started - began, seconds, len(computed), timings
            )
            if controller.stop and journal.generation + 1 < self.generations:
                left = self.generations - journal.generation - 1
                display.say(f"Stopped, {left} generations before the end. {self.how_to_resume()}")
            return self._result(data, made)

    def _prepare(self, executor: Executor, notify: Any) -> list[Prepared]:
        """Compile, and see that it is what an earlier run compiled."""
        path, known = self.storage / PROGRAMS, self._known_programs()
        prepared = executor.prepare(dict(enumerate(self._layouts())))
        for made in prepared:
            if self.metric not in made.columns:
                raise SweepError(
                    f"metric={self.metric!r} is not in the table, which has "
                    f"{', '.join(made.columns)}"
                )
        for text in dict.fromkeys(text for made in prepared for text in made.unreached):
            warn_user(text, UnreachedWarning)
        programs = [{"batching": p.batching, "key": p.key} for p in prepared]
        if known is None:
            checkpoints.write_json(path, programs)
            return prepared
        for old, new in zip(known, json.loads(json.dumps(programs)), strict=True):
            differing = [name for name in new["key"] if new["key"][name] != old["key"][name]]
            if {"computation", "shapes"} & set(differing) and "jax" not in differing:
                raise SweepError(
                    f"the problem or the optimizer computes something else than when the sweep in "
                    f"{self.storage} began ({', '.join(differing)} differ): restore the code, or "
                    "give another storage"
                )
            for name in set(differing) - {"computation", "shapes"}:
                was, now = old["key"][name], new["key"][name]
                notify(
                    "note",
                    what=f"{name} was {was} and is {now}: the last bits of results may differ "
                    "from an undisturbed run's",
                )
        return prepared

    def _report(
        self,
        prepared: list[Prepared],
        compiles: list[int],
        startup: float,
        seconds: float,
        generations: int,
        timings: Timings,
    ) -> Report:
        # Variants are prepared side by side: the one that took longest is what was waited for.
        slowest = max((dict(p.seconds) for p in prepared), key=_total)
        start = dict(timings.seconds)
        start["workers"] = max(0.0, start["workers"] - _total(slowest))
        every = [facts["prepared"] for event, facts in self.events if event == "prepared"]
        every = every or prepared
        return Report(
            compiles=sum(p.compiles for p in every),
            loads=sum(p.loads for p in every),
            restores=sum(p.restores for p in every),
            small_compiles=sum(p.small_compiles for p in every),
            calibration_compiles=sum(p.calibration_compiles for p in every),
            worker_compiles=compiles,
            workers_lost=sum(event == "worker lost" for event, _ in self.events),
            startup_seconds=startup,
            seconds=seconds,
            generations=generations,
            startup={**start, **slowest},
            loading_seconds=max((_total(dict(p.seconds)) for p in every if p.loads), default=0.0),
        )

    def _result(self, data: Any, made: Report | None) -> SweepResult:
        sign = 1 if self.mode == "min" else -1
        about = (self.layout, self._layouts(), self.metric, sign)
        return SweepResult(self.storage, self._spec(), *about, data, made)

    def how_to_resume(self) -> str:
        """Return the sentence that says how to go on."""
        references = isinstance(self.problem, str) and isinstance(self.optimizer, str)
        references &= self._data is None or isinstance(self._data, str)
        references &= self.lr_schedule is None or isinstance(self.lr_schedule, str)
        if references and _importable(schedulers.describe(self.scheduler)):
            return f"To go on: gradhpo resume {_quoted(self.storage)}"
        return f"To go on, run this program again (storage {_quoted(self.storage)})"

    # --- what identifies a run ------------------------------------------------------------------

    def manifest(self, data: Any = None) -> dict[str, Any]:
        """Return what a storage says of the run that it holds."""
        how: dict[str, Any] = {
            "workers": self.workers,
            "resources": dict(self._ray.resources),
            "processes": self._ray.processes,
            "executor": self.executor,
            "env": dict(self._ray.env),
            "runtime_env": dict(self._ray.runtime_env),
            "deadline": self._ray.deadline,
            "start_deadline": self._ray.start_deadline,
            "wait": self._ray.wait,
            "placement": self._ray.placement,
        }
        made: dict[str, Any] = {
            "gradhpo": __version__,
            "problem": _named(self.problem),
            "optimizer": _named(self.optimizer),
            "data": _data_identity(self._data, data),
            "space": self.space.describe(),
            "population": self.population,
            "steps_per_generation": self.steps,
            "shards": self.layout.shards,
            "scheduler": schedulers.describe(self.scheduler),
            "metric": self.metric,
            "mode": self.mode,
            "seed": self.seed,
            "mesh": self.mesh,
            "x64": bool(jax.config.jax_enable_x64),  # pyright: ignore
            "episode_length": self.episode_length,
            "lr_reptile": self.lr_reptile,
            "episode_init": self.episode_init,
            "lr_schedule": None if self.lr_schedule is None else _named(self.lr_schedule),
            "streams": STREAMS,
            "generations": self.generations,
            "batching": self.batching,
            "sys_path": list(self._folders),
            "how": how,
        }
        return json.loads(json.dumps(made))

    def _claim(self, data: Any) -> None:
        """Write the manifest, or see that it is this run's."""
        mine, path = self.manifest(data), self.storage / MANIFEST
        if path.exists():
            theirs = read_manifest(self.storage)
            if theirs["streams"] != STREAMS:
                raise SweepError(
                    f"storage {str(self.storage)!r} was begun by gradhpo "
                    f"{theirs.get('gradhpo')}, whose trials drew their batches otherwise: its "
                    "result can be read here; to go on, use the gradhpo that began it"
                )
            for name in IDENTITY:
                if mine[name] != theirs.get(name):
                    raise SweepError(
                        f"storage {str(self.storage)!r} holds another run: its {name} is "
                        f"{theirs.get(name)!r}, here {mine[name]!r}. Give another storage, or "
                        "the same settings to go on"
                    )
            layouts = self._layouts()
            if mine["batching"] not in ("auto", theirs["batching"]) and any(
                layout != mine["batching"] for layout in layouts
            ):
                raise SweepError(
                    f"storage {str(self.storage)!r} holds another run: its batching is "
                    f"{layouts[0]!r}, here {mine['batching']!r}"
                )
            if mine["generations"] <= theirs["generations"]:
                return
        checkpoints.write_json(path, mine)

    def _check_storage(self) -> None:
        """Make the folder, and see that it can be written.

        Raises:
          OSError: if not, naming it.
          SweepError: if it is a folder of something else.
        """
        try:
            self.storage.mkdir(parents=True, exist_ok=True)
            probe = self.storage / f".probe-{os.getpid()}"
            probe.write_text("")
            probe.unlink()
        except OSError as error:
            raise type(error)(
                error.errno, f"storage {str(self.storage)!r} cannot be written: {error.strerror}"
            ) from None
        if not (self.storage / MANIFEST).exists():
            names = [path.name for path in self.storage.iterdir()]
            if there := [name for name in names if not name.startswith((".", "driver"))]:
                raise SweepError(
                    f"storage {str(self.storage)!r} is not empty and holds no sweep (it has "
                    f"{there[0]!r}): give a folder of its own"
                )

    def _layouts(self) -> list[Any]:
        """Return each variant's layout: what the storage says, or what was asked for."""
        known = self._known_programs()
        if known is None:
            return [self.batching] * self.layout.variants
        return [program["batching"] for program in known]

    def _known_programs(self) -> list[Any] | None:
        """Return what an earlier run wrote of its programs; None before the first generation.

        Raises:
          SweepError: if it is missing or damaged.
        """
        path = self.storage / PROGRAMS
        if not path.exists() and not (self.storage / FILE).exists():
            return None
        try:
            return json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise SweepError(
                f"{path}, which says how the sweep's programs are laid out, is missing or damaged "
                f"({error}): without it the sweep cannot go on as it began"
            ) from None

    def _spec(self) -> Spec:
        return Spec(
            problem=self.problem,
            optimizer=self.optimizer,
            space=self.space,
            slots=self.layout.slots,
            steps=self.steps,
            seed=self.seed,
            storage=str(self.storage),
            batching=self.batching,
            mesh=self.mesh,
            sys_path=self._folders,
            x64=bool(jax.config.jax_enable_x64),  # pyright: ignore
            episode_length=self.episode_length,
            lr_reptile=self.lr_reptile,
            episode_init=self.episode_init,
            lr_schedule=self.lr_schedule,
        )

    def _load_data(self) -> Any:
        if not isinstance(self._data, str):
            return self._data
        importing.extend_path(self._folders)
        return importing.load(self._data)()

    def _log(self, event: str, facts: Mapping[str, Any]) -> None:
        """Add an event to the storage's log, for `gradhpo status`; not needed for recovery."""
        plain = {k: v for k, v in facts.items() if isinstance(v, str | int | float | list)}
        if "prepared" in facts:
            made: Prepared = facts["prepared"]
            plain = {name: getattr(made, name) for name in ("compiles", "loads", "restores")}
            plain["warnings"] = made.warnings
        line = json.dumps({"time": round(time.time(), 3), "event": event, **plain})
        with contextlib.suppress(OSError), open(self.storage / EVENTS, "a+b") as file:
            # After a line that was cut short, on a new one.
            start = b"" if not file.tell() or _last_byte(file) == b"\n" else b"\n"
            file.write(start + line.encode() + b"\n")

    # --- arguments ------------------------------------------------------------------------------

    @classmethod
    def _from_settings(cls, settings: dict[str, Any], where: str) -> Sweep:
        given = dict(settings)
        if "space" in given:
            given["space"] = SearchSpace.parse(given["space"])
        if "scheduler" in given:
            description = given["scheduler"]
            if not isinstance(description, Mapping):
                raise ValueError(f'{where}: scheduler must be a table, {{name = "PBT"}}')
            importing.extend_path(_sys_path())
            given["scheduler"] = schedulers.parse(description, importing.load)
        names = cls.__init__.__annotations__
        if unknown := [name for name in given if name not in names]:
            accepted = ", ".join(name for name in names if name != "return")
            raise ValueError(f"{where}: unknown name {unknown[0]!r}; a sweep has {accepted}")
        required = ("problem", "optimizer", "space", "population", "generations")
        for name in (*required, "steps_per_generation", "storage"):
            if name not in given:
                raise ValueError(f"{where}: {name} is missing")
        return cls(**given)

    def _divide(self, shards: int | None) -> Layout:
        variants = len(self.space.variants())
        if shards is None and (self.storage / MANIFEST).exists():
            # As it began: another number of workers must not change the numbers.
            known = read_manifest(self.storage)
            same = known.get("population") == self.population
            shards = known.get("shards") if same else None
        if self.population % variants:
            raise ValueError(
                f"population must be a multiple of the {variants} combinations of choices, got "
                f"{self.population}"
            )
        if shards is None:
            shards = variants * max(1, -(-self.workers // variants))
            while self.population % shards and shards < self.population:
                shards += variants
        check_count("shards", shards)
        if shards % variants or self.population % shards:
            raise ValueError(
                f"shards must divide the population of {self.population}, and be a multiple of "
                f"the {variants} combinations of choices; got {shards}"
            )
        layout = Layout(variants, shards, self.population // shards)
        trial = (self.mesh or {}).get("trial", 1)
        if layout.slots % trial:
            raise ValueError(
                f"mesh: {layout.slots} slots of a shard do not divide over trial={trial}"
            )
        return layout

    def _check_mesh(self, mesh: Any) -> None:
        if mesh is None:
            return
        if not isinstance(mesh, Mapping) or not set(mesh) <= {"trial", "data"}:
            raise ValueError(f'mesh must be {{"trial": a, "data": b}}, got {mesh!r}')
        for name, size in mesh.items():
            check_count(f"mesh[{name!r}]", size)


def read_manifest(storage: Path) -> dict[str, Any]:
    """Return a storage's manifest.

    Raises:
      SweepError: if there is none, or it is damaged.
    """
    path = storage / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        if not isinstance(manifest, dict):
            raise ValueError("not a table")
        return OLDER | manifest
    except FileNotFoundError:
        raise SweepError(f"there is no sweep in {str(storage)!r}: no {MANIFEST}") from None
    except ValueError as error:
        raise SweepError(f"{path} is damaged: {error}") from None


def _sys_path() -> tuple[str, ...]:
    """Where references are looked up: the present folder, and that of the program, if it is one."""
    program: Any = sys.modules.get("__main__")
    path: Any = getattr(program, "__file__", "")
    alone = path and getattr(program, "__spec__", None) is None
    own = [str(Path(path).absolute().parent)] if alone else []
    return tuple(dict.fromkeys([str(Path.cwd()), *own]))


def _last_byte(file: BinaryIO) -> bytes:
    file.seek(-1, os.SEEK_END)
    return file.read(1)


def _importable(scheduler: Mapping[str, Any]) -> bool:
    """Whether another program can find a scheduler by its description."""
    reference = str(scheduler.get("function", ""))
    return not reference.startswith("__main__:") and "<" not in reference


def _named(thing: Any) -> dict[str, str]:
    if isinstance(thing, str):
        return {"reference": thing}
    kind = thing if hasattr(thing, "__qualname__") else type(thing)
    return {"object": f"{kind.__module__}.{kind.__qualname__}"}


def _data_identity(given: Any, data: Any) -> Any:
    """Return what identifies the data: its reference, or a checksum of the arrays."""
    if given is None:
        return None
    if isinstance(given, str):
        return {"reference": given}
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path(data)[0]:
        array = np.ascontiguousarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return {"sha256": digest.hexdigest()}


def _check_episodes(episode_length: Any, lr_reptile: Any, episode_init: Any) -> None:
    if episode_length is not None:
        check_count("episode_length", episode_length)
    check_number("lr_reptile", lr_reptile, -float("inf"), float("inf"))
    starts_fresh(episode_init, episode_length, lr_reptile)


def _checked_schedule(lr_schedule: Any, space: SearchSpace) -> Any:
    if isinstance(lr_schedule, str):
        importing.check_reference("lr_schedule", lr_schedule)
    elif lr_schedule is not None:
        check_hashable("lr_schedule", lr_schedule)
    if lr_schedule is not None and space.lr_hyper is None:
        raise ValueError("lr_schedule needs SearchSpace(lr_hyper=…), of which it is a factor")
    return lr_schedule


def _check_resources(resources: Mapping[str, float] | None) -> dict[str, float]:
    given = dict(resources or {})
    for name, amount in given.items():
        check_number(f"resources[{name!r}]", amount, 0, float("inf"))
        if name in ("CPU", "GPU"):
            raise ValueError(f"resources: write num_{name.lower()}s, got {name!r}")
    return given


def _total(seconds: Mapping[str, float]) -> float:
    return sum(seconds.values())


def _seconds(name: str, value: Any) -> float:
    return check_number(name, value, 0, float("inf"), open_low=True)


def _quoted(path: Path) -> str:
    import shlex

    return shlex.quote(str(path))
