"""What happens in a sweep, as typed events that are told to observers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from gradhpo.cluster import columns, orders
from gradhpo.cluster.space import said
from gradhpo.observers.events import (
    Begun,
    Event,
    GoneBack,
    ObserverFailed,
    Over,
    Progress,
    Stopped,
)
from gradhpo.observers.telling import Observer, Telling

__all__ = [
    "Begun",
    "Callback",
    "Changed",
    "CombinationEnded",
    "Compiling",
    "Damaged",
    "Event",
    "Finished",
    "GenerationDone",
    "GoneBack",
    "Importing",
    "Note",
    "Observer",
    "ObserverFailed",
    "Over",
    "Prepared",
    "Progress",
    "Repaired",
    "Resumed",
    "Running",
    "Starting",
    "Stopped",
    "Stopping",
    "Tell",
    "Telling",
    "WorkerLost",
    "WorkerReady",
]


@dataclasses.dataclass(frozen=True)
class Importing(Event):
    """Code that a storage names is about to be imported, to go on with its sweep."""

    references: Sequence[str]
    folders: Sequence[str]
    """Where references are looked up, beside Python's own path."""
    name: ClassVar[str] = "importing"

    def line(self) -> str:
        """Say what runs, and from where."""
        return f"importing {', '.join(self.references)}, looked up in {', '.join(self.folders)}"


@dataclasses.dataclass(frozen=True)
class Resumed(Event):
    """The storage held the sweep already."""

    generation: int
    """How many were done."""
    generations: int
    """Of the whole sweep."""
    name: ClassVar[str] = "resumed"

    def line(self) -> str:
        """Say how many are done."""
        left = "going on" if self.generation < self.generations else "generations= more extends it"
        return f"{self.generation} generations are done; {left}"


@dataclasses.dataclass(frozen=True)
class Starting(Event):
    """Workers start, and the step is compiled."""

    name: ClassVar[str] = "starting"

    def line(self) -> str:
        """Say so: it takes a while."""
        return "starting, and compiling the step"


@dataclasses.dataclass(frozen=True)
class WorkerReady(Event):
    """A worker's process has started."""

    incarnation: int
    pid: int
    host: str
    log: str | None = None
    """The file with what the worker prints, where there is one."""
    name: ClassVar[str] = "worker ready"


@dataclasses.dataclass(frozen=True)
class WorkerLost(Event):
    """A worker died or was given up; its shards go on elsewhere."""

    reason: str
    incarnation: int
    process: Sequence[str]
    """`host:pid` of each of its processes."""
    log: str | None = None
    """The file with what it printed, where there is one."""
    name: ClassVar[str] = "worker lost"

    def line(self) -> str:
        """Say who and why."""
        who = ", ".join(self.process) or "a worker"
        return f"{who} {self.reason}: its shards go on elsewhere"


@dataclasses.dataclass(frozen=True)
class Compiling(Event):
    """A worker begins to compile one of several combinations of choices, or is still at it."""

    variant: int
    choices: Mapping[str, Any]
    number: int
    """Among those that are compiled now, from 1."""
    of: int
    """How many those are."""
    seconds: float = 0
    """For how long."""
    name: ClassVar[str] = "compiling"

    def line(self) -> str:
        """Say which."""
        since = f", {self.seconds:.0f} s so far" if self.seconds else ""
        return f"compiling {self.number} of {self.of}: {said(self.choices)}{since}"


@dataclasses.dataclass(frozen=True)
class Prepared(Event):
    """A worker has the programs of one combination of choices."""

    variant: int
    batching: Any
    compiles: int
    loads: int
    restores: int
    small_compiles: int
    calibration_compiles: int
    warnings: Sequence[str]
    seconds: Sequence[tuple[str, float]] = ()
    """Where the time went: the problem, layouts, data, tracing, compiling, loading."""
    told: Compiling | None = None
    """What was said when it began, where several are compiled; with the seconds until now."""
    name: ClassVar[str] = "prepared"

    @classmethod
    def of(cls, prepared: orders.Prepared, told: Compiling | None) -> Prepared:
        """Return what a worker told, without its programs."""
        names = [field.name for field in _fields(cls) if field.name in prepared._fields]
        return cls(**{name: getattr(prepared, name) for name in names}, told=told)

    def line(self) -> str | None:
        """Say which of several is compiled."""
        if (told := self.told) is None:
            return None
        which = f"{told.number} of {told.of}: {said(told.choices)}"
        return f"compiled {which}, {told.seconds:.1f} s"


@dataclasses.dataclass(frozen=True)
class Running(Event):
    """All is prepared: the next generation begins."""

    generation: int
    """Generations that are done."""
    name: ClassVar[str] = "running"


