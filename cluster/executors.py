"""Where a sweep's shards run: a `Fleet` decides, `Processes` of some kind obey."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from gradhpo.checkpoints import Saved
from gradhpo.cluster import events, local_processes
from gradhpo.cluster.commands import (
    Again,
    Answered,
    Command,
    Done,
    Event,
    Fail,
    Job,
    Kill,
    Own,
    Room,
    Send,
    Start,
)
from gradhpo.cluster.compile_progress import CompileProgress
from gradhpo.cluster.events import Tell
from gradhpo.cluster.executor import Executor
from gradhpo.cluster.failures import StorageFailed, SweepError, WorkerFailed
from gradhpo.cluster.fleet import Fleet, NoWorker
from gradhpo.cluster.incarnations import Incarnations
from gradhpo.cluster.local_ray import has_ray
from gradhpo.cluster.orders import Order, Prepared, Result, Spec
from gradhpo.cluster.processes import Processes, ProcessSettings, log_file
from gradhpo.cluster.this_process import ThisProcess
from gradhpo.files import Where

ROOM_EVERY = 1.0
"""Seconds between two looks at how many workers could be held."""
WHAT = {
    "start": "could not start",
    "trace": "failed to trace the sweep's step",
    "begin": "failed to compile the sweep's step",
    "prepare": "failed to compile the sweep's step",
    "forget": "failed to let programs go",
    "export": "failed to hand over trials",
    "run": "failed to run a generation",
    "checkpoint": "failed to write a checkpoint",
}


@dataclasses.dataclass(eq=False)
class _Run:
    """A run job's order, and the rows that others exported for it."""

    order: Order
    sources: list[int] = dataclasses.field(default_factory=list[int])
    rows: list[Any] = dataclasses.field(default_factory=list[Any])


