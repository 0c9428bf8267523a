"""First-Order: `g = g_FO`, the validation loss's own gradient in λ at the new weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gradhpo.hypergradient import validation
from gradhpo.optimizer import Estimate, StatelessMethod
from gradhpo.state import BilevelState
from gradhpo.task import Task


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
    update_fn: Callable[..., Any] | None = None

    differentiates_inner = False

    def estimate(self, state: BilevelState, task: Task) -> Estimate:
        """Return `g_FO` at `w_t`."""
        (w, s), lam = task.start(state), state.hyperparams
        moved = self.inner_step(task.train_loss)(w, s, lam, task.train_batch)
        val = validation(task, moved.params, moved.carried, lam)
        return Estimate.of(val.direct, moved, val)
