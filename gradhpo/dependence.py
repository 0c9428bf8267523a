"""Which inputs a function's derivative can be other than zero in, found while it is traced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
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