class FleetExecutor(Executor):
    """The one loop: what a fleet commands is carried out, and what happens is told to it.

    A worker that dies, falls silent or misses its deadline is given up: it is killed, its shards
    get a new incarnation on another worker, and that reads the last checkpoint.
    """

    def __init__(
        self,
        processes: Processes,
        incarnations: Incarnations,
        storage: str,
        shards: int,
        settings: ProcessSettings,
        tell: Tell,
        combinations: Sequence[Mapping[str, Any]],
    ) -> None:
        self._processes, self._incarnations, self._tell = processes, incarnations, tell
        self._storage, self._settings = storage, settings
        self._fleet = Fleet(settings, shards, incarnations.new)
        self._layouts: dict[int, Any] = {}
        self._blobs: dict[int, Any] = {}
        self._runs: dict[Job, _Run] = {}
        self._exports: dict[Job, tuple[Any, ...]] = {}
        self._sent: dict[int, Job] = {}
        self._about: dict[int, tuple[Mapping[str, Any], ...]] = {}
        """By worker, who its processes are."""
        self._compiles: dict[tuple[int, int], int] = {}
        """By worker and process, how many programs XLA compiled there."""
        self._room_looked = float("-inf")
        self._combinations = combinations
        self._progress: CompileProgress | None = None

    def prepare(self, layouts: Mapping[int, Any], needed: Sequence[int]) -> list[Prepared]:
        """Compile each variant on one worker; others trace it meanwhile, and load it later."""
        self._layouts = dict(layouts)
        self._progress = CompileProgress(self._combinations, needed, self._tell)
        done = self._drive([Job("prepare", variant) for variant in needed])
        self._progress = None
        return [self._shared(done[Job("prepare", variant)]) for variant in needed]

    def run(self, orders: list[Order]) -> list[Result]:
        """Execute on the workers that are there now."""
        variants = {order.shard: order.variant for order in orders}
        self._runs = {_job("run", order): _Run(order) for order in orders}
        runs = {job.shard: run for job, run in self._runs.items()}
        # A state that is in no checkpoint stays where it is.
        movable = all(order.start is not None or order.generation == 0 for order in orders)
        ended = self._ended(orders)
        self._exports = {}
        for order in orders:
            for source, items in order.by_source().items():
                about = (source, variants[source], order.generation - 1, items[0].checkpoint)
                taken = [item.source_slot for item in items]
                self._exports[Job("export", variants[source], source, order.shard)] = *about, taken
        for job, rows in self._drive(self._exports, balance=movable, ended=ended).items():
            runs[job.target].sources.append(job.shard)
            runs[job.target].rows.append(rows)
        done = self._drive(self._runs, balance=movable)
        self._runs, self._exports = {}, {}
        return [done[job] for job in sorted(done, key=lambda job: job.shard)]

    def _ended(self, orders: list[Order]) -> set[int]:
        """Return the combinations that nobody runs any more; what others would load of them goes.

        One that ended now is still needed: its last states may hold trials that are kept.
        """
        needed = {order.variant for order in orders}
        needed |= {order.before for order in orders if order.before is not None}
        ended = set(range(len(self._combinations))) - needed
        for variant in ended:
            self._blobs.pop(variant, None)
        return ended

    def checkpoints(self, orders: list[Order]) -> list[Saved]:
        """Wait for the workers that ran them."""
        done = self._drive([_job("checkpoint", order) for order in orders], balance=False)
        return [done[_job("checkpoint", order)] for order in orders]

    def moves(self) -> bool:
        """Whether a worker that has started since has no shard, or too few."""
        for command in self._look(0):
            self._carry_out(command, {})
        return self._fleet.uneven

    def close(self) -> None:
        """End all workers."""
        self._processes.close()

    def xla_compiles(self) -> list[int]:
        """Return for each worker that is there how many programs XLA compiled in it."""
        counted = dict.fromkeys(self._fleet.ready, 0)
        for (worker, _), count in self._compiles.items():
            if worker in counted:
                counted[worker] += count
        return list(counted.values())

    # --- the loop -------------------------------------------------------------------------------

    def _drive(
        self, jobs: Iterable[Job], balance: bool = True, ended: Collection[int] = ()
    ) -> dict[Job, Any]:
        """Have every job done once; return what each gave."""
        self._sent, done = {}, dict[Job, Any]()
        timeout = min(0.5, self._fleet.longest_look / 2)
        commands = self._fleet.ask(
            time.monotonic(), jobs, *self._room(), balance=balance, ended=ended
        )
        while True:
            for command in commands:
                self._carry_out(command, done)
            if self._fleet.complete:
                return done
            if self._progress is not None:
                self._progress.still()
            commands = self._look(timeout)

    def _look(self, timeout: float) -> list[Command]:
        """Wait for what happens, and return what to do."""
        happened = self._processes.poll(timeout)
        for event in happened:
            self._note(event)
        return self._fleet.step(time.monotonic(), *happened, *self._room())

    def _room(self) -> Sequence[Room]:
        """Look from time to time how many workers could be held."""
        now = time.monotonic()
        if now - self._room_looked < ROOM_EVERY:
            return ()
        self._room_looked = now
        return (Room(self._processes.room()),)

    def _note(self, event: Event) -> None:
        if isinstance(event, Answered):
            self._compiles[event.worker, event.rank] = event.compiles
        elif isinstance(event, Again):  # its rows went with their node: the checkpoint has them
            run = self._runs.get(self._sent.get(event.call, Job("unknown")))
            if run is not None:
                run.sources, run.rows = [], []

    def _carry_out(self, command: Command, done: dict[Job, Any]) -> None:
        match command:
            case Start(worker, call):
                self._processes.start(worker, call)
            case Own(owners):
                self._incarnations.own(dict(owners))
            case Send(worker, call, job):
                self._sent[call] = job
                if self._progress is not None and job.kind in ("begin", "prepare"):
                    self._progress.begin(job.variant)
                self._processes.send(worker, call, job.kind, self._arguments(worker, job))
            case Kill():
                self._end(command)
            case Done():
                self._take(command)
                if command.asked:
                    done[command.job] = command.values[0]
            case Fail():
                self._raise(command)

    def _arguments(self, worker: int, job: Job) -> tuple[Any, ...]:
        if job.kind in ("trace", "begin"):
            return job.variant, self._layouts[job.variant]
        if job.kind == "prepare":
            return job.variant, self._layouts[job.variant], self._blobs.get(job.variant)
        if job.kind == "export":
            return self._exports[job]
        if job.kind == "checkpoint":
            return job.shard, job.generation
        if job.kind == "forget":
            return (job.variant,)
        run = self._runs[job]
        return run.order, worker, run.sources, *run.rows

    def _take(self, done: Done) -> None:
        """Tell what a worker did that a person may want to know."""
        if done.job.kind == "prepare":
            prepared: Prepared = done.values[0]
            told = self._progress and self._progress.end(prepared.variant)
            self._tell(events.Prepared.of(prepared, told))
        elif done.job.kind == "start":
            self._about[done.worker] = done.values
            for about in done.values:
                facts: dict[str, Any] = {**self._log(done.worker), **about}
                self._tell(events.WorkerReady(done.worker, **facts))

    def _shared(self, prepared: Prepared) -> Prepared:
        """Put a variant's programs where all workers can read them."""
        if prepared.blobs is not None:
            self._blobs[prepared.variant] = self._processes.share(prepared.blobs)
        self._layouts[prepared.variant] = prepared.batching
        return prepared._replace(blobs=None)

    # --- losses and errors ----------------------------------------------------------------------

    def _end(self, kill: Kill) -> None:
        if kill.lost:
            who = [f"{a['host']}:{a['pid']}" for a in self._about.get(kill.worker, ())]
            log = self._log(kill.worker)
            self._tell(events.WorkerLost(kill.reason, kill.worker, who, **log))
        self._processes.kill(kill.worker)

    def _log(self, worker: int) -> dict[str, str]:
        """Return where a worker's prints are, if it made any such file."""
        log = log_file(self._storage, worker, 0, self._settings.processes)
        elsewhere = any("log" in about for about in self._about.get(worker, ()))
        return {"log": str(log)} if elsewhere or log.exists() else {}

    def _raise(self, fail: Fail) -> None:
        """Raise what a fleet ended with, saying where: the storage, and the worker's log."""
        error, log = fail.error, {} if fail.worker is None else self._log(fail.worker)
        where = f"The storage: {self._storage}"
        where += f"\nWhat the worker printed: {log['log']}" if log else ""
        if isinstance(error, StorageFailed):
            text = f"cannot write to the storage {self._storage}: {error}"
            raise SweepError(text) from error
        if isinstance(error, NoWorker):
            raise SweepError(f"{error}: {self._processes.shortage()}\n{where}")
        if isinstance(error, WorkerFailed):
            what = WHAT[fail.job.kind if fail.job else "run"]
            trace = ["The worker's own traceback, its end:", *error.frames] if error.frames else []
            raise SweepError("\n".join([f"a worker {what}: {error}", where, *trace]))
        if isinstance(error, SweepError):
            raise SweepError(f"{error}\n{where}")
        raise error


