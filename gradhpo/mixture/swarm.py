"""Fixed mixtures: many models trained as one batched population, and a regression on their losses.

The regression is RegMix's idea (Liu et al., ICLR 2025): a model of the loss as a function of the
mixture, whose minimum is the mixture that is used.
"""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from gradhpo.algorithms import FOOptimizer
from gradhpo.errors import check_count, check_instance, check_number
from gradhpo.mixture.problem import WEIGHTS, Mixture, check_weights
from gradhpo.parallel import Population
from gradhpo.parallel.batching import Batching
from gradhpo.state import BilevelState

DRAWN, AVERAGED = 100_000, 100
"""RegMix's own: of so many mixtures drawn, the mean of so many that are predicted to be best."""


def train_fixed(
    mixture: Mixture,
    weights: Any,
    inner_optimizer: Any,
    steps: int,
    keys: jax.Array,
    *,
    batching: Batching = "auto",
    mesh: Mesh | None = None,
) -> dict[str, np.ndarray]:
    """Train a model on each of many mixtures that are held, as a `Population`.

    Args:
      mixture: the domains and targets.
      weights: `(n, domains)`, each on the simplex.
      inner_optimizer: what trains the models.
      steps: of each.
      keys: `(n,)`, one for each; equal keys give equal first weights and equal batches.
      batching: how the models are laid out, see `Population`.
      mesh: of devices over which they are divided.

    Returns:
      The metrics of `mixture.problem` after the last step, `(n,)` each; NaN for a model that
      diverged.

    Raises:
      ValueError: for weights off the simplex, or a number of keys that is another.
    """
    state, population = trained(mixture, weights, inner_optimizer, steps, keys, batching, mesh)
    found = jax.jit(population.trace_measure)(state, population.data)
    diverged = np.asarray(state.metadata["diverged_at"]) > 0
    return {name: np.where(diverged, np.nan, np.asarray(row)) for name, row in found.items()}


def trained(
    mixture: Mixture,
    weights: Any,
    inner_optimizer: Any,
    steps: int,
    keys: jax.Array,
    batching: Batching = "auto",
    mesh: Mesh | None = None,
) -> tuple[BilevelState, Population]:
    """Return the models after training, with a leading axis, and the population that they are."""
    check_instance("mixture", mixture, Mixture)
    check_count("steps", steps)
    optimizer = FOOptimizer(inner_optimizer, optax.set_to_zero())
    lam = start_fixed(mixture, weights)
    population = Population(mixture.held, optimizer, len(lam[WEIGHTS]), mesh, batching)
    state = population.init(keys, hyperparams=lam)
    return population.run(state, steps, keys)[0], population


def start_fixed(mixture: Mixture, weights: Any) -> dict[str, jax.Array]:
    """Return the hyperparameters of models on these mixtures, with a leading axis."""
    weights = check_weights("weights", np.atleast_2d(weights), len(mixture.names))
    return jax.vmap(mixture.hyperparams_with)(jnp.asarray(weights))


def simplex_grid(domains: int, parts: int) -> np.ndarray:
    """Return all mixtures whose weights are multiples of `1/parts`.

    A simplex-lattice design (Scheffé, Experiments with Mixtures, 1958).

    Returns:
      float32, `(n, domains)`; n is `comb(parts + domains - 1, domains - 1)`: 45 for three domains
      and 8 parts.
    """
    check_count("domains", domains)
    check_count("parts", parts)
    places = range(parts + domains - 1)
    bars = np.array(list(itertools.combinations(places, domains - 1)), int).reshape(-1, domains - 1)
    ends = np.pad(bars, ((0, 0), (1, 1)), constant_values=((0, 0), (-1, parts + domains - 1)))
    return ((np.diff(ends, axis=1) - 1) / parts).astype(np.float32)


def predicted_best(
    weights: Any, losses: Any, *, floor: float = 0.0, ridge: float = 1e-3, seed: int = 0
) -> np.ndarray:
    """Return the mixture that a regression on a swarm's losses predicts to be best.

    A quadratic polynomial of the mixture, by least squares, and the mean of the hundred best of
    100,000 mixtures drawn uniformly, as RegMix simulates them; there the regression is linear, or
    of boosted trees.

    Args:
      weights: `(n, domains)`, of the swarm.
      losses: `(n,)`; those that are not finite are left out.
      floor: the least weight of a domain.
      ridge: λ of the ridge regression, on centred losses of unit variance.
      seed: decides what is drawn.

    Returns:
      float32, `(domains,)`.

    Raises:
      ValueError: for weights off the simplex, or fewer than two finite losses.
    """
    losses, weights = np.asarray(losses, float), np.asarray(weights, float)
    domains = weights.shape[-1]
    check_weights("weights", weights, domains)
    check_number("ridge", ridge, 0, np.inf, open_low=True)
    there = np.isfinite(losses)
    if there.sum() < 2:
        raise ValueError(f"losses must have two finite numbers at least, got {there.sum()}")
    x, y = _quadratic(weights[there]), losses[there]
    y = (y - y.mean()) / (y.std() or 1)
    fitted = np.linalg.solve(x.T @ x + ridge * np.eye(x.shape[1]), x.T @ y)
    drawn = np.random.default_rng(seed).dirichlet(np.ones(domains), DRAWN)
    drawn = floor + (1 - domains * floor) * drawn
    best = np.argsort(_quadratic(drawn) @ fitted)[:AVERAGED]
    return drawn[best].mean(0).astype(np.float32)


def _quadratic(p: np.ndarray) -> np.ndarray:
    """Return Scheffé's terms: each weight, and each product of two."""
    pairs = itertools.combinations(range(p.shape[1]), 2)
    return np.column_stack([p, *(p[:, i] * p[:, j] for i, j in pairs)])
