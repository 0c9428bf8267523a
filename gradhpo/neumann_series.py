"""The Neumann series of an inverse: `A⁻¹ b ≈ η Σ_{k<K} (I - ηA)^k b` (Lorraine et al. 2020)."""

from __future__ import annotations

from collections.abc import Callable

import jax
import optax

from gradhpo.state import PyTree


def neumann_series(
    operator: Callable[[PyTree], PyTree], target: PyTree, K: int, eta: float
) -> PyTree:
    """Return the first K terms; they converge for η below 2 over the largest eigenvalue."""

    def term(carry: tuple[PyTree, PyTree], _: None) -> tuple[tuple[PyTree, PyTree], None]:
        power, total = carry
        power = optax.tree.add_scale(power, -eta, operator(power))  # (I - ηA)^k b
        return (power, optax.tree.add(total, power)), None

    (_, total), _ = jax.lax.scan(term, (target, target), length=K - 1)
    return optax.tree.scale(eta, total)
