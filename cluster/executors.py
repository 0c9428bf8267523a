"""Where shards run: in this process, or in Ray actors; both behind `Executor`."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import importlib.util
import math
import os
import re
import signal
import socket
import time
import warnings
from collections.abc import Callable, Generator, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gradhpo.checkpoints import DamagedFile, Saved
from gradhpo.cluster.failures import StateGone, StorageFailed, Superseded, SweepError
from gradhpo.cluster.incarnations import Incarnations
from gradhpo.cluster.orders import Order, Prepared, Result, Spec
from gradhpo.cluster.shard import ShardHost
from gradhpo.cluster.worker import Worker, environment

Notify = Callable[..., None]
"""Called as `notify(event, **facts)` with what a person may want to know."""


QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
"""For `ray.init`: what workers print stays in Ray's log files."""


class Executor(abc.ABC):
    """Executes orders, somewhere. The numbers do not depend on where."""

    @abc.abstractmethod
    def prepare(self, layouts: Mapping[int, Any]) -> list[Prepared]:
        """Compile each variant's programs once; `layouts` gives its `batching`."""

    @abc.abstractmethod
    def run(self, orders: list[Order]) -> list[Result]:
        """Execute a generation: every order once. Lost workers are replaced meanwhile.

        Raises:
          DamagedFile: if a checkpoint that an order starts from is damaged.
          StateGone: if the state that an order starts from was lost, and it names no checkpoint.
          SweepError: if it cannot be done, with a worker's own traceback.
        """

    @abc.abstractmethod
    def checkpoints(self, orders: list[Order]) -> list[Saved]:
        """Return the checkpoints after these orders, the last that were run, when all are durable.

        They are written now where an order did not say so.

        Raises:
          StateGone: if a worker was lost that held one.
          SweepError: if they cannot be written.
        """

    def moves(self) -> bool:
        """Whether shards would change workers if orders named the checkpoints they start from."""
        return False

    @abc.abstractmethod
    def close(self) -> None:
        """Leave no process behind."""


class LocalExecutor(Executor):
    """All shards in this process, one after another."""

    def __init__(self, spec: Spec, data: Any, incarnations: Incarnations, shards: int) -> None:
        self._host = ShardHost(dataclasses.replace(spec, states=shards), data)
        self._incarnation = incarnations.new()
        incarnations.own(dict.fromkeys(range(shards), self._incarnation))

    def prepare(self, layouts: Mapping[int, Any]) -> list[Prepared]:
        """Compile here."""
        return [self._host.prepare(variant, layout) for variant, layout in layouts.items()]

    def run(self, orders: list[Order]) -> list[Result]:
        """Execute here."""
        variants = {order.shard: order.variant for order in orders}
        rows: dict[int, dict[int, Any]] = {}
        for order in orders:
            rows[order.shard] = {}
            for source, items in order.by_source().items():
                about = (variants[source], order.generation - 1, items[0].checkpoint)
                taken = [item.source_slot for item in items]
                rows[order.shard][source] = self._host.export(source, *about, taken)
        with _storage_failures():
            return [self._host.run(o, self._incarnation, rows[o.shard]) for o in orders]

    def checkpoints(self, orders: list[Order]) -> list[Saved]:
        """Wait here."""
        with _storage_failures():
            return [self._host.checkpoint(order.shard, order.generation) for order in orders]

    def close(self) -> None:
        """Finish what is being written."""
        self._host.close()


@contextlib.contextmanager
def _storage_failures() -> Generator[None]:
    try:
        yield
    except StorageFailed as error:
        raise SweepError(f"cannot write to the storage: {error}") from error


@dataclasses.dataclass(eq=False)
class Gang:
    """A worker: one actor, or several processes that hold one shard together."""

    incarnation: int
    actors: list[Any]
    group: Any = None
    starting: list[Any] = dataclasses.field(default_factory=list[Any])
    """What the actors' `start` will return; empty when it did."""
    started: float = dataclasses.field(default_factory=time.monotonic)
    about: list[dict[str, Any]] = dataclasses.field(default_factory=list[dict[str, Any]])
    """Who its processes are."""
    variants: set[int] = dataclasses.field(default_factory=set[int])
    """Those whose programs it has."""
    progress: float = 0.0
    """When it last finished something, or was given something while idle."""
    flying: dict[Any, Job] = dataclasses.field(default_factory=dict[Any, "Job"])
    """Calls under way, by what the first actor's will return."""
    others: dict[Any, list[Any]] = dataclasses.field(default_factory=dict[Any, list[Any]])
    """What the same call's other actors will return."""


