"""Names that `gradhpo` 0.1.3 exported at the top level, kept for scripts written for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from gradhpo.state import LossFn, PyTree

MetricDict: TypeAlias = dict[str, Any]
"""Metrics by name."""


class LossFunctions(NamedTuple):
    """The two losses of a bilevel problem."""

    train_loss: LossFn
    val_loss: LossFn


def tree_l2_norm(tree: PyTree) -> jax.Array:
    """Return the Euclidean norm of a tree; `optax.tree.norm`."""
    return optax.tree.norm(tree)


def tree_dot(a: PyTree, b: PyTree) -> jax.Array:
    """Return the inner product of two trees; `optax.tree.vdot`."""
    return jnp.asarray(optax.tree.vdot(a, b))


def tree_zeros_like(tree: PyTree) -> PyTree:
    """Return a tree of zeros; `optax.tree.zeros_like`."""
    return optax.tree.zeros_like(tree)


def tree_lerp(a: PyTree, b: PyTree, t: float) -> PyTree:
    """Return `(1 - t) a + t b`."""
    return optax.tree.add(optax.tree.scale(1 - t, a), optax.tree.scale(t, b))


def tree_normalize(tree: PyTree, eps: float = 1e-8) -> PyTree:
    """Return `tree / (‖tree‖ + eps)`."""
    return optax.tree.scale(1 / (optax.tree.norm(tree) + eps), tree)


def vjp_wrt_lambda(
    update_fn: Callable[[Any, Any, Any], Any], w: PyTree, lam: PyTree, batch: Any, alpha: PyTree
) -> PyTree:
    """Return `α·∂Φ/∂λ` for `Φ = update_fn(w, λ, batch)`."""
    return jax.vjp(lambda lam: update_fn(w, lam, batch), lam)[1](alpha)[0]


def vjp_wrt_both(
    update_fn: Callable[[Any, Any, Any], Any], w: PyTree, lam: PyTree, batch: Any, alpha: PyTree
) -> tuple[PyTree, PyTree]:
    """Return `(α·∂Φ/∂w, α·∂Φ/∂λ)` for `Φ = update_fn(w, λ, batch)`."""
    return jax.vjp(lambda w, lam: update_fn(w, lam, batch), w, lam)[1](alpha)


def update_w_star(w_star: PyTree, w_prev: PyTree, gamma: float, t: int) -> PyTree:
    """Return w*_t from w*_{t-1} and w_{t-1} (HyperDistill, eq. 13); w_0 at t = 1."""
    from gradhpo import ema

    return ema.distilled_point(w_star, w_prev, ema.keep_fraction(gamma, jnp.maximum(t, 1)))
