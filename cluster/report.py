"""What a run of the driver did: how often it compiled, and where the time went."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from gradhpo.cluster.events import Event, Prepared, WorkerLost


@dataclasses.dataclass(frozen=True)
class Report:
    """What a run of the driver did, beside the result."""

    compiles: int
    """How often the step was compiled: once for each variant."""
    loads: int
    """How often a worker loaded it."""
    restores: int
    """How often a worker got it from JAX's persistent compilation cache."""
    small_compiles: int
    """Of programs that copy slots and make data."""
    calibration_compiles: int
    """Layouts that `batching="auto"` compared, and what that needed."""
    worker_compiles: list[int]
    """For each worker at the end, all programs that XLA compiled in it; 0 where all were loaded."""
    workers_lost: int
    startup_seconds: float
    """Until the first generation."""
    seconds: float
    """Of the generations that this run computed."""
    generations: int
    """That this run computed."""
    startup: dict[str, float]
    """Where the seconds of `startup_seconds` went."""
    loading_seconds: float
    """The longest that another worker took to get the programs, within the first generations."""

    def start(self) -> str:
        """Return where the time of the start went, in words."""
        parts = [f"{name} {seconds:.1f} s" for name, seconds in self.startup.items() if seconds]
        if self.loading_seconds:
            parts.append(f"and in other workers {self.loading_seconds:.1f} s to load")
        return ", ".join(parts)

    @classmethod
    def of(cls, events: Iterable[Event], timings: Mapping[str, float], **known: Any) -> Report:
        """Return the report that events add up to, beside what is known otherwise.

        Args:
          events: of the run.
          timings: where the driver's time went until the first generation.
          **known: the other fields.
        """
        told = list(events)
        prepared = [event for event in told if isinstance(event, Prepared)]
        counts = ("compiles", "loads", "restores", "small_compiles", "calibration_compiles")
        sums = {name: sum(getattr(event, name) for event in prepared) for name in counts}
        lost = sum(isinstance(event, WorkerLost) for event in told)
        # Variants are prepared side by side: the one that took longest is what was waited for.
        made = [dict(event.seconds) for event in prepared if not event.loads]
        slowest = max(made, key=_total, default={})
        startup = {**timings, "workers": max(0.0, timings["workers"] - _total(slowest)), **slowest}
        loading = max((_total(dict(e.seconds)) for e in prepared if e.loads), default=0.0)
        return cls(**sums, workers_lost=lost, startup=startup, loading_seconds=loading, **known)


def _total(seconds: Mapping[str, float]) -> float:
    return sum(seconds.values())
