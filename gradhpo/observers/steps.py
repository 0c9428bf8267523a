"""What a run of `solve` tells its observers, chunk by chunk of steps."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from gradhpo.observers.events import Begun, Progress, StepsDone, Stopped, scalars
from gradhpo.observers.telling import Observer, Telling, Warns


class Steps:
    """Tells of steps; of the last ones when it is known whether they were evaluated.

    Args:
      observers: who is told.
      runs: the shape of the keys.
      axis: what is counted.
      settings: what the run is, as JSON has it.
    """

    def __init__(
        self,
        observers: Iterable[Observer],
        runs: tuple[int, ...] = (),
        axis: str = "step",
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self._settings = settings or {}
        self.telling = Telling([])
        self.telling.to(*observers, Warns())
        self._runs, self._axis = runs, axis
        self._metrics: list[Mapping[str, np.ndarray]] = []
        self._evaluations: dict[int, dict[str, np.ndarray]] = {}
        self._first, self._done, self._held = 1, 0, False
        self._total = 0

    def begin(self, total: int, run: str | None = None) -> None:
        """Tell that it begins, or goes on after what was added."""
        self._held, self._total = False, total
        about = (self._axis, self._done, total, self._settings, run, self._past)
        self.telling.tell(Begun(*about, again=run is not None))

    def resume(
        self, metrics: Mapping[str, np.ndarray], steps: Sequence[int], evals: Mapping[str, Any]
    ) -> None:
        """Take what a run that is gone on with had, before it begins."""
        for row, step in enumerate(steps if evals else ()):
            self.evaluated(step, jax.tree.map(operator.itemgetter(row), evals))
        self.add(metrics)

    def add(self, metrics: Mapping[str, np.ndarray]) -> None:
        """Take the metrics of steps, each `(steps, …)`, and tell of those before."""
        rows = len(next(iter(metrics.values()))) if metrics else 0
        if rows:
            self.tell()
            self._metrics.append(metrics)
            self._first, self._done, self._held = self._done + 1, self._done + rows, True

    def evaluated(self, step: int, evals: Mapping[str, Any]) -> None:
        """Take what was measured after a step."""
        if found := scalars(evals, self._runs):
            self._evaluations[step] = found

    def tell(self) -> None:
        """Tell of the last steps, if that was not done yet."""
        if self._held:
            self._held = False
            self.telling.tell(self._event(self._first, self._metrics[-1]))

    def stop(self, done: int, reason: str, how: str, expected: bool = False) -> None:
        """Tell that it ends after so many, before its last; see `Stopped`."""
        self.tell()
        left = self._total - done
        self.telling.tell(Stopped(self._axis, done, left, how, reason, expected))

    def _past(self, after: int) -> Iterator[Progress]:
        start = 1
        for metrics in self._metrics:
            event = self._event(start, metrics)
            start = event.last + 1
            if event.last > after:
                yield event

    def _event(self, start: int, metrics: Mapping[str, np.ndarray]) -> StepsDone:
        event = StepsDone(self._axis, start, metrics)
        inside = {
            step: found for step, found in self._evaluations.items() if start <= step <= event.last
        }
        return StepsDone(self._axis, start, metrics, inside)
