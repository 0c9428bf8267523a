"""Differentiate an optimizer's update where its square roots and denominators are at zero.

Adam divides by `sqrt(v)`. A dead ReLU unit, or an embedding row absent from the batch, has v = 0,
where the derivative of the root is infinite; times the zero it meets next, that is NaN. The root
there is `|gradient|` up to a constant, whose subgradient at 0 is 0: the limit that is used here.
Clipping by the norm of a zero gradient divides by 0 in the branch that is not taken; likewise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, Literal, primitives


@jax.custom_jvp
def sqrt(x: jax.Array) -> jax.Array:
    """Return the square root of `x`, with derivative 0 at 0; and 0 where `x` is negative.

    Rectified Adam has such a root in the branch that it does not take, and its NaN would meet the
    derivative that comes back.
    """
    return jnp.sqrt(jnp.maximum(x, 0))


@sqrt.defjvp
def _sqrt_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    (x,), (dx,) = primals, tangents
    root = sqrt(x)
    return root, 0.5 / jnp.where(x <= 0, jnp.inf, root) * dx


@jax.custom_jvp
def div(x: jax.Array, y: jax.Array) -> jax.Array:
    """Return `x / y`, with derivative 0 where `y` is 0 and the quotient not finite."""
    return jax.lax.div(x, y)


@div.defjvp
def _div_jvp(primals: Any, tangents: Any) -> Any:
    (x, y), (dx, dy) = primals, tangents
    slope = 1 / jnp.where(y == 0, jnp.inf, y)
    return div(x, y), slope * (dx - (x * slope) * dy)


def with_finite_derivatives(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` with derivatives of `sqrt` and `/` at 0 taken as 0; values are unchanged.

    (But for the root of a negative number, which is 0 instead of NaN.)

    The function is traced, and its operations replayed with the other root and quotient in place
    of JAX's, in branches and scans too; `while` loops and custom derivatives are left as they are.
    """

    def replayed(*args: Any) -> Any:
        closed, shape = jax.make_jaxpr(function, return_shape=True)(*args)
        outputs = _replay(closed.jaxpr, closed.consts, jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shape), outputs)

    return replayed


def _replay(jaxpr: Jaxpr, consts: list[Any], args: list[Any]) -> list[Any]:
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else values[atom]

    for eqn in jaxpr.eqns:
        inputs = [read(atom) for atom in eqn.invars]
        if eqn.primitive is primitives.sqrt_p:
            outputs = [sqrt(*inputs)]
        elif eqn.primitive is primitives.div_p and jnp.issubdtype(inputs[0].dtype, jnp.floating):
            outputs = [div(*inputs)]
        elif eqn.primitive is primitives.jit_p:
            inner = eqn.params["jaxpr"]
            outputs = _replay(inner.jaxpr, inner.consts, inputs)
        else:
            made = eqn.primitive.get_bind_params(_safe_bodies(eqn))
            # Up to jax 0.9 a pair (functions, parameters), the parameters alone since.
            subfuns, params = made if isinstance(made, tuple) else ((), made)
            outputs = eqn.primitive.bind(*subfuns, *inputs, **params)
            outputs = outputs if eqn.primitive.multiple_results else [outputs]
        values.update(zip(eqn.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _safe_bodies(eqn: Any) -> dict[str, Any]:
    """Return an operation's parameters, with the roots in its branches or loop body replaced."""
    params = dict(eqn.params)
    if eqn.primitive is primitives.cond_p:
        params["branches"] = tuple(_safe(branch) for branch in params["branches"])
    elif eqn.primitive is primitives.scan_p:
        params["jaxpr"] = _safe(params["jaxpr"])
    return params


def _safe(closed: Any) -> Any:
    return jax.make_jaxpr(lambda *args: _replay(closed.jaxpr, closed.consts, list(args)))(
        *closed.in_avals
    )
