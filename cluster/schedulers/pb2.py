"""Population-based bandits: the copies' settings come from a time-varying Gaussian process."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from gradhpo.cluster.schedulers import bandit
from gradhpo.cluster.schedulers.decision import Decision
from gradhpo.cluster.schedulers.table import NEW, Table
from gradhpo.cluster.schedulers.truncation import check_quantile, truncated
from gradhpo.cluster.space import Change, SearchSpace
from gradhpo.errors import check_count, check_number
from gradhpo.observers.packages import require

FEWEST = 4
"""Rows that a process is fitted to."""
CLIP = 2.0
"""Deviations from the mean beyond which a reward is as good, or as bad, as any."""


@dataclasses.dataclass(frozen=True)
class PB2:
    """Population-based bandits (Parker-Holder et al. 2020).

    The worst slots copy the best, as in `PBT`; their settings are not perturbed, but those with the
    highest upper confidence bound of the score's improvement over the next generation, by a
    Gaussian process over settings and time, see `gaussian_process`. Each choice counts on what the
    others of the generation, and the trials that go on, will tell. A setting is what a table has:
    the one at the generation's end. Categorical settings are a coordinate for each number.

    Decisions depend on the table, those before it, and the seed; they are made by one thread, and
    are equal to the bit with one version of NumPy, SciPy and scikit-learn on one kind of processor.
    Once in the journal they are read, and not made again. Needs `pip install 'gradhpo[search]'`.

    Args:
      quantile: in (0, 0.5], the share that copies, and the share that is copied.
      rows: the newest rows of which the process is made: a decision's time grows with their cube.
      candidates: draws from the space of which settings are chosen.
      exploration: κ of μ + κ·σ, at least 0; by default √(0.2 + log(0.4·n)) of n rows.

    Raises:
      ValueError: for an argument out of range.
    """

    quantile: float = 0.25
    rows: int = 256
    candidates: int = 512
    exploration: float | None = None

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {
            "quantile": check_quantile("PB2", self.quantile),
            "rows": check_count("PB2: rows", self.rows, FEWEST),
            "candidates": check_count("PB2: candidates", self.candidates),
        }
        if (kappa := self.exploration) is not None:
            checked["exploration"] = check_number("PB2: exploration", kappa, 0, float("inf"))
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def require(self) -> None:
        """Raise if scikit-learn is not installed.

        Raises:
          ImportError: saying what to install.
        """
        require("the scheduler PB2", "sklearn", "scikit-learn", "search")

    def __call__(self, table: Table, space: SearchSpace, rng: np.random.Generator) -> Decision:
        """Decide."""
        parents = truncated(table, self.quantile, rng)
        copies = (parents != NEW) & (parents != np.arange(len(parents)))
        drawn = {n: d.sample(rng, self.candidates) for n, d in space.settings().items()}
        if not drawn or not copies.any():
            return Decision(parents)
        chosen = np.zeros(len(parents), np.int64)
        chosen[copies] = self._chosen(table, space, drawn, parents, int(copies.sum()))
        zeros = np.zeros(len(parents))
        changes = {name: Change(copies, zeros, values[chosen]) for name, values in drawn.items()}
        return Decision(parents, changes)

    def _chosen(
        self,
        table: Table,
        space: SearchSpace,
        drawn: dict[str, np.ndarray],
        parents: np.ndarray,
        count: int,
    ) -> np.ndarray:
        """Return which of the draws the copies get."""
        from gradhpo.cluster.schedulers import gaussian_process as gp

        points, rewards = observed(table, space, self.rows)
        if len(rewards) < FEWEST:
            return np.arange(count) % self.candidates  # they are random already
        stays = thinned(np.flatnonzero(parents == np.arange(len(parents))), self.rows)
        going = placed(space, {n: x[stays] for n, x in table.values.items()}, table.generation + 1)
        at = placed(space, drawn, table.generation + 1)
        kappa = self.exploration
        kappa = bandit.exploration(len(rewards)) if kappa is None else kappa
        with gp.single_threaded():
            process = gp.fitted(points, standardized(rewards))
            known = np.concatenate([points, going[np.isfinite(going).all(1)]])
            covariance = gp.covariance(process, known, at)
            return bandit.batch(process.predict(at), covariance, gp.noise(process), count, kappa)


def observed(table: Table, space: SearchSpace, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the newest rows, settings and time, and by how much each improved the score.

    A trial that diverged improved it as little as any other row. Of a generation that is not taken
    as a whole, the rows are evenly spread over its slots.
    """
    points: list[np.ndarray] = []
    rewards: list[np.ndarray] = []
    for generation in range(table.generation, 0, -1):
        if most <= 0:
            break
        then = table.history(generation)
        reward = np.where(then.diverged(), -np.inf, then.improvement())
        point = placed(space, then.values, generation)
        taken = thinned(np.flatnonzero(~np.isnan(reward) & np.isfinite(point).all(1)), most)
        points.append(point[taken])
        rewards.append(reward[taken])
        most -= len(taken)
    if not points:
        return np.empty((0, 1)), np.empty(0)
    reward = np.concatenate(rewards)
    there = np.isfinite(reward)
    worst = reward[there].min() if there.any() else 0.0
    return np.concatenate(points), np.where(there, reward, worst)


def placed(space: SearchSpace, values: Any, generation: int) -> np.ndarray:
    """Return settings as coordinates from 0 to 1, and the generation last: `(n, d + 1)`."""
    with np.errstate(invalid="ignore", divide="ignore"):
        parts = [kind.unit(values[name]) for name, kind in space.settings().items()]
    rows = np.concatenate(parts, axis=1)
    time = np.full((len(rows), 1), float(generation))
    return np.concatenate([np.clip(rows, 0, 1), time], axis=1)


def standardized(rewards: np.ndarray) -> np.ndarray:
    """Return rewards in deviations from their mean, within ±`CLIP`."""
    return np.clip((rewards - rewards.mean()) / (rewards.std() + 1e-12), -CLIP, CLIP)


def thinned(indices: np.ndarray, most: int) -> np.ndarray:
    """Return at most so many of some indices, evenly spread."""
    if len(indices) <= most:
        return indices
    return indices[np.linspace(0, len(indices) - 1, most).astype(np.int64)]
