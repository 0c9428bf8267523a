"""The distilled point w*_t and its coefficients (HyperDistill, Lee et al. ICLR 2022, eq. 13-17).

Each coefficient is a ratio of `1 - γ^n`, which cancels to 0 in float32 as γ approaches 1; all are
computed as `-expm1(n log γ)` instead, and have their limits at γ = 0 and γ = 1.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from gradhpo.hypergradient import at_least_float32
from gradhpo.state import PyTree
from gradhpo.task import split_fixed


def geometric_sum(gamma: float, t: jax.Array) -> jax.Array:
    """Return `(1 - γ^t)/(1 - γ)`, the factor of eq. 15; `t` where γ = 1."""
    count = jnp.asarray(t, dtype=float)
    if gamma == 1:
        return count
    return _one_minus_power(gamma, count) / (1 - gamma)


def keep_fraction(gamma: float, t: jax.Array) -> jax.Array:
    """Return `p_t = (γ - γ^t)/(1 - γ^t)` of eq. 13, for t ≥ 1; `(t - 1)/t` where γ = 1."""
    return gamma * keep_fraction_backward(gamma, t)


def keep_fraction_backward(gamma: float, s: jax.Array) -> jax.Array:
    """Return `p_s = (1 - γ^{s-1})/(1 - γ^s)` of eq. 17, for s ≥ 1; `(s - 1)/s` where γ = 1."""
    count = jnp.asarray(s, dtype=float)
    if gamma == 1:
        return (count - 1) / count
    return _one_minus_power(gamma, count - 1) / _one_minus_power(gamma, count)


def distilled_start(params: PyTree) -> PyTree:
    """Return `w*` where an episode starts, in buffers of its own, and in float32 at least.

    In bfloat16 an average would stall on its way: near the weights' own precision its steps round
    to nothing.
    """
    return jax.tree.map(jnp.copy, at_least_float32(split_fixed(params)[0]))


def distilled_point(w_star: PyTree, params: PyTree, keep: jax.Array) -> PyTree:
    """Return `p w*_{t-1} + (1 - p) w_{t-1}`, computed so that p = 0 gives `w_{t-1}` to the bit.

    In the precision of `w_star`.
    """

    def mix(old: jax.Array, new: jax.Array) -> jax.Array:
        # At p = 0 the old value may be anything, even infinite, and must not leak in.
        new = new.astype(old.dtype)
        mixed = new + keep * (old - new)
        return jnp.where(keep == 0, new, mixed).astype(old.dtype)

    return jax.tree.map(mix, w_star, params)


def _one_minus_power(gamma: float, n: jax.Array) -> jax.Array:
    if gamma == 0:
        return jnp.where(n > 0, 1.0, 0.0).astype(n.dtype)
    return -jnp.expm1(n * math.log(gamma))
