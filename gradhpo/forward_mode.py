"""Forward mode, and the operations that lack it: those with a VJP of their own, and no JVP.

A fused kernel or a flash attention is such an operation (`jax.custom_vjp`). JAX finds out while it
lowers a program, and names neither the method nor the mode.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

PLACEHOLDER = "custom_lin"
"""The operation that stands for the missing JVP until the program is lowered."""


def refuse_custom_vjp(who: str, instead: str, function: Callable[..., Any], *args: Any) -> None:
    """Raise if the result of `function`, which uses forward mode, needs a JVP that is missing.

    Args:
      who: whose forward mode it is, the beginning of the message.
      instead: what to use, its end.
      function: traceable; it is traced here once more.
      args: its arguments, arrays or their shapes and dtypes.

    Raises:
      ValueError: if an operation in it has a VJP and no JVP.
    """
    try:
        missing = _needs(jax.make_jaxpr(function)(*args).jaxpr)
    except NotImplementedError as error:  # met in reverse mode, over forward mode
        if PLACEHOLDER not in str(error):
            raise
        missing = True
    if missing:
        raise ValueError(
            f"{who} takes a derivative by forward mode, and an operation in it has a VJP of its "
            f"own (jax.custom_vjp) and no forward mode: use {instead}, or jax.custom_jvp"
        )


def _needs(jaxpr: Jaxpr) -> bool:
    """Whether an output needs the placeholder; a body's outputs count as needed, all of them."""
    needed = {var for var in jaxpr.outvars if not isinstance(var, Literal)}
    for eqn in reversed(jaxpr.eqns):
        if needed.isdisjoint(eqn.outvars):
            continue
        if eqn.primitive.name == PLACEHOLDER or any(map(_needs, _bodies(eqn))):
            return True
        needed.update(atom for atom in eqn.invars if not isinstance(atom, Literal))
    return False


def _bodies(eqn: Any) -> list[Jaxpr]:
    leaves = jax.tree.leaves(
        list(eqn.params.values()), is_leaf=lambda x: isinstance(x, Jaxpr | ClosedJaxpr)
    )
    closed = [leaf.jaxpr if isinstance(leaf, ClosedJaxpr) else leaf for leaf in leaves]
    return [leaf for leaf in closed if isinstance(leaf, Jaxpr)]
