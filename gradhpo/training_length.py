"""The length of training: its learning rates added up, as the weights show them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from gradhpo.hypergradient import at_least_float32
from gradhpo.inner import InnerStep
from gradhpo.state import BilevelState, PyTree
from gradhpo.task import Task


def training_length(inner: InnerStep, state: BilevelState, task: Task) -> jax.Array:
    """Return `⟨w_0 - w_T, ḡ⟩ / ⟨ḡ, ḡ⟩` of T inner steps, ḡ being their mean gradient.

    For SGD it is Tη. It is 0 where there is none: without a gradient, or if the weights went up.
    """
    first = task.start(state)

    def step(carry: Any, batch: PyTree) -> tuple[Any, None]:
        (w, s), total = carry
        gradient = inner.gradient(w, s, state.hyperparams, batch)[2]
        after = inner(w, s, state.hyperparams, batch)
        return ((after.params, after.carried), optax.tree.add(total, gradient)), None

    start = (first, optax.tree.zeros_like(first[0]))
    (last, total), _ = jax.lax.scan(step, start, task.train_batch)
    T = jax.tree.leaves(task.train_batch)[0].shape[0]
    mean = at_least_float32(optax.tree.scale(1 / T, total))
    moved = at_least_float32(optax.tree.sub(first[0], last[0]))
    square = jnp.asarray(optax.tree.vdot(mean, mean))
    along = jnp.asarray(optax.tree.vdot(moved, mean))
    length = along / jnp.where(square > 0, square, 1)
    return jnp.where((square > 0) & (length > 0) & jnp.isfinite(length), length, 0)
