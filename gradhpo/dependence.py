"""Which inputs a function's derivative can be other than zero in, found while it is traced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from gradhpo.state import PyTree


def depends(function: Callable[..., PyTree], argument: PyTree, *rest: Any) -> list[bool]:
    """Return for each leaf of `argument` whether `function(argument, *rest)` depends on it.

    Nothing is computed: automatic differentiation itself knows, while it traces, which tangents
    are zero whatever the numbers, in loops, branches and jitted functions too.

    Args:
      function: of `argument`, floating arrays, and of `rest`; it may close over traced arrays.
      argument: a pytree of floating arrays.
      rest: pytrees of arrays, or of their shapes and dtypes.
    """
    leaves, structure = jax.tree.flatten(argument)
    found: list[bool] = []

    @jax.custom_jvp
    def probe(outputs: list[Any]) -> list[Any]:
        return outputs

    def record(primals: Any, tangents: Any) -> Any:
        found[-1] |= any(not isinstance(t, SymbolicZero) for t in jax.tree.leaves(tangents))
        return primals[0], tangents[0]

    probe.defjvp(record, symbolic_zeros=True)

    def tangent(i: int, leaf: jax.Array, *rest: Any) -> Any:
        def along(leaf: jax.Array) -> PyTree:
            outputs = function(structure.unflatten([*leaves[:i], leaf, *leaves[i + 1 :]]), *rest)
            return probe(jax.tree.leaves(outputs))

        return jax.jvp(along, (leaf,), (leaf,))

    for i, leaf in enumerate(leaves):
        found.append(False)
        jax.eval_shape(lambda leaf, *rest, i=i: tangent(i, leaf, *rest), leaf, *rest)
    return found


def dependents(function: Callable[..., PyTree], argument: PyTree, *rest: Any) -> list[bool]:
    """Return for each leaf of `function(argument, *rest)` whether it depends on `argument`.

    As `depends`, seen from the other end, and in one trace. Counts, flags and keys do not depend.
    """
    found: list[bool] = []

    @jax.custom_jvp
    def probe(outputs: list[Any]) -> list[Any]:
        return outputs

    def record(primals: Any, tangents: Any) -> Any:
        found.extend(not isinstance(t, SymbolicZero) for t in tangents[0])
        return primals[0], tangents[0]

    probe.defjvp(record, symbolic_zeros=True)
    floating: list[bool] = []

    def along(argument: PyTree, *rest: Any) -> PyTree:
        leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(function(argument, *rest))]
        floating.extend(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves)
        return probe([leaf for leaf, moves in zip(leaves, floating, strict=True) if moves])

    def tangent(argument: PyTree, *rest: Any) -> Any:
        return jax.jvp(lambda argument: along(argument, *rest), (argument,), (argument,))

    jax.eval_shape(tangent, argument, *rest)
    answers = iter(found or [False] * sum(floating))  # not recorded where nothing depends
    return [moves and next(answers) for moves in floating]
