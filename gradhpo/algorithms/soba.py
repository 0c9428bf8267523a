"""SOBA: weights, linear system and λ in one loop (Dagréou et al. NeurIPS 2022).

`w ← w - ρ D_w`, `v ← v - ρ D_v`, `λ ← λ - γ D_λ`, the directions as in `gradhpo.single_loop`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gradhpo.optimizer import Estimate
from gradhpo.single_loop import SingleLoopMethod
from gradhpo.state import BilevelState
from gradhpo.task import Task


@dataclass(frozen=True)
class SOBAOptimizer(SingleLoopMethod):
    """SOBA: an implicit gradient in one loop, by one product with the Hessian a step.

    `v`, the solution of `H v = -∇_w L_val`, takes a step together with the weights, and
    the hypergradient is `∂²L_train/∂λ∂w·v + ∇_λ L_val`: each is a mean over examples, so batches
    leave it without bias where the weights and `v` are right. Converges to a stationary point
    with rates that fall (of both optimizers, as `t^-1/2`) on batches, and with constant ones on all
    data. `metadata` holds `solution` (v) and `solution_opt_state`; both outlast an episode.

    All of a step is taken at the point before it: `metadata["val_loss"]` is that of the weights
    before the step too. What `train_loss_fn` does not show is not seen: a hyperparameter that is
    tuned, and moves the weights through the inner optimizer (or the `update_fn`) only, is refused.

    Args:
      inner_optimizer: an `optax.GradientTransformation`, or a function of λ that returns one. It
        moves `v` as well, at the same rate, as the paper has it.
      outer_optimizer: an `optax.GradientTransformation` for λ, in place of `lr_hyper`.
      linear_optimizer: what moves `v` instead, such as `optax.sgd(0.1)`: where the inner optimizer
        decays what it moves (as `optax.adamw` does), and with an `update_fn`.
      update_fn: `(params, hyperparams, batch) -> params`, in place of `inner_optimizer`.
      T: steps in an episode of `run`.

    Raises:
      ValueError: if neither or both of `inner_optimizer` and `update_fn` are given, or an
        `update_fn` without a `linear_optimizer`; in `step`, if a hyperparameter acts on the weights
        through the inner optimizer or the `update_fn` only.

    References:
      Dagréou, Ablin, Vaiter and Moreau, A framework for bilevel optimization that enables
      stochastic and global variance reduction algorithms, NeurIPS 2022, Section 2 and Algorithm 1.
    """

    inner_optimizer: Any = None
    outer_optimizer: Any = None
    linear_optimizer: Any = None
    update_fn: Callable[..., Any] | None = None
    T: int = 20

    def estimate(self, state: BilevelState, task: Task) -> Estimate:
        """Return `D_λ`, with the weights and `v` moved along their directions."""
        found = self.directions(state, task)
        return Estimate.of(found.hypergradient, found.moved, found.val, found.memory)
