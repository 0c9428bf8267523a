"""`Sweep`: a population over many devices and hosts, that survives what happens to them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from gradhpo.cluster import (
    claim,
    executors,
    importing,
    manifest,
    settings,
    warm_start,
)
from gradhpo.cluster.display import Display
from gradhpo.cluster.division import divide
from gradhpo.cluster.event_log import EventLog
from gradhpo.cluster.events import Callback, Event, Importing, Note, Observer, Telling
from gradhpo.cluster.objectives import Metric
from gradhpo.cluster.orders import Spec
from gradhpo.cluster.result import Report, SweepResult, spec_of
from gradhpo.cluster.running import Run
from gradhpo.cluster.samplers import Sampler
from gradhpo.cluster.schedulers import Scheduler
from gradhpo.cluster.settings import Identity, Place
from gradhpo.cluster.space import SearchSpace
from gradhpo.cluster.storage import Storage
from gradhpo.files import Unreachable, Where
from gradhpo.observers.telling import ended
from gradhpo.timetable import EpisodeInit
from gradhpo.watch import Stop


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
        their combinations, at first where these race.
      generations: how many. A larger number than before extends a sweep that is done.
      steps_per_generation: steps that a trial takes in one.
      storage: a folder for all that must last, seen by all workers under this path ("~" and
        `file:///…` are understood), or the address of an object store, such as
        "s3://bucket/run".
      scheduler: `PBT`, `PB2`, `SuccessiveHalving`, `ASHA`, `RandomSearch`, or any function of
        `(table, space, rng)`; see `schedulers`.
      metric: what is compared: one of the five metrics of a step, or a name of `Problem.metrics`.
        Or several objectives, `["val_loss", "size"]` or `{"val_loss": "min", "accuracy": "max"}`:
        schedulers then see non-dominated fronts, and the result has a `front` in place of `best`.
      mode: "min" or "max", of one metric or of a list.
      seed: decides all randomness, from 0 to 2³² - 1.
      shards: into how many the population is divided; by default the smallest number that fits
        `workers` and the choices. Part of what the numbers depend on.
      batching: the layout of a shard's slots, see `Population`. "auto" is measured once, and kept
        in the storage.
      mesh: `{"trial": a, "data": b}`: the devices of a worker, over which slots and batches are
        divided; and others by name, over which `rules` divide arrays.
      data: arrays for the problem's function, handed out once for each node: a pytree of NumPy
        arrays, or a reference to a function that returns one.
      episode_length: as in `solve`: steps after which a trial's weights start anew from its φ,
        moved by Reptile; None for one long episode.
      lr_reptile: Reptile step size, with `episode_length`.
      episode_init: as in `solve`: where an episode starts, "reptile" or "fresh".
      lr_schedule: a traceable function of the trial's step, counted from 0, or a reference to one:
        a factor on the space's `lr_hyper`.
      record: keep the metrics of every n-th step of a generation, not of its last step alone:
        `SweepResult.curves`.
      validation: a function that gives the whole validation set as one batch of the validation
        loss, from `Problem.data` (without arguments where there is none), or a reference to one:
        its loss is measured after every generation, as "validation_loss", which `metric` may name.
      sampler: what draws new trials in place of the space: `OptunaSampler("TPESampler")`, or any
        object with `ask(space, history, rng, n)`; see `samplers`.
      points: what the first trials begin with: dictionaries of settings and choices, or trials of
        another sweep, such as its `front`; see `points_from`. What a point leaves out is drawn.
      first_seed: decides the draws of the first generation in place of `seed`.
      rules: for trials that are larger than a device: which arrays of a trial's state are divided
        over which axes of the mesh, by regular expressions of their paths; see
        `gradhpo.parallel.by_path`. `{"": "data"}` divides all that can be.
      workers: how many processes (or gangs of them) hold shards, at most.
      resources: of each process: `num_cpus`, `num_gpus`, `memory`, or any of Ray's by name.
      processes: of each worker; several are one JAX job that holds one shard together.
      executor: "ray"; "processes": plain processes of this machine, on its processors, for which
        the problem and the optimizer must be references or picklable; "local": in this process;
        "auto": "ray" where it is installed, else "local".
      address: of a Ray cluster to join, or "auto"; by default `RAY_ADDRESS`, and without that a
        Ray of this machine only, started here and stopped again.
      env: environment variables of the workers. They stand in the storage's manifest: no secrets.
      runtime_env: more of Ray's runtime environment, such as `working_dir` or `pip`; in the
        manifest, too.
      deadline: seconds after which a worker that has not finished a shard's generation is replaced;
        None, by default, for no such limit: a worker may be as slow as it likes while it lives.
      start_deadline: the same for starting, and for compiling a variant.
      heartbeat: seconds after which a worker that gives no sign of life is replaced: every process
        gives them from beside its work, unless it is dead, stopped, or keeps the interpreter to
        itself for so long.
      wait: seconds to wait for resources that the cluster does not have yet, with an autoscaler.
      placement: how Ray places the processes of a worker: "PACK", "SPREAD", "STRICT_PACK" or
        "STRICT_SPREAD".
      checkpoint_every: generations from one checkpoint to the next: after a failure at most so many
        are computed again, and the one that was in flight. Tables are written after every one.
      stop: a `gradhpo.Stop(patience=…, target=…, seconds=…)`: when to end after a generation that
        is not the last one. A storage does not remember it; what is computed does not depend on it.
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
        storage: Where,
        scheduler: Scheduler | None = None,
        metric: Metric | Sequence[str] = "val_loss",
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
        record: int | None = None,
        validation: Any = None,
        sampler: Sampler | None = None,
        points: Sequence[Any] | None = None,
        first_seed: int | None = None,
        rules: Mapping[str, Any] | None = None,
        *,
        workers: int = 1,
        resources: Mapping[str, float] | None = None,
        processes: int = 1,
        executor: Literal["auto", "local", "processes", "ray"] = "auto",
        address: str | None = None,
        env: Mapping[str, str] | None = None,
        runtime_env: Mapping[str, Any] | None = None,
        deadline: float | None = None,
        start_deadline: float = 600,
        heartbeat: float = 60,
        wait: float = 0,
        placement: str = "PACK",
        checkpoint_every: int = 1,
        stop: Stop | None = None,
        progress: bool | None = None,
    ) -> None:
        self.identity = Identity(
            problem=problem, optimizer=optimizer, space=space, population=population,
            steps_per_generation=steps_per_generation, scheduler=scheduler,  # pyright: ignore
            metric=metric, mode=mode,  # pyright: ignore
            seed=seed, shards=shards, batching=batching, mesh=mesh,
            data=data, episode_length=episode_length, lr_reptile=lr_reptile,
            episode_init=episode_init, lr_schedule=lr_schedule, record=record,
            validation=validation, sampler=sampler, points=points, first_seed=first_seed,
            rules=rules,
        )  # fmt: skip
        self.place = Place(
            storage=storage,  # pyright: ignore[reportArgumentType]
            generations=generations, workers=workers, resources=resources, processes=processes,
            executor=executor, address=address, env=env, runtime_env=runtime_env,
            deadline=deadline, start_deadline=start_deadline, heartbeat=heartbeat, wait=wait,
            placement=placement, checkpoint_every=checkpoint_every, stop=stop, progress=progress,
        )  # fmt: skip
        settings.check_together(self.identity, self.place)
        self._asked, self._seen = self.identity, False
        self._divide()
        sent = {"problem": problem, "optimizer": optimizer}
        sent |= {"lr_schedule": lr_schedule, "validation": validation}
        processes_of = self.place.for_processes(self.layout.shards)
        executors.check(executor, processes_of, sent, self.storage)
        self._folders, self._foreign = importing.folders(), False
        self.events: list[Event] = []
        """What happened in `run`, but for generations: workers lost, programs prepared, …"""

    def _divide(self, needed: bool = False) -> None:
        """Divide the population into shards, as the sweep is that the storage has.

        A storage that is not reached while a sweep is only described is asked when it is `needed`.
        """
        known, points = None, self._asked.points
        try:
            known = claim.shards(self.storage, self._asked.population)
            points = claim.begun_with(self.storage, points) or points
            self._seen = True
        except (Unreachable, ImportError):  # of the package that talks to it
            if needed:
                raise
        self.layout = divide(self._asked, self.place.workers, known)
        decided = {"shards": self.layout.shards, "points": points}
        self.identity = dataclasses.replace(self._asked, **decided)

    def __getattr__(self, name: str) -> Any:
        """Say where a setting is that was an attribute of its own up to version 0.2."""
        raise AttributeError(settings.moved(name) or f"'Sweep' object has no attribute {name!r}")

    @property
    def storage(self) -> Where:
        """Where all is that lasts: a folder's path, or an address."""
        return self.place.storage

    @property
    def generations(self) -> int:
        """How many, in all."""
        return self.place.generations

    @classmethod
    def from_toml(cls, path: str | Path, **changes: Any) -> Sweep:
        """Return the sweep that a TOML file describes, by the names of the arguments above.

        `space` and `scheduler` are tables: `[space.hyperparams]`, `scheduler = {name = "PBT"}`.

        Raises:
          ValueError: for what is not TOML, or an unknown or missing name.
          OSError: if the file cannot be read.
        """
        given = settings.of_toml(path) | changes
        made = cls(**settings.read(warm_start.settled(given), str(path)))
        made._load_searchers()
        return made

    @classmethod
    def from_storage(cls, storage: Where, **changes: Any) -> Sweep:
        """Return the sweep that a storage holds, to resume it; `run` imports what it names.

        Raises:
          SweepError: if there is none, or it was made from objects of a program, which only that
            program can make again.
        """
        storage = settings.folder_of(storage)
        known = manifest.of_references(storage)
        if known["x64"] != manifest.x64():
            jax.config.update("jax_enable_x64", known["x64"])
        given = manifest.settings(known) | {"storage": str(storage)} | changes
        made = cls(**settings.read(given, str(storage)))
        made._folders = tuple(dict.fromkeys([*known["sys_path"], *made._folders]))
        made._foreign = True
        return made

    def run(
        self,
        callback: Callable[[int, dict[str, np.ndarray]], Any] | None = None,
        *,
        observers: Iterable[Observer] = (),
        allow_changed: Collection[str] = (),
    ) -> SweepResult:
        """Run to the end, or go on where an earlier run of this very sweep stopped.

        Shows a progress bar on a terminal (with tqdm), and a line every few seconds elsewhere.
        Ctrl-C, or a SIGTERM, lets the generation in flight finish, saves it, and says how to go
        on; a second one does not wait.

        Args:
          callback: called as `callback(generation, table)` after each generation that this run
            computes, counted from 1, when it is saved; each column of the table is
            `(population,)`. What it raises ends the run.
          observers: told of every event, see `events` and `gradhpo.observers`. If one raises an
            error, that is told, once, and the sweep goes on.
          allow_changed: of "data", "code" and "mesh" (with `rules`): what may be other than when
            the sweep began. It is written down with the generation, see `SweepResult.changes`.

        Raises:
          SweepError: if the storage holds another run, or the sweep cannot go on; with the
            worker's own traceback where one failed.
          StorageInUse: if another driver holds the storage, or has taken over an object store.
          ValueError: for an unknown name in `allow_changed`.
          OSError: if the storage cannot be written.
        """
        claim.check_allowed(allow_changed)
        if not self._seen:
            self._divide(needed=True)
        claim.open_folder(self.storage)
        self.events = []
        telling = Telling(self.events)
        steps = self.identity.population * self.identity.steps_per_generation
        shown = (str(self.storage), self.generations, steps, self.identity.objectives)
        with Display(self.place.progress, *shown) as display:
            telling.to(display)
            lock = Storage(self.storage).lock(lambda text: telling.tell(Note(text)))
            try:
                telling.to(EventLog(self.storage), *observers)
                if callback is not None:
                    telling.to(Callback(callback), strict=True)
                if (before := lock.took_over) is not None:
                    telling.tell(Note(f"taken over from {before}, which had not let go"))
                with ended(telling):
                    report = self._run(telling, allow_changed)
                return self._result(report)
            finally:
                lock.release()

    def result(self) -> SweepResult:
        """Return what is done so far, from the storage; nothing runs, and nothing is imported."""
        if not self._seen:
            self._divide(needed=True)
        return self._result(None)

    def how_to_resume(self) -> str:
        """Return the sentence that says how to go on."""
        return manifest.how_to_resume(self.storage, self.identity)

    def _run(self, telling: Telling, allowed: Collection[str]) -> Report | None:
        began = time.perf_counter()
        if self._foreign:
            telling.tell(Importing(self.identity.references(), self._folders))
        self._load_searchers()
        data = self._load_data()
        about = manifest.describe(self.identity, self.place, data, self._folders)
        renamed = claim.claim(self.storage, about, allowed, telling.tell)
        made = Run(self.identity, self.place, self.layout, self._spec(), telling, began)
        return made.go(data, allowed, renamed, about, self.how_to_resume)

    def _result(self, made: Report | None) -> SweepResult:
        about = (self.layout, self.identity.objectives)
        return SweepResult(self.storage, self._spec(), *about, self._load_data, made)

    def _spec(self) -> Spec:
        return spec_of(self.identity, self.storage, self.layout, self._folders, manifest.x64())

    def _load_searchers(self) -> None:
        importing.extend_path(self._folders)
        self.identity = self.identity.loaded()

    def _load_data(self) -> Any:
        return self.identity.arrays(self._folders)
