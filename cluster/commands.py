"""What a fleet is told, and what it tells: jobs, events, commands."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Job:
    """Something that some worker must do, once."""

    kind: str
    """ "start", "trace", "begin", "prepare", "forget", "export", "run" or "checkpoint"."""
    variant: int = -1
    shard: int = -1
    target: int = -1
    """Of an export: the shard that its rows are for."""
    generation: int = -1
    """Of a run or a checkpoint: going back and losing it again is losing the same."""


START, IDLE = Job("start"), Job("idle")


# --- what happened ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Heard:
    """A process of a worker gave a sign of life."""

    worker: int
    rank: int = 0


@dataclasses.dataclass(frozen=True)
class Answered:
    """A process of a worker has done its part of a call."""

    worker: int
    call: int
    rank: int = 0
    value: Any = None
    compiles: int = 0
    """Programs that XLA compiled in that process so far."""


@dataclasses.dataclass(frozen=True)
class Failed:
    """A call raised an error in a process of a worker."""

    worker: int
    call: int
    rank: int
    error: Exception


@dataclasses.dataclass(frozen=True)
class Again:
    """A call did not begin, because rows that were sent with it are gone."""

    worker: int
    call: int
    rank: int = 0


@dataclasses.dataclass(frozen=True)
class Gone:
    """A process of a worker is dead."""

    worker: int
    reason: str


@dataclasses.dataclass(frozen=True)
class Room:
    """So many workers could be held now, were nothing else there; None where nothing limits it."""

    workers: int | None


Event = Heard | Answered | Failed | Again | Gone | Room


# --- what to do ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Start:
    """Start a worker; that it is there answers the call."""

    worker: int
    call: int


@dataclasses.dataclass(frozen=True)
class Own:
    """Write down who owns these shards: `(shard, worker)` each."""

    owners: tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class Send:
    """Give a worker a job."""

    worker: int
    call: int
    job: Job


@dataclasses.dataclass(frozen=True)
class Kill:
    """End a worker, and all of its processes."""

    worker: int
    reason: str
    lost: bool = True
    """False for one that only waits, and that there is no room for any more."""


@dataclasses.dataclass(frozen=True)
class Done:
    """Take what a job gave, process by process."""

    worker: int
    job: Job
    values: tuple[Any, ...]
    asked: bool
    """False for what the fleet needed on the way: a start, a program that another had compiled."""


@dataclasses.dataclass(frozen=True)
class Fail:
    """End here, with this error; always the last command."""

    error: Exception
    worker: int | None = None
    job: Job | None = None


Command = Start | Own | Send | Kill | Done | Fail