@dataclasses.dataclass(eq=False)
class Job:
    """Something that some worker must do, once."""

    kind: str
    """ "prepare", "export", "run" or "checkpoint"."""
    variant: int
    arguments: tuple[Any, ...]
    shard: int | None = None
    sources: list[int] = dataclasses.field(default_factory=list[int])
    """Of a run: the shards whose rows are in `exported`."""
    exported: list[Any] = dataclasses.field(default_factory=list[Any])
    generation: int = -1

    @property
    def name(self) -> tuple[Any, ...]:
        """What it is lost as: going back and losing it again is losing the same."""
        return self.kind, self.variant, self.shard, self.generation


@dataclasses.dataclass(frozen=True)
class RaySettings:
    """How a sweep uses Ray; see `Sweep`."""

    workers: int
    resources: Mapping[str, float]
    processes: int
    env: Mapping[str, str]
    runtime_env: Mapping[str, Any]
    address: str | None
    deadline: float | None
    start_deadline: float
    wait: float
    placement: str
    most_losses: int = 5
    """How often in a row workers may be lost on the same job, or while they start."""


class RayExecutor(Executor):
    """Shards in Ray actors. Joins a running cluster, or starts one on this machine.

    A worker that dies or misses its deadline is given up: it is killed, its shards get a new
    incarnation on another worker, and that reads the last checkpoint.
    """

    def __init__(
        self,
        spec: Spec,
        data: Any,
        incarnations: Incarnations,
        shards: int,
        settings: RaySettings,
        notify: Notify,
    ) -> None:
        self._settings, self._incarnations, self._notify = settings, incarnations, notify
        self._shards, self._owner = shards, dict[int, Gang]()
        self._spec = dataclasses.replace(spec, states=-(-shards // settings.workers))
        self._gangs: list[Gang] = []
        self._blobs: dict[int, Any] = {}
        self._layouts: dict[int, Any] = {}
        self._slowest = 0.0
        self._losses: dict[Any, int] = {}
        """By what was lost: how often in a row."""
        self._own_cluster = False
        self._ray = ray = self._connect()
        try:
            self._check_resources()
            self._data = ray.put(data)
            self._actor: Any = ray.remote(Worker)
            self._refresh()
        except BaseException:
            self.close()
            raise

    def prepare(self, layouts: Mapping[int, Any]) -> list[Prepared]:
        """Compile each variant on one worker; the others load it when they first need it."""
        self._layouts = dict(layouts)
        self._await_workers()
        made: dict[int, Prepared] = {}
        jobs = [Job("prepare", v, (v, layout, None)) for v, layout in layouts.items()]
        for job, value in self._drive(jobs):
            made[job.variant] = self._share(value)
        return [made[variant] for variant in layouts]

    def run(self, orders: list[Order]) -> list[Result]:
        """Execute on the workers that are there now."""
        self._refresh()
        # A state that is in no checkpoint stays where it is.
        movable = all(order.start is not None or order.generation == 0 for order in orders)
        self._balance([order.shard for order in orders], movable)
        variants = {order.shard: order.variant for order in orders}
        runs = {
            o.shard: Job("run", o.variant, (o,), o.shard, generation=o.generation) for o in orders
        }
        exports: dict[Job, Job] = {}
        for order in orders:
            for source, items in order.by_source().items():
                about = (source, variants[source], order.generation - 1, items[0].checkpoint)
                taken = [item.source_slot for item in items]
                job = Job("export", variants[source], (*about, taken), source)
                exports[job] = runs[order.shard]
        for job, rows in self._drive(list(exports)):
            assert job.shard is not None
            exports[job].sources.append(job.shard)
            exports[job].exported.append(rows)
        return sorted((value for _, value in self._drive(list(runs.values()))), key=_shard_of)

    def checkpoints(self, orders: list[Order]) -> list[Saved]:
        """Wait for the workers that ran them."""
        jobs = [
            Job("checkpoint", o.variant, (o.shard, o.generation), o.shard, generation=o.generation)
            for o in orders
        ]
        saved = {job.shard: value for job, value in self._drive(jobs)}
        return [saved[order.shard] for order in orders]

    def moves(self) -> bool:
        """Whether a worker that has started since has no shard, or too few."""
        self._refresh()
        shards = [shard for shard, gang in self._owner.items() if gang in self._gangs]
        return any(self._owner[s] is not gang for s, gang in self._balanced(shards).items())

    def close(self) -> None:
        """Kill the workers, and the cluster if it was started here."""
        for gang in self._gangs:
            self._kill(gang)
        self._gangs = []
        if self._settings.wait > 0:
            with contextlib.suppress(Exception):
                self._request(0)
        if self._own_cluster:
            self._ray.shutdown()
            self._own_cluster = False

    def pids(self) -> list[int]:
        """Return the process ids of the workers that are there, gangs in order."""
        return [about["pid"] for gang in self._gangs for about in gang.about]

    def xla_compiles(self) -> list[int]:
        """Return for each worker that is there how many programs XLA compiled in it."""
        asked = [[actor.xla_compiles.remote() for actor in gang.actors] for gang in self._ready()]
        made: list[int] = []
        for refs in asked:
            with contextlib.suppress(self._ray.exceptions.RayError):  # it died after its work
                made.append(sum(self._ray.get(refs, timeout=10)))
        return made

    # --- workers --------------------------------------------------------------------------------

    def _connect(self) -> Any:
        address = self._settings.address or os.environ.get("RAY_ADDRESS")
        if address:
            import ray

            if not ray.is_initialized():
                ray.init(address=address, **QUIET)
            return ray
        cpus = self._settings.workers * self._settings.processes
        cpus *= self._settings.resources.get("num_cpus", 1)
        self._own_cluster = _start_local_ray(cpus)
        import ray

        return ray

    def _check_resources(self) -> None:
        """Raise if the cluster could never hold a worker, all of its processes."""
        if self._settings.wait > 0:  # an autoscaler shall know what is wanted
            self._request(self._settings.workers * self._settings.processes)
        deadline = time.monotonic() + self._settings.wait
        while True:
            nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
            if sum(_fits(node, self._demand()) for node in nodes) >= self._settings.processes:
                return
            if time.monotonic() >= deadline:
                break
            time.sleep(0.5)
        has = [{k: v for k, v in n.items() if _is_resource(k)} for n in nodes]
        several = f" {self._settings.processes} times" if self._settings.processes > 1 else ""
        raise SweepError(
            f"resources={dict(self._settings.resources)}: no node of the cluster has as "
            f"much{several}; its nodes have {has}. Ask for less, or give wait= seconds if nodes "
            "are still to come"
        )

    def _request(self, processes: int) -> None:
        from ray.autoscaler.sdk import request_resources

        request_resources(bundles=[self._demand()] * processes)

    def _demand(self) -> dict[str, float]:
        names = {"num_cpus": "CPU", "num_gpus": "GPU"}
        demand = {names.get(name, name): n for name, n in self._settings.resources.items()}
        return {"CPU": 1, **demand}

    def _capacity(self) -> int:
        """Return how many workers the cluster's nodes can hold, were they empty."""
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        return sum(_fits(node, self._demand()) for node in nodes) // self._settings.processes

    def _refresh(self) -> None:
        """Take in workers that have started, and start those that are missing."""
        for gang in [gang for gang in self._gangs if gang.starting]:
            self._take_in(gang)
        wanted = self._settings.workers
        if self._settings.wait == 0:  # nothing will grow: more would wait for ever
            wanted = min(wanted, max(1, self._capacity()))
        while len(self._gangs) < wanted:
            self._gangs.append(self._launch())

    def _launch(self) -> Gang:
        settings = self._settings
        env = environment(settings.resources, settings.env)
        runtime_env = dict(settings.runtime_env)
        runtime_env["env_vars"] = {**env, **runtime_env.get("env_vars", {})}
        resources = {k: v for k, v in settings.resources.items() if not k.startswith("num_")}
        options: dict[str, Any] = {
            "num_cpus": settings.resources.get("num_cpus", 1),
            "num_gpus": settings.resources.get("num_gpus", 0),
            "resources": {k: v for k, v in resources.items() if k != "memory"},
            "max_restarts": 0,
            "runtime_env": runtime_env,
        }
        if "memory" in resources:
            options["memory"] = resources["memory"]
        gang = Gang(self._incarnations.new(), [])
        if settings.processes == 1:
            gang.actors = [self._actor.options(**options).remote()]
            gang.starting = [gang.actors[0].start.remote(self._spec, self._data, None)]
            return gang
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        gang.group = placement_group([self._demand()] * settings.processes, settings.placement)
        for rank in range(settings.processes):
            where = PlacementGroupSchedulingStrategy(gang.group, rank)
            actor = self._actor.options(**options, scheduling_strategy=where).remote()
            gang.actors.append(actor)
        gang.starting = [gang.actors[0].address.remote()]
        return gang

    def _take_in(self, gang: Gang, timeout: float = 0) -> None:
        """See whether a worker has started; give up one that failed or takes too long."""
        ray = self._ray
        if gang not in self._gangs:
            return
        done, _ = ray.wait(gang.starting, num_returns=len(gang.starting), timeout=timeout)
        if len(done) < len(gang.starting):
            if time.monotonic() - gang.started > self._settings.start_deadline:
                reason = f"did not start in {self._settings.start_deadline:g} s"
                self._count_loss("start", "while they started", reason)
                self._lose(gang, reason)
            return
        try:
            values = ray.get(gang.starting)
        except Exception as error:
            if not _is_loss(error):
                raise _sweep_error("a worker could not start", error) from error
            reason = f"died while it started ({type(error).__name__})"
            self._count_loss("start", "while they started", reason)
            self._lose(gang, reason)
            return
        if isinstance(values[0], str):  # the address at which a gang meets
            size = len(gang.actors)
            gang.starting = [
                actor.start.remote(self._spec, self._data, (values[0], size, rank))
                for rank, actor in enumerate(gang.actors)
            ]
            return
        gang.starting, gang.about = [], values
        self._losses.pop("start", None)
        for about in values:
            self._notify("worker ready", incarnation=gang.incarnation, **about)

    def _await_workers(self) -> None:
        """Wait until one worker is there, and a little longer for the others."""
        started, first = time.monotonic(), None
        while any(gang.starting for gang in self._gangs):
            for gang in [gang for gang in self._gangs if gang.starting]:
                self._take_in(gang, 0.05)
            self._refresh()
            now = time.monotonic()
            if self._ready():
                first = first or now
                if now - first > max(10, 2 * (first - started)):
                    return
            elif now - started > self._settings.start_deadline:
                raise SweepError(
                    f"no worker started in {self._settings.start_deadline:g} s: the cluster has "
                    f"{self._ray.cluster_resources()}, of which "
                    f"{self._ray.available_resources()} is free; a worker needs {self._demand()}"
                )

    def _ready(self) -> list[Gang]:
        return [gang for gang in self._gangs if not gang.starting]

    def _lose(self, gang: Gang, reason: str) -> None:
        """Give a worker up, and start another."""
        who = [f"{about['host']}:{about['pid']}" for about in gang.about]
        self._notify("worker lost", reason=reason, incarnation=gang.incarnation, process=who)
        self._gangs.remove(gang)
        self._kill(gang)
        for about in gang.about:
            _end_process(about)
        self._refresh()

    def _count_loss(self, what: Any, text: str, reason: str) -> None:
        """Count a loss, and end the sweep if the same thing is lost again and again."""
        self._losses[what] = count = self._losses.get(what, 0) + 1
        if count > self._settings.most_losses:
            hint = "A process that is killed for memory, or crashes, looks like this"
            if "answer" in reason:
                hint = "If it only needs longer, give deadline= more seconds"
            raise SweepError(
                f"{count} workers in a row were lost {text}; the last one {reason}. {hint}"
            )

    def _kill(self, gang: Gang) -> None:
        for actor in gang.actors:
            with contextlib.suppress(Exception):
                self._ray.kill(actor)
        if gang.group is not None:
            from ray.util.placement_group import remove_placement_group

            with contextlib.suppress(Exception):
                remove_placement_group(gang.group)

    # --- jobs -----------------------------------------------------------------------------------

    def _balance(self, shards: list[int], movable: bool = True) -> None:
        """Give each shard to a worker, by `_balanced`; those that cannot move stay."""
        if not self._ready():
            return
        there = {s: gang for s, gang in self._owner.items() if gang in self._ready()}
        self._owner |= self._balanced(shards) | ({} if movable else there)
        self._incarnations.own({shard: self._owner[shard].incarnation for shard in shards})

    def _balanced(self, shards: list[int]) -> dict[int, Gang]:
        """Return a worker for each shard: where it was, if that is not too much for one."""
        ready, given = self._ready(), dict[int, Gang]()
        if not ready:
            return given
        most = -(-len(shards) // len(ready))
        load = {id(gang): 0 for gang in ready}
        moving: list[int] = []
        for shard in shards:
            gang = self._owner.get(shard)
            if gang is not None and load.get(id(gang), most) < most:
                load[id(gang)] += 1
                given[shard] = gang
            else:
                moving.append(shard)
        for shard in moving:
            gang = min(ready, key=lambda g: load[id(g)])
            load[id(gang)] += 1
            given[shard] = gang
        return given

    def _drive(self, jobs: list[Job]) -> Iterable[tuple[Job, Any]]:
        """Do every job once; those of a lost worker are given to another. In order of finishing."""
        waiting, asked = list(jobs), {id(job) for job in jobs}
        for gang in self._gangs:  # calls of a generation that was given up are nobody's
            gang.flying, gang.others = {}, {}
        while waiting or any(gang.flying for gang in self._gangs):
            waiting = [job for job in waiting if not self._dispatch(job)]
            flying = {ref: gang for gang in self._gangs for ref in gang.flying}
            if not flying:  # nobody is there: wait for a worker to start
                for gang in [gang for gang in self._gangs if gang.starting]:
                    self._take_in(gang, 0.05)
                self._refresh()
                self._balance([job.shard for job in waiting if job.shard is not None])
                continue
            done, _ = self._ray.wait(list(flying), timeout=0.5, fetch_local=False)
            if done:  # and all others that are done by now
                many = {"num_returns": len(flying), "timeout": 0, "fetch_local": False}
                done, _ = self._ray.wait(list(flying), **many)
            for ref in done:
                gang = flying[ref]
                job = gang.flying.get(ref)
                if job is None:
                    continue  # its worker was given up for another call
                try:
                    value = self._value(gang, ref, job)
                except _RowsGone:
                    job.sources, job.exported = [], []  # read them from the checkpoint
                    del gang.flying[ref]
                    gang.others.pop(ref, None)
                    waiting.append(job)
                    continue
                except _Lost as error:
                    left = self._give_up(gang, str(error))
                    waiting += [job for job in left if id(job) in asked]
                    continue
                self._finish(gang, ref, job, value)
                if id(job) in asked:
                    yield job, value
            waiting += [job for job in self._past_deadline() if id(job) in asked]

    def _finish(self, gang: Gang, ref: Any, job: Job, value: Any) -> None:
        gang.flying.pop(ref)
        gang.others.pop(ref, None)
        took = time.monotonic() - gang.progress
        gang.progress = time.monotonic()
        self._losses.pop(job.name, None)
        if job.kind == "prepare":
            gang.variants.add(job.variant)
            self._notify("prepared", prepared=value)
        elif job.kind == "run":
            self._slowest = max(self._slowest, took)

    def _dispatch(self, job: Job) -> bool:
        """Send a job to its worker; False while there is none for it."""
        if job.kind == "prepare":
            idle = [gang for gang in self._ready() if not gang.flying]
            if not idle:
                return False
            self._send(idle[0], job)
            return True
        assert job.shard is not None
        gang = self._owner.get(job.shard)
        if gang is None or gang not in self._gangs or gang.starting:
            return False
        if job.variant not in gang.variants:
            if not any(flying.kind == "prepare" for flying in gang.flying.values()):
                blobs = self._blobs.get(job.variant)
                layout = self._layouts[job.variant]
                self._send(gang, Job("prepare", job.variant, (job.variant, layout, blobs)))
            return False
        self._send(gang, job)
        return True

    def _send(self, gang: Gang, job: Job) -> None:
        if not gang.flying:
            gang.progress = time.monotonic()
        arguments = job.arguments
        if job.kind == "run":
            arguments = (*arguments, gang.incarnation, job.sources, *job.exported)
        calls = [getattr(actor, job.kind) for actor in gang.actors]
        if job.kind == "export":
            pairs = [call.options(num_returns=2).remote(*arguments) for call in calls]
            refs, job.exported = [done for done, _ in pairs], [pairs[0][1]]
        else:
            refs = [call.remote(*arguments) for call in calls]
        gang.flying[refs[0]] = job
        gang.others[refs[0]] = refs[1:]

    def _value(self, gang: Gang, ref: Any, job: Job) -> Any:
        """Return what a call gave: for an export the reference itself, its rows stay in Ray."""
        import ray.exceptions as errors

        refs = [ref, *gang.others.get(ref, [])]
        try:
            if len(refs) > 1:
                self._ray.wait(refs, num_returns=len(refs), timeout=self._deadline())
            value = self._ray.get(refs, timeout=self._deadline())[0]
            # The rows of an export stay in Ray; what was fetched only says that it went well.
            return job.exported[0] if job.kind == "export" else value
        except errors.GetTimeoutError:
            raise _Lost("did not answer by its deadline") from None
        except Exception as error:
            if isinstance(error, DamagedFile):
                raise DamagedFile(error.file, error.reason) from None
            if isinstance(error, StateGone):
                raise StateGone(str(getattr(error, "cause", None) or error)) from None
            if isinstance(error, Superseded):
                raise _Lost("belongs to an earlier incarnation") from None
            if _is_loss(error) or self._lost_meanwhile(refs[1:]):
                if job.kind == "run" and job.exported and not _is_loss(error, of_objects=False):
                    raise _RowsGone from None
                raise _Lost(f"died ({type(error).__name__})") from None
            if isinstance(error, StorageFailed):
                raise SweepError(f"a worker cannot write to the storage: {error}") from error
            what = {"prepare": "compile the sweep's step", "run": "run a generation"}
            raise _sweep_error(
                f"a worker failed to {what.get(job.kind, job.kind)}", error
            ) from None

    def _lost_meanwhile(self, refs: list[Any]) -> bool:
        """Whether another process of a gang died: the first one's error then follows from that."""
        for ref in refs:
            try:
                self._ray.get(ref, timeout=10)
            except Exception as error:
                if _is_loss(error):
                    return True
        return False

    def _give_up(self, gang: Gang, reason: str) -> list[Job]:
        """Lose a worker; return the jobs that it leaves."""
        left = list(gang.flying.values())
        job = left[0]  # they are done in order: it died of this one, or during it
        where = "the step was compiled or loaded"
        if job.kind != "prepare":
            where = f"shard {job.shard} ran"
        self._count_loss(job.name, f"while {where}", reason)
        gang.flying, gang.others = {}, {}
        self._lose(gang, reason)
        orphans = [shard for shard, owner in self._owner.items() if owner is gang]
        for shard in orphans:
            del self._owner[shard]
        if ready := self._ready():
            heirs = {s: ready[index % len(ready)] for index, s in enumerate(orphans)}
            self._owner |= heirs
            self._incarnations.own({shard: heir.incarnation for shard, heir in heirs.items()})
        return left

    def _past_deadline(self) -> list[Job]:
        left: list[Job] = []
        for gang in list(self._gangs):
            if gang.flying and time.monotonic() - gang.progress > self._limit(gang):
                late = time.monotonic() - gang.progress
                left += self._give_up(gang, f"did not answer for {late:.0f} s")
        return left

    def _limit(self, gang: Gang) -> float:
        first = next(iter(gang.flying.values()))
        return self._settings.start_deadline if first.kind == "prepare" else self._deadline()

    def _deadline(self) -> float:
        if self._settings.deadline is not None:
            return self._settings.deadline
        return 60 + 10 * self._slowest

    def _share(self, prepared: Prepared) -> Prepared:
        """Put a variant's programs where all workers can read them."""
        if prepared.blobs is not None:
            self._blobs[prepared.variant] = self._ray.put(prepared.blobs)
        self._layouts[prepared.variant] = prepared.batching
        return prepared._replace(blobs=None)


class _Lost(Exception):  # noqa: N818
    """A worker is gone, or must be given up."""


class _RowsGone(Exception):  # noqa: N818
    """Rows in Ray's object store went with their node."""


def open_executor(
    kind: str,
    spec: Spec,
    data: Any,
    shards: int,
    settings: RaySettings,
    notify: Notify,
) -> Executor:
    """Return the executor of this kind: "local", "ray", or "auto" for Ray where it is installed."""
    incarnations = Incarnations(Path(spec.storage))
    if kind == "local" or (kind == "auto" and not has_ray()):
        return LocalExecutor(spec, data, incarnations, shards)
    return RayExecutor(spec, data, incarnations, shards, settings, notify)


@contextlib.contextmanager
def local_ray(cpus: float) -> Generator[None]:
    """Hold a Ray of this machine for several sweeps, which then need not each start one.

    It listens on this machine's own addresses only, and reports nothing. Where Ray runs in this
    process already, that one is used and left running.

    Args:
      cpus: processors that Ray may hand out, whether the machine has as many or not.
    """
    started = _start_local_ray(cpus)
    try:
        yield
    finally:
        if started:
            import ray

            ray.shutdown()


def _start_local_ray(cpus: float) -> bool:
    """Start Ray on this machine unless this process has one; return whether it was started."""
    # Before the first import of Ray: addresses of this machine only, nothing reported.
    told = os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from ray._private import ray_constants  # pyright: ignore[reportPrivateImportUsage]

    if ray.is_initialized():
        return False
    if told == "0" and ray_constants.ENABLE_RAY_CLUSTER:
        warnings.warn(
            "Ray was imported before gradhpo could tell it to stay on this machine, and listens "
            "on its network's address: set RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 first",
            RuntimeWarning,
            stacklevel=3,
        )
    count = max(len(os.sched_getaffinity(0)), math.ceil(cpus))
    ray.init(address="local", num_cpus=count, include_dashboard=False, **QUIET)
    return True


def has_ray() -> bool:
    """Whether Ray is installed."""
    return importlib.util.find_spec("ray") is not None


def _end_process(about: Mapping[str, Any]) -> None:
    """Kill a worker's process on this host; Ray alone would not end one that is stopped."""
    if about["host"] != socket.gethostname():
        return
    with contextlib.suppress(OSError):
        if b"ray::" in Path(f"/proc/{about['pid']}/cmdline").read_bytes():
            os.kill(about["pid"], signal.SIGKILL)


def _shard_of(result: Result) -> int:
    return result.shard


def _is_loss(error: BaseException, of_objects: bool = True) -> bool:
    """Whether an error says that a process (or an object) is gone, and not that code failed."""
    import ray.exceptions as errors

    processes = (errors.RayActorError, errors.WorkerCrashedError, errors.NodeDiedError)
    kinds = (*processes, errors.OutOfMemoryError, *([errors.ObjectLostError] if of_objects else []))
    if isinstance(error, errors.RayTaskError):  # a failed dependency is wrapped in one
        return isinstance(error.cause, kinds)
    return isinstance(error, kinds)


def _sweep_error(what: str, error: BaseException) -> SweepError:
    cause = getattr(error, "cause", None) or error
    summary = f"{type(cause).__name__}: {cause}"
    plain = re.sub(r"\x1b\[\d*m", "", str(error))  # Ray's colours
    return SweepError(f"{what}: {summary}\n\nThe worker's own traceback:\n{plain}")


def _fits(node: Mapping[str, float], demand: Mapping[str, float]) -> int:
    """Return how many times the demand fits on a node."""
    counts = [int(node.get(name, 0) / n + 1e-9) for name, n in demand.items() if n > 0]
    return int(np.min(counts)) if counts else 1


def _is_resource(name: str) -> bool:
    return not name.startswith(("node:", "object_store"))
