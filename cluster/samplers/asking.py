"""Asking a sampler, and checking what it answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np

from gradhpo.cluster.numbers_of import stored_of
from gradhpo.cluster.samplers.drawn import Drawn
from gradhpo.cluster.space import SearchSpace


@runtime_checkable
class Sampler(Protocol):
    """What draws the settings of new trials; a function of what it is given, and of nothing else.

    What it drew is saved with the table, and not asked for again; but the generation in flight at
    a kill is, with the same history and the same generator.
    """

    def ask(
        self, space: SearchSpace, history: Drawn, rng: np.random.Generator, n: int
    ) -> Mapping[str, Any]:
        """Return n numbers for each name of `space.searched()`, within its bounds.

        Args:
          space: what is searched.
          history: the new trials so far, and what came of them.
          rng: the decision's generator.
          n: how many new trials there are.
        """
        ...


def asked(
    sampler: Sampler, space: SearchSpace, history: Drawn, rng: np.random.Generator, n: int
) -> dict[str, np.ndarray]:
    """Return what a sampler draws for n trials, by name, as it is stored in hyperparameters.

    Raises:
      TypeError: if it does not answer with numbers by name.
      ValueError: for a name too few or too many, a wrong length, or a number outside of the space.
    """
    answer = sampler.ask(space, history, rng, n)
    searched, who = space.searched(), f"{type(sampler).__name__}.ask"
    if not isinstance(answer, Mapping):
        raise TypeError(f"{who} must return numbers by name, got {type(answer).__name__}")
    if set(answer) != set(searched):
        raise ValueError(f"{who} must return {list(searched)}, got {list(answer)}")
    stored: dict[str, np.ndarray] = {}
    for name, about in searched.items():
        numbers = np.asarray(answer[name], float)
        if numbers.shape != (n,):
            raise ValueError(f"{who}: {name!r} must be {n} numbers, got shape {numbers.shape}")
        stored[name] = stored_of(f"{who}: {name!r}", about, numbers)
    return stored
