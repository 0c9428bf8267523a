"""What schedulers see: the table of each population after a generation, and those before it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from gradhpo.cluster import columns as names
from gradhpo.cluster.columns import BORN, PARENT, TRIAL, Columns
from gradhpo.cluster.schedulers import NEW, Table

if TYPE_CHECKING:
    from gradhpo.cluster.controller import Layout, Rules


class History:
    """The tables of a sweep's generations, each made once.

    From the first question of a scheduler on all that it asked for, and all that come, are kept in
    memory: 8 bytes for each column and slot. Nothing is kept for schedulers that never ask.

    Args:
      layout: which slots are whose.
      rules: what is compared, and searched.
      read: returns a generation's columns, which the storage may have or not have yet.
    """

    def __init__(self, layout: Layout, rules: Rules, read: Callable[[int], Columns]) -> None:
        self._layout, self._rules, self._read = layout, rules, read
        self._kept: dict[int, list[Table]] = {}
        self._asked = False

    def tables(self, generation: int, columns: Columns) -> list[Table]:
        """Return the tables of a generation, variant by variant."""
        made = [self._table(v, generation, columns) for v in range(self._layout.variants)]
        if self._asked:
            self._kept[generation] = made
        return made

    def forget_after(self, generation: int) -> None:
        """Forget the tables of the generations after this one, which are computed again."""
        self._kept = {g: made for g, made in self._kept.items() if g <= generation}

    def _earlier(self, variant: int, generation: int) -> Table:
        self._asked = True
        if generation not in self._kept:
            self._kept[generation] = self.tables(generation, self._read(generation))
        return self._kept[generation][variant]

    def _table(self, variant: int, generation: int, columns: Columns) -> Table:
        part, rules = self._layout.population_of(variant), self._rules
        parents = columns[PARENT][part]

        measured = {n: _frozen(columns[n][part].copy()) for n in names.measured(columns)}

        def column(name: str) -> np.ndarray:
            return measured[name] if name in measured else _frozen(columns[name][part].copy())

        compared = {name: columns[name][part] for name in rules.objectives.names}
        scores = rules.objectives.scores(compared)
        return Table(
            generation=generation,
            score=_frozen(rules.objectives.score(compared)),
            trial=column(TRIAL),
            age=_frozen(generation - columns[BORN][part] + 1),
            values={name: column(names.setting(name)) for name in rules.space.settings()},
            metrics=measured,
            parent=_frozen(np.where(parents == NEW, NEW, parents - part.start)),
            earlier=functools.partial(self._earlier, variant),
            objectives=dict(zip(compared, _frozen(scores.T), strict=True)),
        )


def _frozen(array: np.ndarray) -> np.ndarray:
    """Return an array that cannot be written: a scheduler must not change the sweep's table."""
    array.setflags(write=False)
    return array
