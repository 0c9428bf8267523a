"""Population-based training: the worst copy the best, and move on (Jaderberg et al. 2017)."""

from __future__ import annotations

import dataclasses

import numpy as np

from gradhpo.cluster.schedulers.decision import Decision
from gradhpo.cluster.schedulers.table import Table
from gradhpo.cluster.schedulers.truncation import check_quantile, truncated
from gradhpo.cluster.space import SearchSpace
from gradhpo.errors import check_number


@dataclasses.dataclass(frozen=True)
class PBT:
    """Population-based training (Jaderberg et al. 2017): the worst copy the best, and move on.

    The worst slots take weights, hyperparameters and optimizer states of slots drawn from the
    best, and perturb the settings of the search space. Diverged trials count as worst, however
    many there are; where nothing is left to copy, trials start anew.

    Args:
      quantile: in (0, 0.5], the share that copies, and the share that is copied.
      resample: in [0, 1], the probability that a setting is drawn anew instead of multiplied.
      factors: what settings are multiplied by, one at random.

    Raises:
      ValueError: for an argument out of range.
    """

    quantile: float = 0.25
    resample: float = 0.25
    factors: tuple[float, ...] = (0.8, 1.25)

    def __post_init__(self) -> None:
        quantile = check_quantile("PBT", self.quantile)
        resample = check_number("PBT: resample", self.resample, 0, 1)
        factors = tuple(float(f) for f in self.factors)
        if not factors or not all(0 < f < float("inf") for f in factors):
            raise ValueError(f"PBT: factors must be numbers above 0, got {self.factors}")
        for name, value in (("quantile", quantile), ("resample", resample), ("factors", factors)):
            object.__setattr__(self, name, value)

    def __call__(self, table: Table, space: SearchSpace, rng: np.random.Generator) -> Decision:
        """Decide."""
        parents = truncated(table, self.quantile, rng)
        changes = space.explore(
            rng, table.values, parents, factors=self.factors, resample=self.resample
        )
        return Decision(parents, changes)
