"""Runs that differ in their seed alone, as the slots of one `Population`: one program for all."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

import gradhpo
from gradhpo.parallel import Population


class Runs(NamedTuple):
    """What the runs gave, stacked over seeds."""

    state: gradhpo.BilevelState
    """At the end, every leaf with a leading axis of seeds."""
    data: Any
    """What `Problem.data` made for each seed, with that axis too."""
    evals: dict[str, np.ndarray]
    """`Problem.metrics` at each evaluation, `(evaluations, seeds)`."""
    steps: np.ndarray
    """The steps done at each evaluation, `(evaluations,)`."""

    @property
    def last(self) -> dict[str, np.ndarray]:
        """`Problem.metrics` at the end, `(seeds,)`."""
        return {name: values[-1] for name, values in self.evals.items()}


def run(
    problem: gradhpo.Problem,
    optimizer: gradhpo.BilevelOptimizer,
    steps: int,
    keys: jax.Array,
    evaluations: int = 20,
    **settings: Any,
) -> Runs:
    """Run a problem with each of the keys: its own split, corruption, weights and batches.

    Args:
      problem: with `batch` and `metrics`.
      optimizer: with an outer optimizer.
      steps: of every run.
      keys: `(seeds,)`; a run is `solve(problem, optimizer, steps, key)`.
      evaluations: how often to measure, evenly; at most once a step.
      settings: what `Population` also takes, such as `episode_length`.
    """
    population = Population(problem, optimizer, len(keys), data_key=keys, **settings)
    state = population.init(keys)
    measure = jax.jit(population.trace_measure)
    ends = np.unique(np.linspace(0, steps, min(evaluations, steps) + 1).round().astype(int))
    rows: list[dict[str, np.ndarray]] = []
    for taken in tqdm(np.diff(ends), leave=False, unit="evaluation"):
        state, _ = population.run(state, int(taken), keys)
        rows.append(jax.device_get(measure(state, population.data)))
    evals = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    return Runs(state, jax.device_get(population.data), evals, ends[1:])
