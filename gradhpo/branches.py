"""Branches that stay branches under `vmap`: both sides of an ordinary one would be computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gradhpo.state import PyTree


@jax.custom_batching.custom_vmap
def anywhere(condition: jax.Array) -> jax.Array:
    """Return the condition; under `vmap`, whether it holds in any slot.

    A `cond` on it stays one then, instead of becoming a choice between two results both computed.
    """
    return condition


@anywhere.def_vmap
def _in_any_slot(size: int, in_batched: list[bool], condition: jax.Array) -> tuple[Any, bool]:
    del size, in_batched
    return anywhere(jnp.any(condition, axis=0)), False


def where_due(due: Any, function: Callable[[PyTree], PyTree], tree: PyTree) -> PyTree:
    """Return `function(tree)` where it is due, and `tree` elsewhere; computed if any slot's is."""
    if due is False:
        return tree

    def some(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda a, b: jnp.where(due, a, b), function(tree), tree)

    return jax.lax.cond(anywhere(due), some, lambda same: same, tree)
