"""Random search: independent trials."""

from __future__ import annotations

import dataclasses

import numpy as np

from gradhpo.cluster.schedulers.decision import Decision
from gradhpo.cluster.schedulers.table import NEW, Table
from gradhpo.cluster.space import SearchSpace
from gradhpo.errors import check_count


@dataclasses.dataclass(frozen=True)
class RandomSearch:
    """Independent trials from the search space; only diverged ones are replaced.

    Args:
      trial_generations: generations after which a trial is complete and a new one takes its slot;
        None for the whole sweep.

    Raises:
      ValueError: for an argument out of range.
    """

    trial_generations: int | None = None

    def __post_init__(self) -> None:
        if (given := self.trial_generations) is not None:
            object.__setattr__(self, "trial_generations", check_count("trial_generations", given))

    def __call__(self, table: Table, space: SearchSpace, rng: np.random.Generator) -> Decision:
        """Decide."""
        del space, rng
        stopped = table.diverged()
        if self.trial_generations is not None:
            stopped |= table.age >= self.trial_generations
        return Decision(np.where(stopped, NEW, np.arange(len(table.score))))
