"""DoReMi: domains are weighed by their excess loss over a reference model's (Xie et al. 2023).

`p_i ← p_i exp(η·excess_i)`, `excess_i = E max(ℓ_i(w) - ℓ_i(w_ref), 0)`, smoothed: group
distributionally robust optimization (Sagawa et al., ICLR 2020). It knows of no target.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradhpo.algorithms import FOOptimizer
from gradhpo.mixture.problem import WEIGHTS, Mixture
from gradhpo.mixture.simplex import entropic_descent
from gradhpo.mixture.swarm import start_fixed, trained
from gradhpo.parallel import Population
from gradhpo.parallel.batching import Batching
from gradhpo.problem import Problem
from gradhpo.state import PyTree
from gradhpo.task import Aux

REFERENCE = "reference"


def group_dro(
    mixture: Mixture,
    inner_optimizer: Any,
    steps: int,
    keys: jax.Array,
    *,
    learning_rate: float = 1.0,
    smoothing: float = 1e-3,
    batching: Batching = "auto",
) -> np.ndarray:
    """Return DoReMi's weights: the mean over a run of group DRO on excess losses.

    A reference model is trained on uniform weights, and then a proxy of the same size. Both take
    `rows / domains` rows of every domain at a step, whatever `mixture.draw` is. Excess losses are
    cut off at 0 for each row, in the paper for each token; and they are those after a step of the
    proxy, in the paper those before.

    Args:
      mixture: the domains; its targets play no part.
      inner_optimizer: what trains both models.
      steps: of each.
      keys: `(n,)`, one for each run.
      learning_rate: η; 1 in the paper.
      smoothing: c; 1e-3 in the paper.
      batching: how the runs are laid out, see `Population`.

    Returns:
      `(n, domains)`.

    References:
      Xie et al., DoReMi: Optimizing Data Mixtures Speeds Up Language Model Pretraining, NeurIPS
      2023.
    """
    mixture = weighted(mixture)
    n, domains = len(keys), len(mixture.names)
    uniform = np.full((n, domains), 1 / domains, np.float32)
    reference = trained(mixture, uniform, inner_optimizer, steps, keys, batching)[0].params
    weights = entropic_descent(learning_rate, smoothing=smoothing)
    held = optax.set_to_zero()
    names = {name: name if name == WEIGHTS else "held" for name in mixture.hyperparams}
    names |= {WEIGHTS: WEIGHTS, REFERENCE: "held"}
    outer = optax.multi_transform({WEIGHTS: weights, "held": held}, names)
    optimizer = FOOptimizer(inner_optimizer, outer)
    population = Population(_problem(mixture), optimizer, n, batching=batching)
    lam = {**start_fixed(mixture, uniform), REFERENCE: reference}
    state = population.init(jax.vmap(lambda key: jax.random.fold_in(key, 1))(keys), hyperparams=lam)
    _, rows = population.run(state, steps, keys)
    return np.stack([rows[f"val_{i}"].mean(0) for i in range(domains)], axis=-1)


def weighted(mixture: Mixture) -> Mixture:
    """Return the mixture with rows of every domain in a batch, and uniform weights."""
    domains = len(mixture.names)
    rows = max(mixture.rows // domains, 1) * domains
    return mixture.replace(draw="weighted", rows=rows, weights=None)


def _problem(mixture: Mixture) -> Problem:
    """Return the problem whose direct gradient in the weights is minus the excess losses."""

    def init(key: jax.Array) -> tuple[PyTree, dict[str, Any]]:
        params, hyperparams = mixture.problem.init(key)
        return params, {**hyperparams, REFERENCE: params}

    def val_loss(params: PyTree, hyperparams: Mapping[str, Any], batch: Any) -> Any:
        reference = jax.lax.stop_gradient(hyperparams[REFERENCE])
        excess = mixture.row_losses(params, batch) - mixture.row_losses(reference, batch)
        weights = hyperparams[WEIGHTS]
        told = {str(i): weights[i] for i in range(weights.shape[0])}
        return -weights @ jnp.maximum(excess, 0).mean(-1), Aux(metrics=told)

    def batch(key: jax.Array, data: Any) -> tuple[Any, Any]:
        assert mixture.held.batch is not None
        train, _ = mixture.held.batch(key, data)
        return train, train["rows"]

    def batches(rng: np.random.Generator) -> Iterator[tuple[Any, Any]]:
        read: Any = mixture.held.batches
        return ((train, train["rows"]) for train, _ in read(rng))

    source: dict[str, Any] = {"batches": batches} if mixture.on_host else {"batch": batch}
    return Problem(init, mixture.train_loss, val_loss, data=mixture.problem.data, **source)
