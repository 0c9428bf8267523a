"""DrMAD: reverse mode along the straight line from the first weights to the last (IJCAI 2016)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from gradhpo.hypergradient import Mode, validation
from gradhpo.optimizer import Estimate
from gradhpo.state import BilevelState, LossFn, PyTree
from gradhpo.unrolling import UnrollingMethod


@dataclass(frozen=True)
class DrMADOptimizer(UnrollingMethod):
    """DrMAD: unrolled differentiation that forgets the trajectory, so memory is independent of T.

    The backward pass of `UnrolledOptimizer`, with the derivatives of step t taken at
    `ŵ_{t-1} = (1 - (t-1)/T) w_0 + ((t-1)/T) w_T`. The inner optimizer's state is on a line of its
    own, from `s_0` to `s_T`, and the cotangents of both go backward: exact where the Jacobians do
    not depend on the point, or the trajectory is that line.

    Args:
      inner_optimizer: an `optax.GradientTransformation`, or a function of λ that returns one.
      outer_optimizer: an `optax.GradientTransformation` for λ, in place of `lr_hyper`.
      unroll_steps: T, the inner steps in one step.
      update_fn: `(params, hyperparams, batch) -> params`, in place of `inner_optimizer`.
      batches: "repeat" takes `train_batch` at all T steps; "stack" takes a stack of batches with
        a leading axis of length T, one for each.
      mode: how the derivatives of a step are taken: "reverse-over-reverse", "forward-over-reverse"
        or "reverse-over-forward", equal but for rounding. "auto" is the second where there is an
        `inner_optimizer`, which keeps nothing of the model; an `update_fn` has the first alone.

    Raises:
      ValueError: if neither or both of `inner_optimizer` and `update_fn` are given, or `batches`
        is none of those above.

    References:
      Fu et al., DrMAD: Distilling Reverse-Mode Automatic Differentiation for Optimizing
      Hyperparameters of Deep Neural Networks, IJCAI 2016.
    """

    inner_optimizer: Any = None
    outer_optimizer: Any = None
    unroll_steps: int = 1
    update_fn: Callable[[Any, Any, Any], Any] | None = None
    batches: Literal["repeat", "stack"] = "repeat"
    mode: Mode = "auto"

    auto_mode = "forward-over-reverse"  # measured in benchmarks/mixed_modes.py

    def estimate(
        self,
        state: BilevelState,
        train_batch: PyTree,
        val_batch: PyTree,
        train_loss_fn: LossFn,
        val_loss_fn: LossFn,
    ) -> Estimate:
        """Return `g_FO` plus the second-order term along the line."""
        inner, lam, T = self.inner_step(train_loss_fn), state.hyperparams, self.unroll_steps
        moved = self.unroll(inner, state, lam, train_batch)
        val = validation(val_loss_fn, moved.params, lam, val_batch)
        first, last = (state.params, state.inner_opt_state), (moved.params, moved.opt_state)
        batch_at = self.batch_at(train_batch)

        def backward(carry: tuple[PyTree, PyTree], t: jax.Array) -> tuple[Any, None]:
            cotangents, g_so = carry
            w_hat, s_hat = jax.tree.map(lambda a, b: _between(a, b, t, T), first, last)
            pull = inner.pullback_all(w_hat, s_hat, lam, batch_at(t))
            *cotangents, alpha_b = pull(*cotangents)
            return (tuple(cotangents), optax.tree.add(g_so, alpha_b)), None  # g_SO ← g_SO + α·B̂_t

        nothing = optax.tree.zeros_like(inner.differentiable_state(moved.opt_state))
        start = ((val.alpha, nothing), val.direct)
        (_, g), _ = jax.lax.scan(backward, start, jnp.arange(T), reverse=True)
        return Estimate(g, *moved, val.loss)


def _between(first: jax.Array, last: jax.Array, t: jax.Array, T: int) -> jax.Array:
    """Return the point t/T of the way; counts are rounded, and what is not a number stays."""
    if jnp.issubdtype(first.dtype, jnp.floating):
        return (first + (t / T) * (last - first)).astype(first.dtype)
    if jnp.issubdtype(first.dtype, jnp.signedinteger):
        return first + jnp.round((last - first) * (t / T)).astype(first.dtype)
    return first
