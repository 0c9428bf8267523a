"""What schedulers see: the table of each population after a generation, and those before it."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from gradhpo.cluster import columns as names
from gradhpo.cluster.columns import BORN, PARENT, TRIAL, VARIANT, Columns
from gradhpo.cluster.objectives import Objectives
from gradhpo.cluster.schedulers import NEW, Table
from gradhpo.cluster.space import SearchSpace

IDLE = 100
"""Generations after which a table is forgotten for which no scheduler asked meanwhile."""


class History:
    """The tables of a sweep's generations.

    From the first question of a scheduler on, what it asked for and what comes is kept in memory,
    8 bytes for each column and slot: a table is read once, or again after `IDLE` generations.
    Nothing is kept for schedulers that never ask.

    Args:
      beginning: `(slots,)`, each slot's combination of choices when the sweep begins; what a
        table says goes before.
      space: what is searched.
      objectives: what is compared.
      read: returns a generation's columns, which the storage may have or not have yet.
    """

    def __init__(
        self,
        beginning: np.ndarray,
        space: SearchSpace,
        objectives: Objectives,
        read: Callable[[int], Columns],
    ) -> None:
        self._beginning = beginning
        self._settings = [list(space.of(one).settings()) for one in space.variants()]
        self._objectives, self._read = objectives, read
        self._kept: dict[int, dict[int, Table]] = {}
        self._used: dict[int, int] = {}
        """By generation of a table that is kept, the last one in which it was asked for."""
        self._now, self._asked = -1, False

    def tables(self, generation: int, columns: Columns) -> dict[int, Table]:
        """Return the tables of a generation that was computed, by number of a combination."""
        self._now = generation
        made = self._made(generation, columns)
        if self._asked:
            self._kept[generation], self._used[generation] = made, generation
            self._keep({g for g, used in self._used.items() if generation - used < IDLE})
        return made

    def forget_after(self, generation: int) -> None:
        """Forget the tables of the generations after this one, which are computed again."""
        self._keep({g for g in self._kept if g <= generation})

    def _keep(self, generations: set[int]) -> None:
        self._kept = {g: made for g, made in self._kept.items() if g in generations}
        self._used = {g: used for g, used in self._used.items() if g in generations}

    def _earlier(self, variant: int, generation: int) -> Table:
        self._asked = True
        if generation not in self._kept:
            self._kept[generation] = self._made(generation, self._read(generation))
        self._used[generation] = self._now
        return self._kept[generation][variant]

    def _made(self, generation: int, columns: Columns) -> dict[int, Table]:
        variant = columns.get(VARIANT, self._beginning)
        there = np.unique(variant).tolist()
        return {v: self._table(v, np.flatnonzero(variant == v), generation, columns) for v in there}

    def _table(self, variant: int, part: np.ndarray, generation: int, columns: Columns) -> Table:
        parents = columns[PARENT][part]
        measured = {n: _frozen(columns[n][part].copy()) for n in names.measured(columns)}

        def column(name: str) -> np.ndarray:
            return measured[name] if name in measured else _frozen(columns[name][part].copy())

        compared = {name: columns[name][part] for name in self._objectives.names}
        scores = self._objectives.scores(compared)
        return Table(
            generation=generation,
            score=_frozen(self._objectives.score(compared)),
            trial=column(TRIAL),
            age=_frozen(generation - columns[BORN][part] + 1),
            values={name: column(names.setting(name)) for name in self._settings[variant]},
            metrics=measured,
            parent=_frozen(np.where(parents == NEW, NEW, np.searchsorted(part, parents))),
            earlier=functools.partial(self._earlier, variant),
            objectives=dict(zip(compared, _frozen(scores.T), strict=True)),
            slots=_frozen(part),
        )


def _frozen(array: np.ndarray) -> np.ndarray:
    """Return an array that cannot be written: a scheduler must not change the sweep's table."""
    array.setflags(write=False)
    return array
