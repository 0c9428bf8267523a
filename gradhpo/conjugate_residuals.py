"""Conjugate residuals: conjugate gradients that make the residual least (Stiefel 1955)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gradhpo.hypergradient import at_least_float32, norm
from gradhpo.state import PyTree

Operator = Callable[[PyTree], PyTree]
"""A symmetric linear map."""


def conjugate_residuals(operator: Operator, target: PyTree, K: int) -> PyTree:
    """Return `x` with `‖A x - b‖` least over the Krylov space of K products, or fewer.

    Unlike conjugate gradients, which follow the part of b outside of A's range down a slope without
    end, these leave it alone. They stop where nothing is left of the residual but rounding, or that
    part, or a direction in which A is not positive.
    """
    # For b of length 1, since squares of small numbers are none in low precision.
    length = norm(target)
    unit = optax.tree.scale(jnp.where(length > 0, 1 / jnp.where(length > 0, length, 1), 0), target)
    x = _of_unit(operator, optax.tree.cast_like(unit, target), K)
    return optax.tree.cast_like(optax.tree.scale(length, x), target)


def _of_unit(operator: Operator, target: PyTree, K: int) -> PyTree:
    rounding = max(float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(target))
    square = _inner(target, target)
    negligible = rounding**0.75  # of A's norm: what a product leaves of a vector A maps to 0

    def iteration(carry: Any, _: None) -> tuple[Any, None]:
        x, residual, direction, image, rho, largest, done = carry
        of_residual = operator(residual)
        rr = _inner(residual, residual)
        stretch = _inner(of_residual, of_residual)
        new_rho = _inner(residual, of_residual)
        largest = jnp.maximum(largest, stretch / jnp.where(rr > 0, rr, 1))
        done |= (rr <= rounding**2 * square) | (stretch <= negligible**2 * largest * rr)
        done |= new_rho <= 0
        turn = jnp.where(done, 0, new_rho / jnp.where(rho > 0, rho, 1))
        direction = _add_scale(residual, turn, direction)
        image = _add_scale(of_residual, turn, image)
        length = _inner(image, image)
        step = jnp.where(done, 0, new_rho / jnp.where(length > 0, length, 1))
        x = _add_scale(x, step, direction)
        residual = _add_scale(residual, -step, image)
        return (x, residual, direction, image, new_rho, largest, done), None

    nothing, zero = optax.tree.zeros_like(target), 0 * square
    start = (nothing, target, nothing, nothing, zero, zero, square <= 0)
    return jax.lax.scan(iteration, start, length=K)[0][0]


def _inner(a: PyTree, b: PyTree) -> jax.Array:
    """Return the inner product, in float32 or better."""
    return jnp.asarray(optax.tree.vdot(at_least_float32(a), at_least_float32(b)))


def _add_scale(a: PyTree, factor: Any, b: PyTree) -> PyTree:
    return optax.tree.cast_like(optax.tree.add_scale(a, factor, b), a)
