"""Nyström: a ridge inverse of low rank, `(H_k + ρI)⁻¹ b` (Hataya & Yamada, AISTATS 2023).

`H_k = HΩ (ΩᵀHΩ)⁺ (HΩ)ᵀ`, Ω being k random directions; by Woodbury, only a system of k unknowns is
solved, and H is applied k times, whatever the ridge.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from gradhpo.hypergradient import EXACT, at_least_float32, exact_product
from gradhpo.state import PyTree


def nystrom(
    hessian: Callable[[PyTree], PyTree], target: PyTree, rank: int, damping: float, key: jax.Array
) -> PyTree:
    """Return `(H_k + ρI)⁻¹ b`.

    Of `ΩᵀHΩ` only the positive eigenvalues count: with the others `H_k + ρI` might be singular.

    Args:
      hessian: a symmetric linear map, H.
      target: b, a pytree of floating arrays.
      rank: k; as many as there are weights, if they are fewer.
      damping: ρ > 0.
      key: what Ω is drawn from.
    """
    rank = min(rank, optax.tree.size(target))
    wide = at_least_float32(target)
    test = _directions(key, target, rank)
    image = at_least_float32(jax.lax.map(hessian, test))  # HΩ, one product after the other
    core = _gram(at_least_float32(test), image)
    values, vectors = jnp.linalg.eigh((core + core.T) / 2)
    # What is smaller is rounding, of which the inverse root would make the largest direction.
    kept = values > jnp.finfo(values.dtype).eps * rank * jnp.max(jnp.abs(values))
    roots = vectors * jnp.where(kept, jax.lax.rsqrt(jnp.where(kept, values, 1)), 0)
    # H_k = BBᵀ, B = HΩ·roots; and (BBᵀ + ρI)⁻¹ b = [b - B (BᵀB + ρI)⁻¹ Bᵀb] / ρ.
    small = exact_product(roots.T, exact_product(_gram(image, image), roots))
    right = exact_product(roots.T, _along(image, wide))
    ridge = small + damping * jnp.eye(rank, dtype=small.dtype)
    weights = exact_product(roots, jax.scipy.linalg.solve(ridge, right, assume_a="pos"))
    low_rank = jax.tree.map(lambda y: jnp.tensordot(weights, y, 1, precision=EXACT), image)
    x = optax.tree.scale(1 / damping, optax.tree.sub(wide, low_rank))
    return optax.tree.cast_like(x, target)


def _directions(key: jax.Array, like: PyTree, rank: int) -> PyTree:
    """Return Ω, normal numbers with a leading axis of length `rank`."""
    leaves, structure = jax.tree.flatten(like)
    keys = jax.random.split(key, len(leaves))
    drawn = [
        jax.random.normal(k, (rank, *leaf.shape), leaf.dtype)
        for k, leaf in zip(keys, leaves, strict=True)
    ]
    return structure.unflatten(drawn)


def _gram(a: PyTree, b: PyTree) -> jax.Array:
    """Return `AᵀB`, the inner products of all pairs, `(rank, rank)`."""

    def of_leaf(a: jax.Array, b: jax.Array) -> jax.Array:
        return exact_product(a.reshape(len(a), -1), b.reshape(len(b), -1).T)

    return jax.tree.reduce(jnp.add, jax.tree.map(of_leaf, a, b))


def _along(a: PyTree, b: PyTree) -> jax.Array:
    """Return `Aᵀb`, `(rank,)`."""

    def of_leaf(a: jax.Array, b: jax.Array) -> jax.Array:
        return exact_product(a.reshape(len(a), -1), b.ravel())

    return jax.tree.reduce(jnp.add, jax.tree.map(of_leaf, a, b))
