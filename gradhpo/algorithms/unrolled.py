"""Unrolled: the exact hypergradient through T inner steps, by reverse mode."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax

from gradhpo.errors import scalar_loss
from gradhpo.hypergradient import Mode
from gradhpo.inner import Moved
from gradhpo.optimizer import Estimate
from gradhpo.state import BilevelState, LossFn, PyTree
from gradhpo.unrolling import REMATS, Remat, UnrollingMethod


@dataclass(frozen=True)
class UnrolledOptimizer(UnrollingMethod):
    """Unrolled differentiation: a step takes T inner steps, and λ moves by their exact gradient.

    `g = dL_val(w_T(λ), λ)/dλ`, the inner optimizer's state being part of what is differentiated.
    The weights and the state that the step starts from are constants.

    Args:
      inner_optimizer: an `optax.GradientTransformation`, or a function of λ that returns one.
      outer_optimizer: an `optax.GradientTransformation` for λ, in place of `lr_hyper`.
      unroll_steps: T, the inner steps in one step.
      update_fn: `(params, hyperparams, batch) -> params`, in place of `inner_optimizer`.
      batches: "repeat" takes `train_batch` at all T steps; "stack" takes a stack of batches with
        a leading axis of length T, one for each.
      remat: what is kept for the backward pass. "none": what every step needs, which is its
        weights, optimizer state and gradient in a mixed mode, and the model's activations in
        "reverse-over-reverse". "step": only the weights and the optimizer's state before each
        step, which is then taken again. "sqrt": those before every ⌈√T⌉-th step, and what the
        steps of one segment need, so memory grows as √T. The last two take every inner step twice.
      mode: how the derivatives of a step are taken: "reverse-over-reverse", "forward-over-reverse"
        or "reverse-over-forward", equal but for rounding. "auto" is the second where there is an
        `inner_optimizer`, which keeps nothing of the model; an `update_fn` has the first alone.

    Raises:
      ValueError: if neither or both of `inner_optimizer` and `update_fn` are given, or `batches`,
        `remat` or `mode` is none of those above.

    References:
      Maclaurin et al., Gradient-based Hyperparameter Optimization through Reversible Learning,
      ICML 2015. Franceschi et al., Forward and Reverse Gradient-Based Hyperparameter
      Optimization, ICML 2017, Alg. 1. Kemaev et al., Scalable Meta-Learning via Mixed-Mode
      Differentiation, ICML 2025 (MixFlow-MG: the mixed modes).
    """

    inner_optimizer: Any = None
    outer_optimizer: Any = None
    unroll_steps: int = 1
    update_fn: Callable[[Any, Any, Any], Any] | None = None
    batches: Literal["repeat", "stack"] = "repeat"
    remat: Remat = "none"
    mode: Mode = "auto"

    auto_mode = "forward-over-reverse"  # measured in benchmarks/mixed_modes.py

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.remat not in REMATS:
            raise ValueError(f"remat must be one of {REMATS}, got {self.remat!r}")

    def estimate(
        self,
        state: BilevelState,
        train_batch: PyTree,
        val_batch: PyTree,
        train_loss_fn: LossFn,
        val_loss_fn: LossFn,
    ) -> Estimate:
        """Return the gradient of `L_val(w_T(λ), λ)`."""
        inner, val_loss = self.inner_step(train_loss_fn), scalar_loss("val_loss_fn", val_loss_fn)

        def objective(lam: PyTree) -> tuple[jax.Array, Moved]:
            moved = self.unroll(inner.differentiable, state, lam, train_batch, self.remat)
            return val_loss(moved.params, lam, val_batch), moved

        moved: Moved
        (loss, moved), g = jax.value_and_grad(objective, has_aux=True)(state.hyperparams)
        return Estimate(g, *moved, loss)