@dataclasses.dataclass(frozen=True)
class GenerationDone(Progress):
    """A generation is done, and saved."""

    generation: int
    """Counted from 1."""
    table: Mapping[str, np.ndarray]
    """Each column `(population,)`."""
    best: float | None
    """The metric of the best trial so far; None while every trial has diverged, and where there
    are several objectives."""
    seconds: float
    front: Sequence[Mapping[str, float]] = ()
    """Of several objectives: those of the trials so far that no other dominates."""
    name: ClassVar[str] = "generation"

    @property
    def first(self) -> int:
        """Its number."""
        return self.generation

    @property
    def last(self) -> int:
        """Its number."""
        return self.generation

    def rows(self, after: int) -> Iterator[dict[str, Any]]:
        """Yield the table's row of each slot."""
        if self.generation > after:
            names, table = list(self.table), zip(*self.table.values(), strict=True)
            for slot, row in enumerate(table):
                values = {name: x.item() for name, x in zip(names, row, strict=True)}
                yield {"generation": self.generation, "slot": slot, **values}

    def points(self, after: int) -> Iterator[tuple[int, dict[str, float]]]:
        """Yield the best so far, and the median and extremes of what was measured."""
        if self.generation > after:
            drawn = {} if self.best is None else {"best": self.best}
            drawn |= self._of_front()
            drawn |= {"seconds": self.seconds, "diverged": self._diverged()}
            for name in (*columns.measured(self.table), columns.LR_HYPER):
                column = np.asarray(self.table.get(name, ()), float)
                if name != columns.DIVERGED and len(finite := column[np.isfinite(column)]):
                    drawn[f"median/{name}"] = float(np.median(finite))
                    drawn[f"least/{name}"] = float(finite.min())
                    drawn[f"greatest/{name}"] = float(finite.max())
            yield self.generation, drawn

    def _of_front(self) -> dict[str, float]:
        """Return how large the front is, and how far it reaches in each objective."""
        drawn = {"front": float(len(self.front))} if self.front else {}
        for name in self.front[0] if self.front else ():
            column = [scores[name] for scores in self.front]
            drawn |= {f"front/least/{name}": min(column), f"front/greatest/{name}": max(column)}
        return drawn

    def _diverged(self) -> float:
        return float((self.table[columns.DIVERGED] > 0).sum())


@dataclasses.dataclass(frozen=True)
class Damaged(Event):
    """A file of the storage is missing, cut short or changed."""

    what: str
    generation: int | None
    """The generation that is computed again, counted from 0; None where that is not needed."""
    name: ClassVar[str] = "damaged"

    def line(self) -> str:
        """Say what, and what follows."""
        if self.generation is None:
            return self.what
        again = f"Generation {self.generation + 1} is computed again from the one before"
        return f"damaged: {self.what}. {again}"


@dataclasses.dataclass(frozen=True)
class Repaired(Event):
    """A damaged file was made again, from what the program or another file says."""

    what: str
    name: ClassVar[str] = "repaired"

    def line(self) -> str:
        """Say what."""
        return self.what


@dataclasses.dataclass(frozen=True)
class Changed(Event):
    """Code, data or mesh are others than when the sweep began, and that was allowed."""

    what: str
    """ "code", "data" or "mesh"."""
    generation: int
    """The first with the change, counted from 0."""
    name: ClassVar[str] = "changed"

    def line(self) -> str:
        """Say since when."""
        return f"the {self.what} changed, as allowed: from generation {self.generation + 1} on"


@dataclasses.dataclass(frozen=True)
class CombinationEnded(Event):
    """A combination of choices lost the race; others have its slots from now on."""

    generation: int
    """After which, counted from 1."""
    choices: Mapping[str, Any]
    metric: str
    """Its name; "place" of several objectives."""
    score: float | None
    """The metric of its best trial, or that trial's place among all, from 0, by non-dominated
    sorting; None where all had diverged."""
    place: int
    """Among the combinations that were left, from 1."""
    of: int
    """How many were left."""
    name: ClassVar[str] = "combination ended"

    def line(self) -> str:
        """Say which, and why."""
        score = "all diverged" if self.score is None else f"{self.metric} {self.score:.4g}"
        where = f"after generation {self.generation}: {score}, {self.place} of {self.of}"
        return f"{said(self.choices)} ended {where}. Others have its slots"


@dataclasses.dataclass(frozen=True)
class Note(Event):
    """Something that a person may want to know."""

    what: str
    name: ClassVar[str] = "note"

    def line(self) -> str:
        """Say it."""
        return self.what


@dataclasses.dataclass(frozen=True)
class Stopping(Event):
    """A signal asked for the end; the generation in flight is finished first."""

    signal: str
    name: ClassVar[str] = "stopping"

    def line(self) -> str:
        """Say that it takes a moment."""
        return f"{self.signal}: finishing this generation; once more to stop at once"


@dataclasses.dataclass(frozen=True)
class Finished(Event):
    """All generations are done."""

    generation: int
    name: ClassVar[str] = "finished"


Tell = Callable[[Event], None]
"""Takes an event."""


class Callback:
    """An observer that calls `callback(generation, table)` when a generation is saved."""

    def __init__(self, callback: Callable[[int, dict[str, np.ndarray]], Any]) -> None:
        self._callback = callback

    def observe(self, event: Event) -> None:
        """Call it."""
        if isinstance(event, GenerationDone):
            self._callback(event.generation, dict(event.table))


def _fields(kind: type[Event]) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(kind)
