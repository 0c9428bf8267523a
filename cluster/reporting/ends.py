"""Of each trial of a sweep its last generation, in columns."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from gradhpo.cluster.reporting.followed import Followed


class Ends(NamedTuple):
    """Each `(trials,)`."""

    trial: np.ndarray
    generation: np.ndarray
    slot: np.ndarray
    variant: np.ndarray
    diverged: np.ndarray
    """The step of the generation at which it diverged, 0 for none."""

    def at(self, rows: np.ndarray) -> np.ndarray:
        """Return the numbers of `(generations, slots)` that these trials had."""
        return rows[self.generation, self.slot]

    def some(self, which: np.ndarray) -> Ends:
        """Return these of them."""
        return Ends(*(column[which] for column in self))


def ends(followed: Followed) -> Ends:
    """Return the end of every trial, in the order of their numbers."""
    of = followed.generations
    slots = followed.layout.population
    trial = np.array([one.trial for one in of], int).reshape(-1, slots)
    different, back = np.unique(trial.ravel()[::-1], return_index=True)
    last = trial.size - 1 - back[different >= 0]
    generation, slot = last // slots, last % slots
    variant = np.array([one.variant for one in of], int).reshape(-1, slots)
    diverged = np.array([one.diverged for one in of], int).reshape(-1, slots)
    made = Ends(different[different >= 0], generation, slot, generation, generation)
    return made._replace(variant=made.at(variant), diverged=made.at(diverged))
