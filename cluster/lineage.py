"""Where trials come from: who ran in which slot, who copied whom, and a trial's life."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from gradhpo.checkpoints import DamagedFile
from gradhpo.cluster.columns import PARENT, TRIAL, decision_of, first_of
from gradhpo.cluster.orders import Order
from gradhpo.cluster.plan import Layout, Plan, Rules, after, first_plan, plan_of
from gradhpo.cluster.schedulers import NEW
from gradhpo.cluster.space import LR_HYPER, Change, Changes
from gradhpo.cluster.tables import Tables


class Copy(NamedTuple):
    """A trial that took another's weights."""

    generation: int
    """The first in which it ran."""
    trial: int
    source: int
    """The trial that it copied."""


class Turn(NamedTuple):
    """One generation of a trial's life."""

    generation: int
    trial: int
    slot: int
    lr_hyper: float | None
    changes: dict[str, tuple[float, float]]
    """By name of a hyperparameter, `(multiply, add)`: how it changed before the generation."""

    def order(self, slots: int, fresh: bool) -> Order:
        """Return what lets a shard take this generation in all of its slots."""
        changes = {
            name: Change(np.ones(slots, bool), np.full(slots, multiply), np.full(slots, add))
            for name, (multiply, add) in self.changes.items()
        }
        return Order(
            shard=0,
            variant=0,
            generation=self.generation,
            trials=np.full(slots, self.trial, np.uint32),
            parents=np.arange(slots, dtype=np.int32),
            fresh=np.full(slots, fresh),
            lr_hyper=None if self.lr_hyper is None else np.full(slots, self.lr_hyper),
            changes=changes,
            start=None,
        )


class Lineage:
    """Reads a sweep's tables backwards.

    Args:
      tables: of the sweep.
      layout: its shards.
      rules: what decided; the scheduler is not asked.
      told: whether the first table says what was drawn, and not the seed.
    """

    def __init__(self, tables: Tables, layout: Layout, rules: Rules, told: bool) -> None:
        self._tables, self._layout, self._rules, self._told = tables, layout, rules, told
        self._plans: dict[int, Plan] = {}

    def plan(self, generation: int) -> Plan:
        """Return who ran in which slot; kept, since every trial of a front goes back through it."""
        if generation not in self._plans:
            self._plans[generation] = self._read(generation)
        return self._plans[generation]

    def _read(self, generation: int) -> Plan:
        """Return what the table says, or the one before it, which decided."""
        try:
            return plan_of(generation, self._tables.at(generation), self._layout)
        except DamagedFile:
            if generation == 0 and self._told:
                raise
            if generation == 0:
                return first_plan(self._layout, self._rules)
            before = self._tables.at(generation - 1)
            return after(generation - 1, before, self._layout, self._rules)

    def variant(self, slot: int, generation: int) -> int:
        """Return the number of the combination of choices of a slot's trial."""
        return int(self.plan(generation).variant[slot])

    def rate(self, slot: int, generation: int) -> float | None:
        """Return a trial's outer rate; None where its combination of choices has none."""
        rates = self.plan(generation).lr_hyper
        return None if rates is None or np.isnan(rates[slot]) else float(rates[slot])

    def copies(self, generations: int) -> list[Copy]:
        """Return which trial copied which, and when, in so many generations."""
        made: list[Copy] = []
        for generation in range(1, generations):
            table, before = self._tables.at(generation), self._tables.at(generation - 1)
            parents = table[PARENT]
            copied = (parents != NEW) & (parents != np.arange(len(parents)))
            made += [
                Copy(generation, int(table[TRIAL][s]), int(before[TRIAL][parents[s]]))
                for s in np.flatnonzero(copied)
            ]
        return made

    def trials(self, slot: int, generation: int) -> list[int]:
        """Return the trials that a slot's comes from; two damaged tables in a row cut it short."""
        trials: list[int] = []
        for before in range(generation, -1, -1):
            try:
                plan = self.plan(before)
            except DamagedFile:
                break
            trials.append(int(plan.trial[slot]))
            parent = int(plan.parents[slot])
            if parent == NEW:
                break
            slot = parent
        return list(dict.fromkeys(reversed(trials)))

    def turns(self, slot: int, generation: int) -> list[Turn]:
        """Return the life of a slot's trial, through the trials that it came from.

        Raises:
          DamagedFile: if a table that says how a setting changed is damaged.
        """
        turns = list[Turn]()
        for at in range(generation, -1, -1):
            plan = self.plan(at)
            before = decision_of(self._tables.at(at - 1)).changes if at else None
            if before is None:
                before = self._first_changes()
            changes = {
                name: (float(change.multiply[slot]), float(change.add[slot]))
                for name, change in before.items()
                if change.mask[slot] and name != LR_HYPER
            }
            turns.append(Turn(at, int(plan.trial[slot]), slot, self.rate(slot, at), changes))
            parent = int(plan.parents[slot])
            if parent == NEW:
                break
            slot = parent
        return turns[::-1]

    def _first_changes(self) -> Mapping[str, Change]:
        first = self._tables.at(0) if self._told else None
        return first_changes(first, self._layout, self._rules)


def first_changes(table: Mapping[str, np.ndarray] | None, layout: Layout, rules: Rules) -> Changes:
    """Return what the trials of the first generation began with.

    Args:
      table: the first one, where it says what was drawn; None where the seed does.
      layout: of the sweep.
      rules: of the sweep.
    """
    if table is not None:
        first = first_of(table)
        return {n: Change(np.isfinite(x), np.zeros(len(x)), x) for n, x in first.items()}
    about = (rules.space, rules.objectives, rules.seed, layout.beginning())
    return rules.drawing.first(*about)
