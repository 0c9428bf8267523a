"""What new trials begin with: drawn from the space or by a sampler, or given as points."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from gradhpo.cluster import points
from gradhpo.cluster.objectives import Objectives
from gradhpo.cluster.points import Point
from gradhpo.cluster.samplers import Drawn, Sampler
from gradhpo.cluster.samplers.asking import asked
from gradhpo.cluster.samplers.past import Past
from gradhpo.cluster.space import Change, Changes, SearchSpace


@dataclasses.dataclass(frozen=True)
class Drawing:
    """Where the settings of new trials come from."""

    sampler: Sampler | None = None
    """None for the space's own draw."""
    points: tuple[Point, ...] = ()
    """What the first slots begin with."""
    first_seed: int | None = None
    """Of the first generation; None for the sweep's own."""

    @property
    def own(self) -> bool:
        """Whether the first generation is another than the sweep's seed alone decides."""
        return self != Drawing()

    def changes(
        self,
        space: SearchSpace,
        rng: np.random.Generator,
        fresh: np.ndarray,
        history: Drawn | None,
    ) -> Changes:
        """Return the settings of new trials in one population, in the slots where `fresh`.

        Args:
          space: of its combination of choices.
          rng: the decision's generator.
          fresh: `(slots,)` of the population.
          history: what a sampler is told.
        """
        if self.sampler is None or history is None:
            return space.draw(rng, fresh)
        made = _kept(space, fresh)
        drawn = asked(self.sampler, space, history, rng, int(fresh.sum()))
        for name, column in drawn.items():
            made[name].add[fresh] = column
        return made

    def first(
        self, space: SearchSpace, objectives: Objectives, seed: int, variant: np.ndarray
    ) -> Changes:
        """Return the settings of the first generation.

        Args:
          space: what is drawn.
          objectives: what a sampler's scores are to be of.
          seed: the sweep's.
          variant: `(slots,)`, the combination of choices in each.
        """
        n = len(variant)
        made = space.draw_first(np.random.default_rng([self.seed(seed), 0]), variant)
        for name, (slots, numbers) in points.stored(self.points, space, n).items():
            made[name].add[slots] = numbers
        if self.sampler is None:
            return made
        past, given = self.past(space, objectives, seed, n), self.given(space, n)
        past.begin(0, given, stored_in(made), given, variant)
        for number, combination in enumerate(space.variants()):
            part, of = np.flatnonzero(variant == number), space.of(combination)
            fresh, history = ~given[part], past.history(number)
            rng = np.random.default_rng([self.seed(seed), 0, number])
            if fresh.any():
                for name, change in self.changes(of, rng, fresh, history).items():
                    made[name].add[part] = np.where(fresh, change.add, made[name].add[part])
        return made

    def seed(self, seed: int) -> int:
        """Return what decides the first generation, of a sweep with this seed."""
        return seed if self.first_seed is None else self.first_seed

    def past(self, space: SearchSpace, objectives: Objectives, seed: int, population: int) -> Past:
        """Return what a sampler is told of, before the first generation."""
        return Past(space, objectives, population, self.seed(seed))

    def given(self, space: SearchSpace, population: int) -> np.ndarray:
        """Return which slots begin with a point."""
        found = np.zeros(population, bool)
        found[points.slots_of(self.points, space, population)] = True
        return found


def _kept(space: SearchSpace, fresh: np.ndarray) -> Changes:
    """Return changes that set what cannot be more than one number; the others are to come."""
    n = len(fresh)
    return {
        name: Change(fresh, np.zeros(n), np.full(n, about.bounds[0]))
        for name, about in space.settings().items()
    }


def stored_in(changes: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return what new trials drew, by name of a setting, from a decision's changes.

    NaN where nothing was: in combinations of choices without that setting, and in other slots.
    """
    return {n: np.where(change.mask, change.add, np.nan) for n, change in changes.items()}
