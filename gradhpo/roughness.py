"""Roughness: how training answers small steps of λ along a direction, over growing horizons.

Metasmoothness after t inner steps is `Σ_i |Δ_i| sign(Δ_i Δ'_i) / Σ_i |Δ_i|`, over the weights, with
`Δ = w_t(λ + hv) - w_t(λ)` and `Δ' = w_t(λ + 2hv) - w_t(λ + hv)` (Engstrom et al., Optimizing ML
Training with Metagradient Descent, 2025): 1 where the weights go on as they began, 0 or less in
chaos.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gradhpo.inner import InnerStep
from gradhpo.state import BilevelState, PyTree
from gradhpo.task import Task

ROUNDING = 16
"""Machine epsilons of a weight below which its change is rounding, and has no sign."""


class Along(NamedTuple):
    """What three walks on the same batches gave, at λ, λ + hv and λ + 2hv."""

    smoothness: jax.Array
    """Metasmoothness after each inner step, `(steps,)`."""
    val_losses: jax.Array
    """After each inner step, `(steps, 3)`."""
    train_losses: jax.Array
    """Before each inner step at λ, `(steps,)`."""


def along(inner: InnerStep, state: BilevelState, task: Task, v: PyTree, h: Any) -> Along:
    """Walk at three λ along `v`, side by side; pure and traceable.

    Args:
      inner: the inner step.
      state: where the walks begin.
      task: its `train_batch` is a stack of batches, one for each step.
      v: shaped like λ.
      h: how far apart the three λ are, in units of `v`.
    """

    def shifted(x: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.stack([(x + i * h * v).astype(x.dtype) for i in range(3)])

    lams = jax.tree.map(shifted, state.hyperparams, v)
    three = jax.tree.map(lambda x: jnp.stack([x] * 3), task.start(state))

    def step(carry: Any, batch: PyTree) -> tuple[Any, Along]:
        def one(at: Any) -> Any:
            (w, s), lam = at
            after = inner(w, s, lam, batch)
            val_loss = task.validate(after.params, after.carried, lam)[0]
            return (after.params, after.carried), val_loss, after.train_loss

        carry, val_losses, train_losses = jax.lax.map(one, (carry, lams))
        return carry, Along(_metasmoothness(carry[0]), val_losses, train_losses[0])

    return jax.lax.scan(step, three, task.train_batch)[1]


def _metasmoothness(weights: PyTree) -> jax.Array:
    """Return it from three of each weight, along a leading axis.

    1 where nothing has changed, and 0 where weights are not finite any more.
    """

    def of_leaf(x: jax.Array) -> jax.Array:
        first, second = x[1] - x[0], x[2] - x[1]
        seen = jnp.abs(first) > ROUNDING * jnp.finfo(x.dtype).eps * jnp.abs(x[0])
        size = jnp.where(seen, jnp.abs(first), 0).astype(jnp.float32)
        return jnp.stack([jnp.sum(size * jnp.sign(first) * jnp.sign(second)), jnp.sum(size)])

    agreed, total = jax.tree.reduce(jnp.add, jax.tree.map(of_leaf, weights))
    smoothness = jnp.where(total == 0, 1, agreed / jnp.where(total == 0, 1, total))
    finite = jax.tree.map(lambda x: jnp.all(jnp.isfinite(x)), weights)
    return jnp.where(jax.tree.reduce(jnp.logical_and, finite), smoothness, 0)
