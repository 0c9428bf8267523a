"""What a run is watched for at its evaluations: the best state so far, and when to stop."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from gradhpo.errors import check_count, check_number
from gradhpo.solution import Best

SHOWN = 3
"""How many different reasons of a batch's runs are told."""


@dataclasses.dataclass(frozen=True)
class Stop:
    """When `solve` or a sweep ends early; asked at every evaluation, or after every generation.

    In a batch of keys the runs go on together until all of them would stop.

    Args:
      patience: stop after so many evaluations (generations) in a row without a best so far.
      target: stop at a metric this good.
      seconds: stop when this call has run for so long, compiling included.

    Raises:
      ValueError: for none of them, or a number out of range.
    """

    patience: int | None = None
    target: float | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        if self.patience is None and self.target is None and self.seconds is None:
            raise ValueError("Stop takes patience, target or seconds; got none of them")
        if self.seconds is not None:
            check_number("seconds", self.seconds, 0, float("inf"), open_low=True)
        if self.patience is not None:
            check_count("patience", self.patience)
        if self.target is not None:
            check_number("target", self.target, -float("inf"), float("inf"))

    def why(
        self,
        metric: str,
        minimized: bool,
        best: Any,
        since: int,
        of: str,
        elapsed: float,
        lacking: str = "a best so far",
    ) -> str | None:
        """Return which condition holds, in words; None where none does.

        Args:
          metric: its name.
          minimized: whether less is better.
          best: the best value so far; None or NaN where there is none.
          since: how many in a row had no better one.
          of: what is counted so, "evaluations" or "generations".
          elapsed: seconds that this call has run.
          lacking: what patience waits for.
        """
        if self.target is not None and best is not None:
            good = best <= self.target if minimized else best >= self.target
            if good:
                told = f"{metric} is {float(best):.6g}, target={self.target:g}"
                return f"the target is reached: {told}"
        if self.patience is not None and since >= self.patience:
            return f"{since} {of} without {lacking}, patience={self.patience}"
        if self.seconds is not None and elapsed >= self.seconds:
            return f"seconds={self.seconds:g} are over"
        return None


@dataclasses.dataclass(frozen=True)
class Watch:
    """The metric that says which evaluation is the best, and when it is good enough."""

    metric: str
    mode: Literal["min", "max"]
    stop: Stop | None
    every: int
    """Steps between evaluations."""
    began: float = dataclasses.field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        if self.mode not in ("min", "max"):
            raise ValueError(f'mode must be "min" or "max", got {self.mode!r}')
        if not isinstance(self.metric, str):
            raise TypeError(f"metric must be a name, got {self.metric!r}")
        if self.stop is not None and not isinstance(self.stop, Stop):
            raise TypeError(f"stop must be a gradhpo.Stop, got {self.stop!r}")

    def check(
        self, rows: Mapping[str, Any], evals: Mapping[str, Any], runs: tuple[int, ...]
    ) -> None:
        """Raise if the metric is not one number of a run; by shapes, before anything compiles."""
        there = {**rows, **evals}
        if self.metric not in there:
            raise ValueError(f"metric must be one of {sorted(there)}, got {self.metric!r}")
        shape = getattr(there[self.metric], "shape", None)
        if shape != runs:
            got = f"shape {shape[len(runs) :]}" if shape is not None else "a tree"
            raise ValueError(f"metric={self.metric!r} must be one number, got {got}")

    def asks_as(self, best: Best) -> bool:
        """Whether that was the best by this metric."""
        return (best.metric, best.mode) == (self.metric, self.mode)

    def better(self, score: np.ndarray, best: Best | None) -> np.ndarray:
        """Return which runs have their best score now, `()` or `(n,)`; the first one always is."""
        if best is None:
            return np.ones(np.shape(score), bool)
        with np.errstate(invalid="ignore"):
            than = score < best.score if self.mode == "min" else score > best.score
        return than | (np.isnan(best.score) & ~np.isnan(score))

    def why(
        self, done: int, best: Best, alive: np.ndarray, elapsed: float | None = None
    ) -> str | None:
        """Return why every run that has not diverged would stop here; None where one would not.

        Args:
          done: steps that were taken.
          best: of each run.
          alive: which runs have not diverged.
          elapsed: seconds of this call, where not those until now count.
        """
        if self.stop is None:
            return None
        if elapsed is None:
            elapsed = time.monotonic() - self.began
        runs = np.flatnonzero(alive)
        scores, steps = np.ravel(best.score)[runs], np.ravel(best.step)[runs]
        minimized, of = self.mode == "min", "evaluations"
        found = [
            self.stop.why(self.metric, minimized, score, (done - step) // self.every, of, elapsed)
            for score, step in zip(scores, steps.tolist(), strict=True)
        ]
        different = list(dict.fromkeys(why for why in found if why is not None))
        if not found or None in found:
            return None
        if np.ndim(alive) == 0:
            return different[0]
        more = [f"{len(different) - SHOWN} others"] if len(different) > SHOWN else []
        return "; ".join([*different[:SHOWN], *more])
