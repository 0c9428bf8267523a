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
from gradhpo.inner import Moved
from gradhpo.optimizer import Estimate
from gradhpo.state import BilevelState, PyTree
from gradhpo.task import Task, join_fixed, split_fixed
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
      through_model_state: whether what the losses remember is differentiated too, exactly, from the
        first step's on; otherwise it is a constant of each step.

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
    update_fn: Callable[..., Any] | None = None
    batches: Literal["repeat", "stack"] = "repeat"
    through_model_state: bool = False

    def estimate(self, state: BilevelState, task: Task) -> Estimate:
        """Return `g_FO + α_T·Z_T`, Z_T taken column by column."""
        inner = dataclasses.replace(self.inner_step(task.train_loss), jointly=True)
        lam = state.hyperparams
        moved = self.unroll(inner, state, task, lam)
        val = validation(task, moved.params, moved.carried, lam)
        alpha = (val.alpha, self._alpha_of_model_state(task, moved, lam))

        def reached(lam: PyTree) -> PyTree:
            there = self.unroll(inner.differentiable, state, task, lam)
            remembered = split_fixed(there.carried.model_state)[0]
            return there.params, remembered if self.through_model_state else None

        def slope(here: PyTree) -> jax.Array:
            unit = jax.tree.map(lambda mask, x: mask.astype(x.dtype), here, lam)
            z = at_least_float32(jax.jvp(reached, (lam,), (unit,))[1])
            return jnp.asarray(optax.tree.vdot(at_least_float32(alpha), z))

        instead = "UnrolledOptimizer, which gives the same"
        refuse_custom_vjp("ForwardOptimizer", instead, slope, lam)
        alpha_z = over_coordinates(slope, lam, moved.params)
        return Estimate.of(optax.tree.add(val.direct, alpha_z), moved, val)

    def _alpha_of_model_state(self, task: Task, moved: Moved, lam: PyTree) -> PyTree:
        """Return the validation loss's gradient in what the losses remember, where it counts."""
        if not self.through_model_state:
            return None
        floating, others = split_fixed(moved.carried.model_state)

        def loss(floating: PyTree) -> jax.Array:
            whole = join_fixed(floating, others)
            return task.validate(moved.params, moved.carried._replace(model_state=whole), lam)[0]

        return jax.grad(loss)(floating)
