"""Differentiate an optimizer's update where its roots, powers and denominators are at zero.

Adam divides by `sqrt(v)`. A dead ReLU unit, or an embedding row absent from the batch, has v = 0,
where the derivative of the root is infinite; times the zero it meets next, that is NaN. The root
there is `|gradient|` up to a constant, whose subgradient at 0 is 0: the limit that is used here.
Clipping by the norm of a zero gradient divides by 0 in the branch that is not taken; likewise.
Adafactor has `v ** -0.5` at v = 1e-30, whose derivative is finite, but not in float32 if it is
written `-0.5 * v ** -1.5`: here it is `-0.5 * v ** -0.5 / v`, one factor after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Jaxpr, Literal, primitives

from gradhpo.replay import bind

Tangent = Callable[..., jax.Array]
"""`(output, tangents, *inputs) -> tangent of the output`; a tangent that is zero is None."""


def with_finite_derivatives(
    function: Callable[..., Any], *, clamp_roots: bool = False
) -> Callable[..., Any]:
    """Return `function` with the derivatives of roots, powers and `/` at 0 taken as 0.

    The function is traced, and its operations replayed with other derivatives in place of JAX's,
    in branches, scans and jitted functions too; `while` loops and custom derivatives are left as
    they are. Values are unchanged.

    Args:
      function: of arrays and pytrees of arrays.
      clamp_roots: whether the root of a negative number is 0 instead of NaN. Rectified Adam has
        such a root in the branch that it does not take, and its NaN would meet the derivative
        that comes back.
    """

    def replayed(*args: Any) -> Any:
        closed, shape = jax.make_jaxpr(function, return_shape=True)(*args)
        outputs = _replay(closed.jaxpr, closed.consts, jax.tree.leaves(args), clamp_roots)
        return jax.tree.unflatten(jax.tree.structure(shape), outputs)

    return replayed


def _replay(jaxpr: Jaxpr, consts: list[Any], args: list[Any], clamp_roots: bool) -> list[Any]:
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else values[atom]

    for eqn in jaxpr.eqns:
        inputs = [read(atom) for atom in eqn.invars]
        if tangent := _tangent(eqn):
            outputs = [_bind_with_tangent(eqn, inputs, tangent, clamp_roots)]
        else:
            outputs = bind(eqn, inputs, _safe_bodies(eqn, clamp_roots))
        values.update(zip(eqn.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _safe_bodies(eqn: Any, clamp_roots: bool) -> dict[str, Any]:
    """Return an operation's parameters, with its branches or its body replayed."""
    params = dict(eqn.params)

    def safe(closed: Any) -> Any:
        def body(*args: Any) -> list[Any]:
            return _replay(closed.jaxpr, closed.consts, list(args), clamp_roots)

        return jax.make_jaxpr(body)(*closed.in_avals)

    if eqn.primitive is primitives.cond_p:
        params["branches"] = tuple(safe(branch) for branch in params["branches"])
    elif eqn.primitive is primitives.scan_p or eqn.primitive is primitives.jit_p:
        params["jaxpr"] = safe(params["jaxpr"])
    return params


def _bind_with_tangent(
    eqn: Any, inputs: list[Any], tangent: Tangent, clamp_roots: bool
) -> jax.Array:
    @jax.custom_jvp
    def operation(*inputs: jax.Array) -> jax.Array:
        if clamp_roots and eqn.primitive is primitives.sqrt_p:
            inputs = (jnp.maximum(inputs[0], 0),)
        return eqn.primitive.bind(*inputs, **eqn.params)

    def jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
        output = operation(*primals)
        along = [None if isinstance(t, SymbolicZero) else t for t in tangents]
        if all(t is None for t in along):
            return output, jnp.zeros_like(output)
        return output, tangent(output, along, *primals)

    operation.defjvp(jvp, symbolic_zeros=True)
    return operation(*inputs)


def _tangent(eqn: Any) -> Tangent | None:
    """Return the derivative that replaces an operation's own; None where that is finite."""
    tangent = _TANGENTS.get(eqn.primitive)
    if eqn.primitive is primitives.integer_pow_p and eqn.params["y"] < 0:
        tangent = _power_tangent(eqn.params["y"])
    if eqn.primitive is primitives.div_p and isinstance(eqn.invars[1], Literal):
        return None  # a mean, say
    if tangent is None or not jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.floating):
        return None
    return tangent


def _sqrt_tangent(root: jax.Array, tangents: list[Any], x: jax.Array) -> jax.Array:
    del x
    return 0.5 / jnp.where(root == 0, jnp.inf, root) * tangents[0]


def _power_tangent(exponent: float) -> Tangent:
    def tangent(power: jax.Array, tangents: list[Any], x: jax.Array) -> jax.Array:
        return _along_base(power, tangents[0], x, exponent)

    return tangent


def _pow_tangent(
    power: jax.Array, tangents: list[Any], x: jax.Array, exponent: jax.Array
) -> jax.Array:
    dx, dexponent = tangents
    if dx is None:
        return _along_exponent(power, dexponent, x)
    along_base = _along_base(power, dx, x, exponent)
    return along_base if dexponent is None else along_base + _along_exponent(power, dexponent, x)


def _along_base(power: jax.Array, dx: jax.Array, x: jax.Array, exponent: Any) -> jax.Array:
    """Return `p xᵖ/x dx`, and at x = 0 the derivative where it is finite: 1 for p = 1, or 0."""
    zero = jnp.abs(x) <= 1 / jnp.finfo(x.dtype).max  # 1 / x is not finite
    exponent = jnp.asarray(exponent, x.dtype)
    factor = jnp.where(zero, (exponent == 1).astype(x.dtype), exponent * power)
    return dx / jnp.where(zero, 1, x) * factor


def _along_exponent(power: jax.Array, dexponent: jax.Array, x: jax.Array) -> jax.Array:
    zero = x == 0
    return jnp.where(zero, 0, jnp.log(jnp.where(zero, 1, x)) * power) * dexponent


def _div_tangent(quotient: jax.Array, tangents: list[Any], x: jax.Array, y: jax.Array) -> jax.Array:
    del quotient  # not finite where y = 0
    dx, dy = tangents
    nonzero = jnp.where(y == 0, jnp.inf, y)
    if dy is None:
        return dx / nonzero
    slope = 1 / nonzero
    fall = (x * slope) * dy
    return slope * (-fall if dx is None else dx - fall)


_TANGENTS: dict[Any, Tangent] = {
    primitives.sqrt_p: _sqrt_tangent,
    primitives.rsqrt_p: _power_tangent(-1 / 2),
    primitives.cbrt_p: _power_tangent(1 / 3),
    primitives.pow_p: _pow_tangent,
    primitives.div_p: _div_tangent,
}
