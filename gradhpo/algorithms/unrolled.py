"""Unrolled: the exact hypergradient through T inner steps, by reverse mode."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax

from gradhpo.hypergradient import Mode, Validation
from gradhpo.optimizer import Estimate
from gradhpo.state import BilevelState, PyTree
from gradhpo.task import Task
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
      through_model_state: whether what the losses remember is differentiated too, exactly, from the
        first step's on; otherwise it is a constant of each step.

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
    update_fn: Callable[..., Any] | None = None
    batches: Literal["repeat", "stack"] = "repeat"
    remat: Remat = "none"
    mode: Mode = "auto"
    through_model_state: bool = False

    auto_mode = "forward-over-reverse"  # measured in benchmarks/mixed_modes.py

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.remat not in REMATS:
            raise ValueError(f"remat must be one of {REMATS}, got {self.remat!r}")

    def estimate(self, state: BilevelState, task: Task) -> Estimate:
        """Return the gradient of `L_val(w_T(λ), λ)`."""
        inner = self.inner_step(task.train_loss)

        def objective(lam: PyTree) -> tuple[jax.Array, Any]:
            moved = self.unroll(inner.differentiable, state, task, lam, self.remat)
            loss, metrics = task.validate(moved.params, moved.carried, lam)
            return loss, (moved, metrics)

        lam = state.hyperparams
        (loss, (moved, metrics)), g = jax.value_and_grad(objective, has_aux=True)(lam)
        return Estimate.of(g, moved, Validation(loss, None, None, metrics))
