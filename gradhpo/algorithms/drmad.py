"""DrMAD: reverse mode along the straight line from the first weights to the last (IJCAI 2016)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from gradhpo.hypergradient import Mode, validation
from gradhpo.inner import Moved
from gradhpo.optimizer import Estimate
from gradhpo.state import BilevelState, PyTree
from gradhpo.task import Carried, Task, is_none
from gradhpo.unrolling import UnrollingMethod


@dataclass(frozen=True)
class DrMADOptimizer(UnrollingMethod):
    """DrMAD: unrolled differentiation that forgets the trajectory, so memory is independent of T.

    The backward pass of `UnrolledOptimizer`, with the derivatives of step t taken at
    `ŵ_{t-1} = (1 - (t-1)/T) w_0 + ((t-1)/T) w_T`. The inner optimizer's arrays are on a line of
    their own, from `s_0` to `s_T`; its counts, flags, keys and single numbers, which may go in
    circles, are recorded, T of each. The cotangents of both go backward: exact where the Jacobians
    do not depend on the point, or the trajectory is that line.

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
    update_fn: Callable[..., Any] | None = None
    batches: Literal["repeat", "stack"] = "repeat"
    mode: Mode = "auto"

    auto_mode = "forward-over-reverse"  # measured in benchmarks/mixed_modes.py

    def estimate(self, state: BilevelState, task: Task) -> Estimate:
        """Return `g_FO` plus the second-order term along the line."""
        inner, lam, T = self.inner_step(task.train_loss), state.hyperparams, self.unroll_steps
        first, batch_at = task.start(state), self.batch_at(task.train_batch)

        def forward(carry: tuple[PyTree, Carried], t: jax.Array) -> tuple[Any, Any]:
            w, s, *told = inner(*carry, lam, batch_at(t))
            return (w, s), (_recorded(carry[1]), told)

        last, (records, told) = jax.lax.scan(forward, first, jnp.arange(T))
        moved = Moved(*last, *jax.tree.map(lambda rows: rows[-1], told))
        val = validation(task, moved.params, moved.carried, lam)

        def backward(carry: tuple[PyTree, PyTree], step: Any) -> tuple[Any, None]:
            (cotangents, g_so), (t, record) = carry, step
            w_hat, line = jax.tree.map(lambda a, b: _between(a, b, t / T), first, last)
            s_hat = jax.tree.map(
                lambda kept, a: a if kept is None else kept, record, line, is_leaf=is_none
            )
            pull = inner.pullback_all(w_hat, s_hat, lam, batch_at(t))
            *cotangents, alpha_b = pull(*cotangents)
            return (tuple(cotangents), optax.tree.add(g_so, alpha_b)), None  # g_SO ← g_SO + α·B̂_t

        nothing = optax.tree.zeros_like(inner.differentiable_state(moved.carried))
        start = ((val.alpha, nothing), val.direct)
        (_, g), _ = jax.lax.scan(backward, start, (jnp.arange(T), records), reverse=True)
        return Estimate.of(g, moved, val)


def _between(first: jax.Array, last: jax.Array, way: jax.Array) -> jax.Array:
    if not jnp.issubdtype(first.dtype, jnp.floating):
        return first  # is recorded
    return (first + way * (last - first)).astype(first.dtype)


def _recorded(carried: Carried) -> Carried:
    """Return the leaves of what a step carries that are on no line, None in place of others."""

    def record(leaf: jax.Array) -> jax.Array | None:
        return None if leaf.ndim > 0 and jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(record, carried)
