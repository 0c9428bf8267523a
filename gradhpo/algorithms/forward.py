"""Forward: the exact hypergradient through T inner steps, by forward mode."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from gradhpo.forward_mode import refuse_custom_vjp
from gradhpo.hypergradient import at_least_float32, over_coordinates, validation
from gradhpo.optimizer import Estimate
from gradhpo.state import BilevelState, LossFn, PyTree
from gradhpo.unrolling import UnrollingMethod


@dataclass(frozen=True)
class ForwardOptimizer(UnrollingMethod):
    """Forward mode: what `UnrolledOptimizer` computes, in memory that does not grow with T.

    For every coordinate of λ, `Z_t = A_t Z_{t-1} + B_t` goes along with the weights; at the end the
    validation loss's gradient `α_T`, by reverse mode, meets it. The
    coordinates are taken in chunks of bounded memory, and each chunk takes the T inner steps: the
    cost grows with dim(λ), so this is for few hyperparameters.

    Args:
      inner_optimizer: an `optax.GradientTransformation`, or a function of λ that returns one.
      outer_optimizer: an `optax.GradientTransformation` for λ, in place of `lr_hyper`.
      unroll_steps: T, the inner steps in one step.
      update_fn: `(params, hyperparams, batch) -> params`, in place of `inner_optimizer`.
      batches: "repeat" takes `train_batch` at all T steps; "stack" takes a stack of batches with
        a leading axis of length T, one for each.

    Raises:
      ValueError: if neither or both of `inner_optimizer` and `update_fn` are given, or `batches`
        is none of those above.

    References:
      Franceschi et al., Forward and Reverse Gradient-Based Hyperparameter Optimization, ICML
      2017, Alg. 2.
    """

    inner_optimizer: Any = None
    outer_optimizer: Any = None
    unroll_steps: int = 1
    update_fn: Callable[[Any, Any, Any], Any] | None = None
    batches: Literal["repeat", "stack"] = "repeat"

    def estimate(
        self,
        state: BilevelState,
        train_batch: PyTree,
        val_batch: PyTree,
        train_loss_fn: LossFn,
        val_loss_fn: LossFn,
    ) -> Estimate:
        """Return `g_FO + α_T·Z_T`, Z_T taken column by column."""
        inner = dataclasses.replace(self.inner_step(train_loss_fn), jointly=True)
        lam = state.hyperparams
        moved = self.unroll(inner, state, lam, train_batch)
        val = validation(val_loss_fn, moved.params, lam, val_batch)

        def weights(lam: PyTree) -> PyTree:
            return self.unroll(inner.differentiable, state, lam, train_batch).params

        def slope(here: PyTree) -> jax.Array:
            unit = jax.tree.map(lambda mask, x: mask.astype(x.dtype), here, lam)
            z = at_least_float32(jax.jvp(weights, (lam,), (unit,))[1])
            return jnp.asarray(optax.tree.vdot(at_least_float32(val.alpha), z))

        instead = "UnrolledOptimizer, which gives the same"
        refuse_custom_vjp("ForwardOptimizer", instead, slope, lam)
        alpha_z = over_coordinates(slope, lam, state.params)
        return Estimate(optax.tree.add(val.direct, alpha_z), *moved, val.loss)
