"""What runs and sweeps tell their observers: they begin, get on, and are over."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar

import numpy as np


@dataclasses.dataclass(frozen=True)
class Event:
    """Something that happened; its fields are plain values, but for arrays of numbers."""

    name: ClassVar[str] = ""
    """What a storage's log calls it."""

    def line(self) -> str | None:
        """Return it as a line for a person; None for what needs none."""
        return None


class Progress(Event):
    """Numbers from `first` to `last` are done: steps, episodes or generations, from 1."""

    @property
    def first(self) -> int:
        """The first number."""
        raise NotImplementedError

    @property
    def last(self) -> int:
        """The last number."""
        raise NotImplementedError

    def rows(self, after: int) -> Iterator[dict[str, Any]]:
        """Yield a row for each number after this one and each trial: scalars by name.

        The first entry is the number.
        """
        raise NotImplementedError

    def points(self, after: int) -> Iterator[tuple[int, dict[str, float]]]:
        """Yield each number after this one with what is drawn over it."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Begun(Event):
    """A run begins, or goes on."""

    axis: str
    """What is counted: "step", "episode" or "generation"."""
    done: int
    """How many of them are done already."""
    total: int
    settings: Mapping[str, Any]
    """What the run is, as JSON has it."""
    run: str | None
    """What tells it from all others, the same when it goes on; None for one that never does."""
    past: Callable[[int], Iterable[Progress]]
    """Returns what is done after a number, whoever was told of it."""
    again: bool = False
    """Whether numbers after `done` may have been told before, by a process that was killed."""
    name: ClassVar[str] = "begun"


@dataclasses.dataclass(frozen=True)
class GoneBack(Event):
    """What was told of numbers after `done` does not hold: they are computed anew."""

    done: int
    """How many are done."""
    name: ClassVar[str] = "gone back"


@dataclasses.dataclass(frozen=True)
class Stopped(Event):
    """A run or a sweep ends before its last step, episode or generation."""

    axis: str
    """What is counted: "step", "episode" or "generation"."""
    done: int
    """How many of them are done."""
    left: int
    how: str
    """The sentence that says how to go on."""
    reason: str = ""
    """What stopped it: a condition of `Stop`, who asked, a signal, a divergence."""
    expected: bool = False
    """Whether that was a condition of `Stop`."""
    name: ClassVar[str] = "stopped"

    @property
    def generation(self) -> int:
        """How many generations of a sweep are done."""
        return self.done

    def line(self) -> str:
        """Say why, and how to go on."""
        why = f" ({self.reason})" if self.reason else ""
        return f"Stopped, {self.left} {self.axis}s before the end{why}. {self.how}"


@dataclasses.dataclass(frozen=True)
class Over(Event):
    """Nothing more is told: the run is at its end, or has failed."""

    error: str | None = None
    """What it failed with."""
    name: ClassVar[str] = "over"


@dataclasses.dataclass(frozen=True)
class ObserverFailed(Event):
    """An observer raised an error. It is told of what follows, and its next errors are not."""

    observer: str
    error: str
    name: ClassVar[str] = "observer failed"

    def line(self) -> str:
        """Say who and why."""
        return f"the observer {self.observer} failed: {self.error}. The run goes on"


@dataclasses.dataclass(frozen=True)
class StepsDone(Progress):
    """Steps of `solve`, or episodes of `run`, are done."""

    axis: str
    start: int
    """The number of the first row, from 1."""
    metrics: Mapping[str, np.ndarray]
    """By name, `(rows,)`, or `(rows, n)` with a batch of n keys."""
    evaluations: Mapping[int, Mapping[str, np.ndarray]] = dataclasses.field(
        default_factory=dict[int, Mapping[str, np.ndarray]]
    )
    """By number, what `Problem.metrics` gave there: scalars, or `(n,)`."""
    name: ClassVar[str] = "steps"

    @property
    def first(self) -> int:
        """The first number."""
        return self.start

    @property
    def last(self) -> int:
        """The last number."""
        return self.start + len(next(iter(self.metrics.values()))) - 1

    def rows(self, after: int) -> Iterator[dict[str, Any]]:
        """Yield a row for each step, and each run of a batch."""
        for number, values in self._values(after):
            shapes = {value.shape for value in values.values()}
            if shapes == {()}:
                yield {self.axis: number, **{name: x.item() for name, x in values.items()}}
                continue
            for run in range(max(shapes)[0]):
                of_run = {name: value[run].item() for name, value in values.items()}
                yield {self.axis: number, "run": run, **of_run}

    def points(self, after: int) -> Iterator[tuple[int, dict[str, float]]]:
        """Yield each step with its metrics; those of a batch as `NAME/RUN`."""
        for number, values in self._values(after):
            drawn: dict[str, float] = {}
            for name, value in values.items():
                if value.ndim == 0:
                    drawn[name] = float(value)
                else:
                    drawn |= {f"{name}/{run}": float(x) for run, x in enumerate(value)}
            yield number, drawn

    def _values(self, after: int) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        for number in range(max(self.first, after + 1), self.last + 1):
            row = {name: np.asarray(x[number - self.start]) for name, x in self.metrics.items()}
            yield number, row | dict(self.evaluations.get(number, {}))


def scalars(tree: Any, shape: tuple[int, ...], prefix: str = "") -> dict[str, np.ndarray]:
    """Return the numbers in a tree of dictionaries by their dotted names, arrays left out.

    Args:
      tree: what `Problem.metrics` gave.
      shape: of one number: `()`, or `(n,)` with a batch of n keys.
      prefix: how the names begin.
    """
    if isinstance(tree, Mapping):
        found: dict[str, np.ndarray] = {}
        for name, value in tree.items():
            found |= scalars(value, shape, f"{prefix}.{name}" if prefix else str(name))
        return found
    array = np.asarray(tree) if hasattr(tree, "shape") or np.isscalar(tree) else None
    return {} if array is None or array.shape != shape else {prefix: array}
