"""What a sweep's driver and its workers tell each other: the sweep, orders, and results."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from gradhpo.checkpoints import Saved
from gradhpo.cluster.space import SearchSpace
from gradhpo.timetable import EpisodeInit


@dataclasses.dataclass(frozen=True)
class Spec:
    """What every worker of a sweep is told, once."""

    problem: Any
    """A reference, a function that makes a `Problem`, or one."""
    optimizer: Any
    space: SearchSpace
    slots: int
    """Of a shard."""
    steps: int
    """In a generation."""
    seed: int
    storage: str
    batching: Any = "auto"
    mesh: Mapping[str, int] | None = None
    """Devices along "trial", "data" and others."""
    states: int = 1
    """Shards whose state a worker keeps; others are read from their checkpoints again."""
    sys_path: tuple[str, ...] = ()
    x64: bool = False
    episode_length: int | None = None
    lr_reptile: float = 1.0
    episode_init: EpisodeInit = "reptile"
    lr_schedule: Any = None
    """A function of a trial's step, or a reference to one: a factor on the outer rate."""
    record: int | None = None
    """Of which steps in a generation the metrics are kept: every n-th."""
    validation: Any = None
    """A function of the data that gives the validation set, or a reference to one."""
    rules: Mapping[str, Any] | None = None
    """What divides a trial's arrays over the mesh, by regular expressions of their paths."""
    compared: tuple[str, ...] = ()
    """The columns by which trials are compared, which each combination must have."""


class Import(NamedTuple):
    """A trial that comes from another shard."""

    slot: int
    source_shard: int
    source_slot: int
    checkpoint: Saved | None
    """Of the source shard, should its worker be gone; None where it is not known to be durable."""


@dataclasses.dataclass(frozen=True)
class Order:
    """One generation of one shard; executing it twice gives the same."""

    shard: int
    variant: int
    generation: int
    trials: np.ndarray
    """uint32, `(slots,)`: with the generation they decide all randomness."""
    parents: np.ndarray
    """int32, `(slots,)`, slots of this shard; its own for a new trial or an import."""
    fresh: np.ndarray
    """Boolean, `(slots,)`: which start anew."""
    lr_hyper: np.ndarray | None
    changes: dict[str, Any]
    """By name, `Change` of hyperparameters, `(slots,)` each."""
    start: Saved | None
    """The shard's checkpoint of the generation before; None where it is not known to be durable,
    and for the first generation."""
    before: int | None = None
    """The variant that had the shard before, if it was another: then the shard starts from nothing,
    as in the first generation."""
    imports: tuple[Import, ...] = ()
    save: bool = True
    """Whether the state after the generation is to be written; that goes on after the result."""
    winners: tuple[int, ...] = ()
    """Slots whose trials are kept as they were before this generation: to be written, apart."""

    def by_source(self) -> dict[int, list[Import]]:
        """Return the imports by the shard that they come from."""
        grouped: dict[int, list[Import]] = {}
        for item in self.imports:
            grouped.setdefault(item.source_shard, []).append(item)
        return grouped


class Checkpoint(NamedTuple):
    """A shard's state after a generation, durable."""

    generation: int
    saved: Saved


class Result(NamedTuple):
    """What a shard gives back."""

    shard: int
    generation: int
    columns: dict[str, np.ndarray]
    """Metrics and settings by name, each `(slots,)`."""
    checkpoints: tuple[Checkpoint, ...]
    """The newest two of the shard that this worker knows to be durable, of earlier generations as a
    rule."""
    incarnation: int
    seconds: float
    winner: Saved | None = None
    """What was written of the order's `winners`."""


class Prepared(NamedTuple):
    """What a worker did to get a variant's programs."""

    variant: int
    batching: Any
    key: dict[str, Any]
    """The step key of the generation's program."""
    blobs: dict[str, bytes] | None
    """Those programs that can be, serialized, if asked for."""
    compiles: int
    """Of the generation's program."""
    loads: int
    restores: int
    """From JAX's persistent compilation cache: then others get the program from there too."""
    small_compiles: int
    """Of the other programs: data, copying a slot out and in, and the gather of slots."""
    calibration_compiles: int
    """Programs that `batching="auto"` compared, and what it needed to."""
    warnings: list[str]
    unreached: tuple[str, ...] = ()
    """What was told of hyperparameters that get no hypergradient."""
    data: str = ""
    """SHA-256 of the arrays of `Problem.data`, from the worker that compiled."""
    seconds: tuple[tuple[str, float], ...] = ()
    """Where the time went: the problem, layouts, data, tracing, compiling, loading."""
