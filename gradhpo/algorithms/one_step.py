"""One-Step: `g = g_FO + α_t·B_t`, exact over the last inner step (Luketina et al. ICML 2016)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import optax

from gradhpo.hypergradient import Mode, validation
from gradhpo.optimizer import Estimate, StatelessMethod
from gradhpo.state import BilevelState
from gradhpo.task import Task


@dataclass(frozen=True)
class OneStepOptimizer(StatelessMethod):
    """One-Step: the direct term and the last inner step's, differentiated exactly.

    Args:
      inner_optimizer: an `optax.GradientTransformation`, or a function of λ that returns one.
      outer_optimizer: an `optax.GradientTransformation` for λ, in place of `lr_hyper`.
      update_fn: `(params, hyperparams, batch) -> params`, in place of `inner_optimizer`.
      mode: how `α·∂Φ/∂λ` is taken: "reverse-over-reverse", "forward-over-reverse" or
        "reverse-over-forward", equal but for rounding. "auto" is the first, of the fewest FLOPs;
        the others need less memory where λ acts deep in a model of rematerialized blocks. An
        `update_fn` has the first alone.

    Raises:
      ValueError: if neither or both of `inner_optimizer` and `update_fn` are given.

    References:
      Luketina et al., Scalable Gradient-Based Tuning of Continuous Regularization
      Hyperparameters, ICML 2016.
    """

    inner_optimizer: Any = None
    outer_optimizer: Any = None
    update_fn: Callable[..., Any] | None = None
    mode: Mode = "auto"

    def estimate(self, state: BilevelState, task: Task) -> Estimate:
        """Return `g_FO + α_t·B_t`, `B_t` at `w_{t-1}`."""
        (w, s), lam = task.start(state), state.hyperparams
        moved, pull = self.inner_step(task.train_loss).pullback(w, s, lam, task.train_batch)
        val = validation(task, moved.params, moved.carried, lam)
        return Estimate.of(optax.tree.add(val.direct, pull(val.alpha)), moved, val)
