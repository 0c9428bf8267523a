"""Forward: the exact hypergradient through T inner steps, by forward mode."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax

from gradhpo.errors import scalar_loss
from gradhpo.hypergradient import over_coordinates
from gradhpo.inner import Moved
from gradhpo.optimizer import Estimate
from gradhpo.state import BilevelState, LossFn, PyTree
from gradhpo.unrolling import UnrollingMethod


@dataclass(frozen=True)
class ForwardOptimizer(UnrollingMethod):
    """Forward mode: what `UnrolledOptimizer` computes, in memory that does not grow with T.

    For every coordinate of λ, `Z_t = A_t Z_{t-1} + B_t` goes along with the weights. The
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
        """Return the derivative of `L_val(w_T(λ), λ)` in each coordinate of λ."""
        inner, val_loss = self.inner_step(train_loss_fn), scalar_loss("val_loss_fn", val_loss_fn)

        def objective(lam: PyTree) -> tuple[jax.Array, Moved]:
            moved = self.unroll(inner.differentiable, state, lam, train_batch)
            return val_loss(moved.params, lam, val_batch), moved

        def slope(here: PyTree) -> jax.Array:
            unit = jax.tree.map(lambda mask, x: mask.astype(x.dtype), here, state.hyperparams)
            return jax.jvp(objective, (state.hyperparams,), (unit,), has_aux=True)[1]

        loss, moved = objective(state.hyperparams)
        g = over_coordinates(slope, state.hyperparams, state.params)
        return Estimate(g, *moved, loss)
