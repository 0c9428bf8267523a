"""Workers that are Ray actors, on any node of a cluster that is joined or started here."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gradhpo.cluster.commands import Again, Event, Failed, Gone, Heard
from gradhpo.cluster.failures import WorkerFailed
from gradhpo.cluster.local_ray import QUIET, start_local_ray
from gradhpo.cluster.orders import Spec
from gradhpo.cluster.processes import ProcessSettings, event_of, log_file
from gradhpo.cluster.worker import Answer, Worker, environment


class RayWorker(Worker):
    """The actor: one process of a worker. Signs of life come from a thread beside the work."""

    def address(self) -> str:
        """Return where the first process of a gang can coordinate the others."""
        import ray

        host = ray.util.get_node_ip_address()
        with socket.socket() as free:
            free.bind((host, 0))
            return f"{host}:{free.getsockname()[1]}"

    def pulse(self) -> None:
        """Return, which a process that is stopped or hangs does not."""

    def export_apart(self, *arguments: Any) -> tuple[Answer, Any]:
        """Return how it went apart from the rows, which stay in Ray."""
        answer = self.do("export", *arguments)
        return answer._replace(value=None), answer.value


class _Reply(NamedTuple):
    """What something that Ray will return is the reply to."""

    worker: int
    rank: int
    what: str
    """ "pulse", "address", "export", or "call"."""
    call: int = 0
    rows: Any = None
    """Of an export: what stands for its rows."""
    given_rows: bool = False
    """Whether the call was sent with rows that others exported."""


@dataclasses.dataclass(eq=False)
class _Gang:
    """A worker: one actor, or several that hold one shard together."""

    actors: list[Any]
    start: int
    """The call that its start answers."""
    group: Any = None
    about: dict[int, dict[str, Any]] = dataclasses.field(default_factory=dict[int, dict[str, Any]])
    """By rank, who its processes are."""
    pulse: float = 0.0
    """When it was last asked for a sign of life."""


class RayProcesses:
    """Workers of one actor each, or of several; see `Processes`."""

    def __init__(self, spec: Spec, data: Any, settings: ProcessSettings) -> None:
        self._spec, self._settings = spec, settings
        self._gangs: dict[int, _Gang] = {}
        self._replies: dict[Any, _Reply] = {}
        self._own_cluster = False
        self._ray = ray = self._connect()
        try:
            if settings.wait > 0:  # an autoscaler shall know what is wanted
                self._request(settings.workers * settings.processes)
            self._data = ray.put(data)
            self._actor: Any = ray.remote(concurrency_groups={"pulse": 1})(RayWorker)
        except BaseException:
            self.close()
            raise

    def start(self, worker: int, call: int) -> None:
        """Start a worker's actors; several meet first."""
        settings, options = self._settings, self._options()
        if settings.processes == 1:
            gang = self._gangs[worker] = _Gang([self._actor.options(**options).remote()], call)
            self._begin(worker, gang, None)
            return
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        group = placement_group([self._demand()] * settings.processes, settings.placement)
        gang = self._gangs[worker] = _Gang([], call, group)
        for rank in range(settings.processes):
            where = PlacementGroupSchedulingStrategy(group, rank)
            gang.actors.append(self._actor.options(**options, scheduling_strategy=where).remote())
        self._replies[gang.actors[0].address.remote()] = _Reply(worker, 0, "address")

    def send(self, worker: int, call: int, what: str, arguments: tuple[Any, ...]) -> None:
        """Call each of a worker's actors; rows that are exported stay in Ray."""
        given_rows = any(isinstance(argument, self._ray.ObjectRef) for argument in arguments)
        for rank, actor in enumerate(self._gangs[worker].actors):
            if what == "export":
                exporting = actor.export_apart.options(num_returns=2)
                done, rows = exporting.remote(*arguments)
                self._replies[done] = _Reply(worker, rank, "export", call, rows)
            else:
                done = actor.do.remote(what, *arguments)
                given = given_rows and what == "run"
                self._replies[done] = _Reply(worker, rank, "call", call, given_rows=given)

    def poll(self, timeout: float) -> list[Event]:
        """Return what Ray has, without waiting for one that has nothing."""
        self._feel_pulses()
        if not self._replies:
            time.sleep(timeout)
            return []
        done, _ = self._ray.wait(list(self._replies), timeout=timeout)
        if done:  # and all others that are done by now
            count = len(self._replies)
            done, _ = self._ray.wait(list(self._replies), num_returns=count, timeout=0)
        events = [self._event(ref, self._replies.pop(ref)) for ref in done]
        return [event for event in events if event is not None]

    def kill(self, worker: int) -> None:
        """End a worker's actors; Ray alone would not end a process that is stopped."""
        for about in self._let_go(worker).about.values():
            _end_process(about)

    def share(self, value: Any) -> Any:
        """Put a value where all workers can read it."""
        return self._ray.put(value)

    def room(self) -> int | None:
        """Return how many workers the cluster's nodes can hold, were they empty."""
        processes = sum(_fits(node, self._demand()) for node in self._nodes())
        return processes // self._settings.processes

    def shortage(self) -> str:
        """Say what a worker needs, and what the cluster has."""
        if self.room():
            return (
                f"the cluster has {self._ray.cluster_resources()}, of which "
                f"{self._ray.available_resources()} is free; a worker needs {self._demand()}"
            )
        has = [{k: v for k, v in node.items() if _is_resource(k)} for node in self._nodes()]
        several = f" {self._settings.processes} times" if self._settings.processes > 1 else ""
        return (
            f"resources={dict(self._settings.resources)}: no node of the cluster has as "
            f"much{several}; its nodes have {has}. Ask for less, or give wait= seconds if nodes "
            "are still to come"
        )

    def close(self) -> None:
        """Kill the workers, and the cluster if it was started here."""
        for worker in list(self._gangs):
            self._let_go(worker)  # a signal beside it would look like a crash, which Ray prints
        if self._settings.wait > 0:
            with contextlib.suppress(Exception):
                self._request(0)
        if self._own_cluster:
            self._ray.shutdown()
            self._own_cluster = False

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
        self._own_cluster = start_local_ray(cpus)
        import ray

        return ray

    def _let_go(self, worker: int) -> _Gang:
        """Let Ray end a worker's actors."""
        gang = self._gangs.pop(worker)
        for ref in [ref for ref, reply in self._replies.items() if reply.worker == worker]:
            del self._replies[ref]
        for actor in gang.actors:
            with contextlib.suppress(Exception):
                self._ray.kill(actor)
        if gang.group is not None:
            from ray.util.placement_group import remove_placement_group

            with contextlib.suppress(Exception):
                remove_placement_group(gang.group)
        return gang

    def _options(self) -> dict[str, Any]:
        settings = self._settings
        env = environment(settings.resources, settings.env)
        runtime_env = dict(settings.runtime_env)
        runtime_env["env_vars"] = {**env, **runtime_env.get("env_vars", {})}
        resources = {k: v for k, v in settings.resources.items() if not k.startswith("num_")}
        memory = {"memory": resources.pop("memory")} if "memory" in resources else {}
        return {
            "num_cpus": settings.resources.get("num_cpus", 1),
            "num_gpus": settings.resources.get("num_gpus", 0),
            "resources": resources,
            "max_restarts": 0,
            "runtime_env": runtime_env,
            **memory,
        }

    def _begin(self, worker: int, gang: _Gang, address: str | None) -> None:
        size = len(gang.actors)
        for rank, actor in enumerate(gang.actors):
            where = None if address is None else (address, size, rank)
            log = str(log_file(self._spec.storage, worker, rank, size))
            ref = actor.do.remote("start", self._spec, self._data, where, log)
            self._replies[ref] = _Reply(worker, rank, "call", gang.start)

    def _feel_pulses(self) -> None:
        """Ask all processes that answered the last time for a sign of life, now and then."""
        now, every = time.monotonic(), min(5.0, self._settings.heartbeat / 8)
        asked = {(r.worker, r.rank) for r in self._replies.values() if r.what == "pulse"}
        for worker, gang in self._gangs.items():
            if now - gang.pulse < every:
                continue
            gang.pulse = now
            for rank in set(gang.about) - {rank for other, rank in asked if other == worker}:
                pulse = gang.actors[rank].pulse.options(concurrency_group="pulse")
                self._replies[pulse.remote()] = _Reply(worker, rank, "pulse")

    def _nodes(self) -> list[Mapping[str, float]]:
        return [node["Resources"] for node in self._ray.nodes() if node["Alive"]]

    def _request(self, processes: int) -> None:
        from ray.autoscaler.sdk import request_resources

        request_resources(bundles=[self._demand()] * processes)

    def _demand(self) -> dict[str, float]:
        names = {"num_cpus": "CPU", "num_gpus": "GPU"}
        demand = {names.get(name, name): n for name, n in self._settings.resources.items()}
        return {"CPU": 1, **demand}

    # --- replies --------------------------------------------------------------------------------

    def _event(self, ref: Any, reply: _Reply) -> Event | None:
        worker, gang = reply.worker, self._gangs[reply.worker]
        try:
            value = self._ray.get(ref)
        except Exception as error:
            return self._error(reply, error)
        if reply.what == "pulse":
            return Heard(worker, reply.rank)
        if reply.what == "address":
            self._begin(worker, gang, value)
            return None
        answer: Answer = value
        if reply.what == "export":
            answer = answer._replace(value=reply.rows)
        if reply.call == gang.start and answer.error is None:
            gang.about[reply.rank] = answer.value
        return event_of(worker, reply.call, reply.rank, answer)

    def _error(self, reply: _Reply, error: Exception) -> Event:
        """Return what an error of Ray's own says: a worker's are in its answers."""
        import ray.exceptions as errors

        cause = error.cause if isinstance(error, errors.RayTaskError) else error
        processes = (errors.RayActorError, errors.WorkerCrashedError, errors.NodeDiedError)
        if isinstance(cause, (*processes, errors.OutOfMemoryError)):
            return Gone(reply.worker, f"died ({type(cause).__name__})")
        if isinstance(cause, errors.ObjectLostError):
            if reply.given_rows:
                return Again(reply.worker, reply.call, reply.rank)
            return Gone(reply.worker, f"died ({type(cause).__name__})")
        call = reply.call or self._gangs[reply.worker].start
        return Failed(reply.worker, call, reply.rank, WorkerFailed.of(error))


def _end_process(about: Mapping[str, Any]) -> None:
    """Kill a worker's process on this host."""
    if about["host"] != socket.gethostname():
        return
    with contextlib.suppress(OSError):
        if b"ray::" in Path(f"/proc/{about['pid']}/cmdline").read_bytes():
            os.kill(about["pid"], signal.SIGKILL)


def _fits(node: Mapping[str, float], demand: Mapping[str, float]) -> int:
    """Return how many times the demand fits on a node."""
    counts = [int(node.get(name, 0) / n + 1e-9) for name, n in demand.items() if n > 0]
    return int(np.min(counts)) if counts else 1


def _is_resource(name: str) -> bool:
    return not name.startswith(("node:", "object_store"))
