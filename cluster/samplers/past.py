"""The new trials of a sweep, kept from generation to generation: what a sampler is told of."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import numpy as np

from gradhpo.cluster.numbers_of import numbers_of
from gradhpo.cluster.objectives import Objectives
from gradhpo.cluster.samplers.drawn import Drawn
from gradhpo.cluster.schedulers import Table
from gradhpo.cluster.space import SearchSpace

SEED = 1
"""What sets the samplers' seed apart from all generators of decisions."""


class Past:
    """Every trial that was drawn; a function of the tables, from which it is made again.

    Args:
      space: what is drawn.
      objectives: what scores are of.
      slots: of the whole population.
      seed: of the first generation's draws.
    """

    def __init__(self, space: SearchSpace, objectives: Objectives, slots: int, seed: int) -> None:
        self._objectives, self._seed = objectives, seed
        self._rows = np.full(slots, -1)
        """Of the trial in each slot, its row; -1 for one that copied another."""
        self._variant = np.empty(0, int)
        """Of each row, the trial's combination of choices."""
        self._spaces = [space.of(one) for one in space.variants()]
        self._born, self._age = np.empty(0, int), np.empty(0, int)
        self._ended, self._given = np.empty(0, bool), np.empty(0, bool)
        self._scores = np.empty((0, len(objectives.names)))
        searched = [name for of in self._spaces for name in of.searched()]
        self._values = {name: np.empty(0) for name in searched}
        """NaN in combinations that have no such setting."""

    def begin(
        self,
        generation: int,
        fresh: np.ndarray,
        stored: Mapping[str, np.ndarray],
        given: np.ndarray,
        variant: np.ndarray,
    ) -> None:
        """Take in the new trials of a generation.

        Args:
          generation: in which they begin.
          fresh: `(slots,)`, whether a slot gets one.
          stored: by name of a setting, `(slots,)`: what they drew, as it is stored.
          given: `(slots,)`, whether it came from the sweep's points.
          variant: `(slots,)`, which combination of choices they are of.
        """
        slots = np.flatnonzero(fresh)
        n = len(slots)
        self._rows[slots] = len(self._born) + np.arange(n)
        self._variant = np.concatenate([self._variant, variant[slots]])
        self._born = np.concatenate([self._born, np.full(n, generation)])
        self._age = np.concatenate([self._age, np.zeros(n, int)])
        self._ended = np.concatenate([self._ended, np.zeros(n, bool)])
        self._given = np.concatenate([self._given, given[slots]])
        self._scores = np.concatenate([self._scores, np.full((n, self._scores.shape[1]), np.nan)])
        for name, column in self._values.items():
            numbers = self._numbers(name, variant[slots], stored[name][slots])
            self._values[name] = np.concatenate([column, numbers])

    def _numbers(self, name: str, variant: np.ndarray, stored: np.ndarray) -> np.ndarray:
        numbers = np.full(len(stored), np.nan)
        for number in np.unique(variant).tolist():
            about, here = self._spaces[number].searched().get(name), variant == number
            if about is not None:
                numbers[here] = numbers_of(about, stored[here])
        return numbers

    def begin_first(
        self, stored: Mapping[str, np.ndarray], given: np.ndarray, variant: np.ndarray
    ) -> None:
        """Take in the first generation, the points before all others; see `begin`."""
        self.begin(0, given, stored, given, variant)
        self.begin(0, ~given, stored, given, variant)

    def end(self, columns: Mapping[str, np.ndarray], generation: int, parents: np.ndarray) -> None:
        """Take in a generation's table, and who goes on."""
        scores = self._objectives.scores(columns)
        everybody = np.arange(len(parents))
        self._scores, self._age, self._ended = self._after(scores, everybody, generation, parents)
        self._rows = np.where(parents == np.arange(len(parents)), self._rows, -1)

    def copied(self) -> Past:
        """Return the same, to go on with apart."""
        made = copy.copy(self)
        made._rows, made._values = self._rows.copy(), dict(self._values)
        return made

    def history(
        self, variant: int, table: Table | None = None, parents: np.ndarray | None = None
    ) -> Drawn:
        """Return what a population's sampler is told.

        Args:
          variant: the population's number.
          table: its own, if a generation has run that was not taken in yet.
          parents: of all slots, who goes on then, as it was decided.
        """
        scores, age, ended = self._scores, self._age, self._ended
        if table is not None:
            assert parents is not None
            scores, age, ended = self._after(
                table.compared(), table.slots, table.generation, parents
            )
        own, searched = self._variant == variant, self._spaces[variant].searched()
        return Drawn(
            values={name: self._values[name][own] for name in searched},
            scores=scores[own],
            born=self._born[own],
            age=age[own],
            ended=ended[own],
            given=self._given[own],
            seed=int(np.random.default_rng([self._seed, 0, variant, SEED]).integers(2**31)),
        )

    def _after(
        self, scored: np.ndarray, part: np.ndarray, generation: int, parents: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return scores, ages, and who has ended, after a generation of some slots."""
        own = np.flatnonzero(self._rows[part] >= 0)
        slots = part[own]
        rows = self._rows[slots]
        scores, age, ended = self._scores.copy(), self._age.copy(), self._ended.copy()
        found = scored[own].astype(float)
        scores[rows] = np.where(np.isfinite(found).all(axis=1, keepdims=True), found, np.nan)
        age[rows] = generation + 1 - self._born[rows]
        ended[rows] = parents[slots] != slots
        return scores, age, ended
