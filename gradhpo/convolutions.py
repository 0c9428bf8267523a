"""Convolutions in the forms that XLA's CPU compiler runs fast wherever they stand.

XLA hands a convolution to its fast kernel if images are `N…C` and kernels `…IO`. It brings others
into that form in a program's outermost computation only: inside a loop, the gradients of a
convolution, which are not born so, take up to a hundred times longer (jax 0.10.2). Here each
convolution of a program that is otherwise finished, derivatives included, is marked, and where the
program is lowered for a CPU a marked one is written in a fast form. Elsewhere nothing changes.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, Primitive, primitives
from jax.interpreters import ad, batching, mlir

MOST_TAPS = 64
"""Of a depthwise kernel written as a sum over its taps: each is a line of the program."""

_general_p = primitives.conv_general_dilated_p
_marked_p = Primitive("gradhpo_convolution")


def mark(closed: ClosedJaxpr) -> ClosedJaxpr:
    """Return the program with its convolutions marked, in loops, branches and calls too.

    Itself, the same object, where it has none.
    """
    jaxpr = _mark(closed.jaxpr, {})
    return closed if jaxpr is closed.jaxpr else closed.replace(jaxpr=jaxpr)


def grouped(closed: ClosedJaxpr) -> bool:
    """Whether a program has a convolution of several groups: `vmap` over kernels makes such."""
    return any(
        eqn.params["feature_group_count"] > 1 or eqn.params["batch_group_count"] > 1
        for eqn in equations(closed.jaxpr)
        if eqn.primitive in (_general_p, _marked_p)
    )


def _mark(jaxpr: Jaxpr, known: dict[int, Jaxpr]) -> Jaxpr:
    if id(jaxpr) in known:  # one body, called often, stays one
        return known[id(jaxpr)]
    eqns = [_marked(eqn, known) for eqn in jaxpr.eqns]
    same = all(new is old for new, old in zip(eqns, jaxpr.eqns, strict=True))
    known[id(jaxpr)] = jaxpr if same else jaxpr.replace(eqns=eqns)
    return known[id(jaxpr)]


def _marked(eqn: Any, known: dict[int, Jaxpr]) -> Any:
    if eqn.primitive is _general_p:
        # An explicit sharding of the result names the dimensions of this form.
        return eqn if eqn.params["out_sharding"] else eqn.replace(primitive=_marked_p)
    changed: dict[str, Any] = {}
    for name, value in eqn.params.items():
        leaves, structure = jax.tree.flatten(value, is_leaf=_is_body)
        if not any(map(_is_body, leaves)):
            continue
        new = [_marked_body(leaf, known) for leaf in leaves]
        if any(a is not b for a, b in zip(new, leaves, strict=True)):
            changed[name] = structure.unflatten(new)
    return eqn.replace(params=eqn.params | changed) if changed else eqn


def _marked_body(body: Any, known: dict[int, Jaxpr]) -> Any:
    if not isinstance(body, ClosedJaxpr):
        return _mark(body, known) if isinstance(body, Jaxpr) else body
    jaxpr = _mark(body.jaxpr, known)
    return body if jaxpr is body.jaxpr else body.replace(jaxpr=jaxpr)


def _is_body(value: Any) -> bool:
    return isinstance(value, Jaxpr | ClosedJaxpr)


def equations(jaxpr: Jaxpr) -> Iterator[Any]:
    """Yield all equations of a program, those in loops, branches and calls too."""
    for eqn in jaxpr.eqns:
        yield eqn
        for body in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_body):
            if _is_body(body):
                yield from equations(body.jaxpr if isinstance(body, ClosedJaxpr) else body)


def _as_given(lhs: jax.Array, rhs: jax.Array, **params: Any) -> jax.Array:
    return _general_p.bind(lhs, rhs, **params)


def _fast(lhs: jax.Array, rhs: jax.Array, *, dimension_numbers: Any, **params: Any) -> jax.Array:
    """Convolve images `N…C` with kernels `…IO`, whatever the dimension numbers say."""
    lhs_spec, rhs_spec, out_spec = dimension_numbers
    lhs = lax.transpose(lhs, (lhs_spec[0], *lhs_spec[2:], lhs_spec[1]))
    rhs = lax.transpose(rhs, (*rhs_spec[2:], rhs_spec[1], rhs_spec[0]))
    out = jax.eval_shape(lambda lhs, rhs: _canonical(lhs, rhs, **params), lhs, rhs)
    made = _form(lhs, rhs, out, params)
    return lax.transpose(made, np.argsort((out_spec[0], *out_spec[2:], out_spec[1])).tolist())


def _form(lhs: jax.Array, rhs: jax.Array, out: Any, params: dict[str, Any]) -> jax.Array:
    """Convolve `N…C` with `…IO` in the fastest form, to a result of the shape and dtype `out`."""
    images, kernels, made = (shape[1:-1] for shape in (lhs.shape, (1, *rhs.shape[:-1]), out.shape))
    groups, batch_groups = params["feature_group_count"], params["batch_group_count"]
    if 0 in (*lhs.shape, *rhs.shape, *out.shape):
        return _canonical(lhs, rhs, **params)
    if 1 < groups == lhs.shape[-1] and math.prod(kernels) <= MOST_TAPS:
        return _depthwise(lhs, rhs, out, params)
    if 1 < batch_groups == lhs.shape[0] and math.prod(made) <= MOST_TAPS:
        return _depthwise_gradient(lhs, rhs, out, params)
    if groups > 1 or batch_groups > 1:
        return _by_group(lhs, rhs, out, params)
    if math.prod(kernels) > math.prod(images):
        return _swapped(lhs, rhs, out, params)
    return _canonical(lhs, rhs, **params)


def _by_group(lhs: jax.Array, rhs: jax.Array, out: Any, params: dict[str, Any]) -> jax.Array:
    """Convolve one group after another: XLA's kernels for groups are slow, or there is none."""
    groups, batch_groups = params["feature_group_count"], params["batch_group_count"]
    n, alone = groups * batch_groups, {"feature_group_count": 1, "batch_group_count": 1}
    one = jax.ShapeDtypeStruct((*out.shape[:-1], out.shape[-1] // n), out.dtype)
    parts = _split(lhs, n, -1 if groups > 1 else 0), _split(rhs, n, -1)
    made = lax.map(lambda pair: _form(pair[0], pair[1], one, params | alone), parts)
    return jnp.moveaxis(made, 0, -2).reshape(out.shape)


def _split(x: jax.Array, n: int, axis: int) -> jax.Array:
    """Split an axis into `n` equal parts, which lead."""
    axis %= x.ndim
    shape = (*x.shape[:axis], n, x.shape[axis] // n, *x.shape[axis + 1 :])
    return jnp.moveaxis(x.reshape(shape), axis, 0)


def _canonical(lhs: jax.Array, rhs: jax.Array, **params: Any) -> jax.Array:
    n = lhs.ndim
    images = (0, n - 1, *range(1, n - 1))
    dimensions = lax.ConvDimensionNumbers(images, (n - 1, n - 2, *range(n - 2)), images)
    return _general_p.bind(lhs, rhs, dimension_numbers=dimensions, **params)


def _swapped(lhs: jax.Array, rhs: jax.Array, out: Any, params: dict[str, Any]) -> jax.Array:
    """Convolve with a kernel larger than the image: they change places, and the result turns round.

    XLA changes them by itself, but turns an operand round, and has no fast kernel for that: the
    gradient of a transposed convolution in its kernel would be nine times slower.
    """
    strides, dilations = params["window_strides"], (params["lhs_dilation"], params["rhs_dilation"])
    padding: list[tuple[int, int]] = []
    for i, (low, _) in enumerate(params["padding"]):
        reach = (out.shape[1 + i] - 1) * strides[i]
        image = (lhs.shape[1 + i] - 1) * dilations[0][i]
        kernel = (rhs.shape[i] - 1) * dilations[1][i]
        padding.append((reach - low, image - kernel + low))
    turned = {"lhs_dilation": dilations[1], "rhs_dilation": dilations[0], "padding": tuple(padding)}
    made = _canonical(jnp.moveaxis(rhs, -1, 0), jnp.moveaxis(lhs, 0, -1), **params | turned)
    return lax.rev(jnp.swapaxes(made, 0, -1), range(1, lhs.ndim - 1))


def _depthwise(lhs: jax.Array, rhs: jax.Array, out: Any, params: dict[str, Any]) -> jax.Array:
    """Convolve each channel with kernels of its own: a sum over their taps.

    XLA's fast kernel takes one channel after another, which is ten to sixty times slower.
    """
    wide, taps = _accumulated_in(out.dtype), rhs.shape[:-2]
    images = _padded(jnp.moveaxis(lhs, 0, -2), params).astype(wide)  # …NC
    images = jnp.repeat(images, rhs.shape[-1] // lhs.shape[-1], axis=-1)
    rhs = rhs.astype(wide)
    total: Any = 0
    for tap in itertools.product(*map(range, taps)):
        starts = np.multiply(tap, params["rhs_dilation"])
        window = _window(images, starts, out.shape[1:-1], params["window_strides"])
        total = total + window * rhs[tap][0]
    return jnp.moveaxis(total, -2, 0).astype(out.dtype)


def _depthwise_gradient(
    lhs: jax.Array, rhs: jax.Array, out: Any, params: dict[str, Any]
) -> jax.Array:
    """Convolve in batch groups of one, as the gradient of `_depthwise` in its kernels does.

    For each tap of the result an inner product; XLA convolves all pairs of channels, and keeps
    those of a channel with itself.
    """
    wide, taps = _accumulated_in(out.dtype), out.shape[1:-1]
    images = _padded(jnp.moveaxis(lhs, 0, -1), params).astype(wide)  # …CN, N being the channels
    images = jnp.repeat(images, rhs.shape[-1] // lhs.shape[0], axis=-1)
    rhs = rhs.astype(wide)
    rows: list[jax.Array] = []
    for tap in itertools.product(*map(range, taps)):
        starts = np.multiply(tap, params["window_strides"])
        window = _window(images, starts, rhs.shape[:-2], params["rhs_dilation"])
        rows.append(jnp.sum(window * rhs, axis=range(rhs.ndim - 1)))
    return jnp.stack(rows).reshape(out.shape).astype(out.dtype)


def _accumulated_in(dtype: Any) -> Any:
    return jnp.promote_types(dtype, jnp.float32) if jnp.issubdtype(dtype, jnp.floating) else dtype


def _padded(images: jax.Array, params: dict[str, Any]) -> jax.Array:
    """Pad and dilate the leading dimensions, those of space."""
    edges = zip(params["padding"], params["lhs_dilation"], strict=True)
    space = [(low, high, dilation - 1) for (low, high), dilation in edges]
    return lax.pad(images, jnp.zeros((), images.dtype), [*space, (0, 0, 0), (0, 0, 0)])


def _window(images: jax.Array, starts: Any, size: Sequence[int], strides: Any) -> jax.Array:
    """Return every `strides`-th element from `starts` on, along the dimensions of space."""
    ends = starts + np.multiply(np.subtract(size, 1), strides) + 1
    rest = images.shape[len(size) :]
    return lax.slice(images, (*starts, 0, 0), (*ends, *rest), (*strides, 1, 1))


def _batched(args: Any, axes: Any, **params: Any) -> tuple[jax.Array, int]:
    return jax.vmap(functools.partial(_as_given, **params), in_axes=tuple(axes))(*args), 0


# Derivatives and batches of a marked convolution are those of the one that it was, unmarked.
_marked_p.def_impl(_as_given)
_marked_p.def_effectful_abstract_eval(_general_p.abstract_eval)
ad.primitive_jvps[_marked_p] = ad.primitive_jvps[_general_p]
batching.primitive_batchers[_marked_p] = _batched
mlir.register_lowering(_marked_p, mlir.lower_fun(_as_given, multiple_results=False))
mlir.register_lowering(_marked_p, mlir.lower_fun(_fast, multiple_results=False), platform="cpu")
