"""When a trial estimates its own settings, and when its episodes end: by the number of its step."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, Protocol, TypeAlias

from gradhpo.errors import check_count, check_hashable

EpisodeInit: TypeAlias = Literal["reptile", "fresh"]
"""Where an episode starts: from φ, or from weights that `Problem.init` makes anew."""


class Calibrated(Protocol):
    """What a timetable asks of an optimizer."""

    @property
    def T(self) -> int:  # noqa: N802
        """Steps in an episode, and batches that a calibration takes."""
        ...

    @property
    def calibration_period(self) -> int:
        """Episodes between two calibrations; 0 for none."""
        ...


@dataclasses.dataclass(frozen=True)
class Timetable:
    """What happens before and after which step, counted from 0; steps may be traced."""

    episode_length: int | None
    """Steps in an episode; None for one episode without end."""
    period: int
    """Steps between calibrations; 0 for one before step 0 and no more."""
    T: int
    """Batches that a calibration takes; 0 for no calibration."""

    @classmethod
    def of(cls, optimizer: Calibrated, episode_length: int | None) -> Timetable:
        """Return an optimizer's timetable.

        Raises:
          ValueError: if the episodes are not of the length for which it estimates its settings.
        """
        calibrates = optimizer.calibration_period > 0
        if episode_length is not None:
            check_count("episode_length", episode_length)
            if calibrates and episode_length != optimizer.T:
                raise ValueError(
                    f"episode_length must be the optimizer's T, the length of the episodes that "
                    f"{type(optimizer).__name__} estimates θ for; got "
                    f"episode_length={episode_length} and T={optimizer.T}"
                )
        period = (episode_length or 0) * optimizer.calibration_period
        return cls(episode_length, period, T=optimizer.T if calibrates else 0)

    def calibrates_at(self, step: Any) -> Any:
        """Whether a calibration comes before this step."""
        if not self.T:
            return False
        return step % self.period == 0 if self.period else step == 0

    def pairs_before(self, step: int) -> int:
        """Return how many pairs of batches come before a step, and before a calibration there."""
        calibrations = -(-step // self.period) if self.period else int(step > 0)
        return step + self.T * calibrations

    def ends_episode(self, step: Any) -> Any:
        """Whether an episode ends with this step."""
        return False if self.episode_length is None else (step + 1) % self.episode_length == 0

    def begins_episode(self, step: Any) -> Any:
        """Whether an episode after the first begins with this step."""
        return False if self.episode_length is None else (step > 0) & self.ends_episode(step - 1)

    def next_calibration(self, step: int) -> int | None:
        """Return the first step after this one before which a calibration comes, if any does."""
        if not self.T or not self.period:
            return None
        return (step // self.period + 1) * self.period


def schedule_and_rate(lr_hyper: Any) -> tuple[Any, Any]:
    """Return `lr_hyper` as a schedule, if it is a function of the step, or else as a rate.

    Raises:
      TypeError: if a compiled program cannot be looked up by the function.
    """
    if not callable(lr_hyper):
        return None, lr_hyper
    check_hashable("lr_hyper", lr_hyper)
    return lr_hyper, None


def starts_fresh(episode_init: Any, episode_length: int | None, lr_reptile: Any) -> bool:
    """Return whether episodes start from new weights.

    Raises:
      ValueError: for an unknown word, or for "fresh" without episodes or with Reptile.
    """
    if episode_init not in ("reptile", "fresh"):
        raise ValueError(f'episode_init must be "reptile" or "fresh", got {episode_init!r}')
    if episode_init == "fresh" and (episode_length is None or lr_reptile != 1):
        raise ValueError('episode_init="fresh" needs episode_length, and takes no lr_reptile')
    return episode_init == "fresh"
