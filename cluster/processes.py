"""What a fleet runs on: `Processes`, the few functions that carry its commands out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from gradhpo.cluster.commands import Answered, Event, Failed
from gradhpo.cluster.fleet import Limits
from gradhpo.cluster.storage import Storage
from gradhpo.cluster.worker import Answer


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessSettings(Limits):
    """How a sweep's workers are started and judged; see `Sweep`."""

    resources: Mapping[str, float]
    env: Mapping[str, str]
    runtime_env: Mapping[str, Any]
    address: str | None
    placement: str


class Processes(Protocol):
    """Workers somewhere, which answer calls in the order in which they were sent.

    A worker is known by its number, which is its incarnation. Nothing here decides or waits: what
    happens is reported by `poll`.
    """

    def start(self, worker: int, call: int) -> None:
        """Start a worker: each of its processes answers the call with who it is."""
        ...

    def send(self, worker: int, call: int, what: str, arguments: tuple[Any, ...]) -> None:
        """Call `Worker.do(what, *arguments)` in each of a worker's processes.

        What an "export" answers is a handle that a later call's arguments may hold.
        """
        ...

    def poll(self, timeout: float) -> list[Event]:
        """Return what happened since the last time, after `timeout` seconds at most."""
        ...

    def kill(self, worker: int) -> None:
        """End all of a worker's processes, also those that are stopped or hang."""
        ...

    def share(self, value: Any) -> Any:
        """Return what stands for a large value in the arguments of many calls."""
        ...

    def room(self) -> int | None:
        """Return how many workers could be held, were nothing else there; None for any number."""
        ...

    def shortage(self) -> str:
        """Say why there is no worker: what one needs, and what there is."""
        ...

    def close(self) -> None:
        """Leave no process behind."""
        ...


def log_file(storage: str, worker: int, rank: int = 0, processes: int = 1) -> Path:
    """Return the log file of a process of a worker."""
    which = f"-{rank}" if processes > 1 else ""
    return Storage(storage).logs / f"worker-{worker}{which}.log"


def event_of(worker: int, call: int, rank: int, answer: Answer) -> Event:
    """Return what a fleet is told of an answer."""
    if answer.error is not None:
        return Failed(worker, call, rank, answer.error)
    return Answered(worker, call, rank, answer.value, answer.compiles)
