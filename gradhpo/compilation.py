"""The one door: everything of the library that is compiled is compiled by `jit` here."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import jaxpr_as_fun

from gradhpo.convolutions import mark


def jit(
    function: Callable[..., Any],
    *,
    static_argnums: int | Sequence[int] = (),
    donate_argnums: int | Sequence[int] = (),
) -> Any:
    """Return `jax.jit(function, ...)`, with convolutions that are fast in loops on a CPU too.

    The function is traced, derivatives and all, and its finished program is what is compiled; so
    nothing in it knows of this. A program without convolutions is the same as by `jax.jit`.

    Args:
      function: traceable; called with positional arguments.
      static_argnums: as for `jax.jit`.
      donate_argnums: as for `jax.jit`.
    """
    static = (static_argnums,) if isinstance(static_argnums, int) else tuple(static_argnums)
    inline: Any = jax.jit(function, static_argnums=static_argnums, inline=True)

    @functools.wraps(function)
    def finished(*args: Any) -> Any:
        if jax.config.jax_disable_jit:  # pyright: ignore[reportAttributeAccessIssue]
            return function(*args)
        closed, shape = jax.make_jaxpr(function, static, return_shape=True)(*args)
        marked = mark(closed)
        if marked is closed:
            return inline(*args)  # JAX remembers the trace
        leaves = jax.tree.leaves([x for i, x in enumerate(args) if i not in static])
        return jax.tree.unflatten(jax.tree.structure(shape), jaxpr_as_fun(marked)(*leaves))

    return jax.jit(finished, static_argnums=static_argnums, donate_argnums=donate_argnums)
