"""First-Order: `g = g_FO`, the validation loss's own gradient in λ at the new weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gradhpo.hypergradient import validation
from gradhpo.optimizer import Estimate, StatelessMethod
from gradhpo.state import BilevelState, LossFn, PyTree


@dataclass(frozen=True)
class FOOptimizer(StatelessMethod):
    """First-Order: only the direct term. Exactly zero where λ does not enter the validation loss.

    Args:
      inner_optimizer: an `optax.GradientTransformation`, or a function of λ that returns one.
      outer_optimizer: an `optax.GradientTransformation` for λ, in place of `lr_hyper`.
      update_fn: `(params, hyperparams, batch) -> params`, in place of `inner_optimizer`.

    Raises:
      ValueError: if neither or both of `inner_optimizer` and `update_fn` are given.
    """

    inner_optimizer: Any = None
    outer_optimizer: Any = None
    update_fn: Callable[[Any, Any, Any], Any] | None = None

    differentiates_inner = False

    def estimate(
        self,
        state: BilevelState,
        train_batch: PyTree,
        val_batch: PyTree,
        train_loss_fn: LossFn,
        val_loss_fn: LossFn,
    ) -> Estimate:
        """Return `g_FO` at `w_t`."""
        w, s, lam = state.params, state.inner_opt_state, state.hyperparams
        moved = self.inner_step(train_loss_fn)(w, s, lam, train_batch)
        val = validation(val_loss_fn, moved.params, lam, val_batch)
        return Estimate(val.direct, *moved, val.loss)
