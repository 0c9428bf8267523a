"""The ages at which trials are compared, and at which they are complete."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from gradhpo.errors import check_count


@dataclasses.dataclass(frozen=True)
class Rungs:
    """What schedulers with rungs share: where they are, see `SuccessiveHalving` and `ASHA`."""

    reduction: int = 3
    grace: int = 1
    longest: int | None = None

    def __post_init__(self) -> None:
        checked = {
            "reduction": check_count("reduction", self.reduction, 2),
            "grace": check_count("grace", self.grace),
        }
        if self.longest is not None:
            checked["longest"] = check_count("longest", self.longest, self.grace)
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def rungs(self, oldest: int) -> Iterator[int]:
        """Yield the ages at which trials are compared, up to that of the oldest."""
        rung = self.grace
        while rung <= oldest:
            yield rung
            rung *= self.reduction

    def life(self, slots: int) -> int:
        """Return the age at which a trial is complete: by default the last rung of the slots."""
        if self.longest is not None:
            return self.longest
        return self.grace * self.reduction ** int(np.log(slots) / np.log(self.reduction) + 1e-9)