def _job(kind: str, order: Order) -> Job:
    return Job(kind, order.variant, order.shard, generation=order.generation)


def _resolved(kind: str) -> str:
    return ("ray" if has_ray() else "local") if kind == "auto" else kind


def check(kind: str, settings: ProcessSettings, sent: Mapping[str, Any], storage: Where) -> None:
    """Raise unless an executor of this kind can run a sweep that sends these things to workers.

    Raises:
      ImportError, TypeError, ValueError: naming the argument.
    """
    kind = _resolved(kind)
    if kind == "ray" and not has_ray():
        raise ImportError("executor=\"ray\" needs Ray: pip install 'gradhpo[cluster]'")
    if kind != "local" and str(storage).startswith("memory:"):
        raise ValueError(
            f"storage {str(storage)!r} lives in this process, and dies with it: it needs "
            f'executor="local", got {kind!r}'
        )
    if kind in ("local", "processes") and settings.processes > 1:
        raise ValueError(f'processes is for Ray; executor="{kind}" has one in a worker')
    if kind == "processes":
        local_processes.check_settings(settings)
        local_processes.check_sendable(sent)


def open_executor(
    kind: str,
    spec: Spec,
    data: Any,
    shards: int,
    settings: ProcessSettings,
    tell: Tell,
) -> FleetExecutor:
    """Return the executor of this kind: "auto" is "ray" where it is installed, else "local"."""
    incarnations = Incarnations(spec.storage)
    kind = _resolved(kind)
    if kind == "local":
        settings = dataclasses.replace(settings, workers=1)
    spec = dataclasses.replace(spec, states=-(-shards // settings.workers))
    processes = _processes(kind, spec, data, settings)
    about = (spec.storage, shards, settings, tell, spec.space.variants())
    return FleetExecutor(processes, incarnations, *about)


def _processes(kind: str, spec: Spec, data: Any, settings: ProcessSettings) -> Processes:
    if kind == "local":
        return ThisProcess(spec, data)
    if kind == "processes":
        return local_processes.LocalProcesses(spec, data, settings)
    from gradhpo.cluster.ray_processes import RayProcesses

    return RayProcesses(spec, data, settings)
