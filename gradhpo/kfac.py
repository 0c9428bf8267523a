"""K-FAC: the Gauss-Newton matrix of dense layers as Kronecker products, which are easy to invert.

For a layer `s = aW + b`, the Hessian in (W, b) is taken for `A ⊗ G`, `A` the mean of `āāᵀ` over the
examples (ā is a with a 1 behind it) and `G` the sum of `gᵀg`, where the g of an example are the
derivatives of the last layer's outputs z in s, times a root of the loss's Hessian in z (Martens &
Grosse, Optimizing Neural Networks with Kronecker-factored Approximate Curvature, ICML 2015; their
Fisher matrix is this one where the loss is a negative log-likelihood). That Hessian is taken of the
loss itself, so that no likelihood need be named.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gradhpo.dense_layers import DenseLayers, Layer
from gradhpo.hypergradient import at_least_float32, exact_product
from gradhpo.state import PyTree

MOST_OUTPUTS = 1024
"""Of the last layer, whose square is held for each example."""


class _Factors(NamedTuple):
    """Of one layer, by eigenvalues and eigenvectors."""

    of_inputs: tuple[jax.Array, jax.Array]
    of_outputs: tuple[jax.Array, jax.Array]
    ridge: jax.Array


def inverse(
    function: Callable[[PyTree], jax.Array],
    params: PyTree,
    samples: int,
    damping: float,
    key: jax.Array,
) -> Callable[[PyTree], PyTree]:
    """Return `b ↦ (A ⊗ G + (ρ + r) I)⁻¹ b`, layer by layer.

    r is the mean curvature in a matrix that does not go through a layer, as of a weight decay.

    Args:
      function: `params -> scalar`, whose dense layers `DenseLayers` finds.
      params: the weights, each the matrix or bias of a dense layer.
      samples: random signs that `G` is estimated from, each of the cost of a gradient; as many as
        the last layer has outputs, or more: G itself.
      damping: ρ > 0.
      key: what the signs are drawn from.

    Raises:
      ValueError: if a weight is no dense layer's, or the last layer has too many outputs.
    """
    net = DenseLayers(function, params)
    directions = _directions(net, params, samples, key)
    factors = _factors(net, params, directions, damping)

    def solve(target: PyTree) -> PyTree:
        leaves = jax.tree.leaves(target)
        for layer, of in zip(net.layers, factors, strict=True):
            weight, bias = leaves[layer.weight], layer.bias
            if layer.turned:
                rows = weight.reshape(layer.outputs, -1).T
            else:
                rows = weight.reshape(-1, layer.outputs)
            if bias is not None:
                rows = jnp.concatenate([rows, leaves[bias].reshape(1, -1)])
            solved = _divided(of, rows.astype(of.ridge.dtype))
            if bias is not None:
                solved, last = solved[:-1], solved[-1]
                leaves[bias] = last.reshape(leaves[bias].shape).astype(leaves[bias].dtype)
            solved = solved.T if layer.turned else solved
            leaves[layer.weight] = solved.reshape(weight.shape).astype(weight.dtype)
        return net.structure.unflatten(leaves)

    return solve


def _divided(factors: _Factors, rows: jax.Array) -> jax.Array:
    (a, inputs), (g, outputs) = factors.of_inputs, factors.of_outputs
    turned = exact_product(exact_product(inputs.T, rows), outputs)
    turned = turned / (a[:, None] * g + factors.ridge)
    return exact_product(exact_product(inputs, turned), outputs.T)


def _directions(net: DenseLayers, params: PyTree, samples: int, key: jax.Array) -> jax.Array:
    """Return cotangents of z, `(directions, *z.shape)`, whose squares are the loss's Hessian."""
    last = net.layers[-1]
    size = last.outputs
    if size > MOST_OUTPUTS:
        raise ValueError(
            f'solver="kfac" takes a last layer of at most {MOST_OUTPUTS} outputs, whose square it '
            f"holds for each example; {net.names[last.weight]} has {size}"
        )
    still = net.still()

    def head(move: jax.Array) -> jax.Array:
        return net(params, [*still[:-1], move]).loss

    product = jax.linearize(jax.grad(head), still[-1])[1]
    flat = [size if axis == last.axis else 1 for axis in range(len(last.shape))]
    units = jnp.eye(size, dtype=last.dtype).reshape(size, *flat)
    columns = jax.vmap(product)(jnp.broadcast_to(units, (size, *last.shape)))
    hessians = jnp.moveaxis(jax.vmap(lambda column: _last_axis(column, last))(columns), 0, -1)
    hessians = at_least_float32(hessians)
    values, vectors = jnp.linalg.eigh((hessians + jnp.swapaxes(hessians, -1, -2)) / 2)
    # Where the loss bends down, the Gauss-Newton matrix is that of a loss which does not.
    roots = vectors * jnp.sqrt(jnp.maximum(values, 0))[:, None]  # (examples, size, size)
    if samples < size:
        # Signs of its own for each example: products of different ones are 0 in the mean.
        signs = _signs(net, key, (len(roots), size, samples), roots.dtype)
        roots = exact_product(roots, signs) / math.sqrt(samples)
    spread = jnp.moveaxis(roots, -1, 0)
    if last.axis is None:
        return spread.reshape(-1, *last.shape)
    rest = [n for axis, n in enumerate(last.shape) if axis != last.axis]
    return jnp.moveaxis(spread.reshape(-1, *rest, size), -1, last.axis + 1)


def _signs(net: DenseLayers, key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Return this device's part of the signs of all examples."""
    devices, place = 1, jnp.zeros((), int)
    for axis in net.axes:
        size = jax.lax.axis_size(axis)
        devices, place = devices * size, place * size + jax.lax.axis_index(axis)
    signs = jax.random.rademacher(key, (devices * shape[0], *shape[1:]), dtype)
    return jax.lax.dynamic_slice_in_dim(signs, place * shape[0], shape[0])


def _factors(
    net: DenseLayers, params: PyTree, directions: jax.Array, damping: float
) -> list[_Factors]:
    still = net.still()
    (z, passed), pull = _outputs(net, params, still)

    def grams(direction: jax.Array) -> list[jax.Array]:
        (cotangents,) = pull(direction.astype(z.dtype))
        rows = [_last_axis(c, layer) for c, layer in zip(cotangents, net.layers, strict=True)]
        rows = at_least_float32(rows)
        return [exact_product(row.T, row) for row in rows]

    of_outputs = jax.tree.map(lambda g: g.sum(0), jax.lax.map(grams, directions))
    of_inputs, examples = list[jax.Array](), list[jax.Array]()
    for a, layer in zip(passed, net.layers, strict=True):
        rows = at_least_float32(a)
        if layer.bias is not None:
            rows = jnp.concatenate([rows, jnp.ones_like(rows[:, :1])], axis=1)
        of_inputs.append(exact_product(rows.T, rows))
        examples.append(jnp.asarray(len(rows), rows.dtype))
    sums = (of_inputs, examples, of_outputs)
    for axis in net.axes:
        sums = jax.lax.psum(sums, axis)
    ridges = _ridges(net, params, damping)
    return [
        _Factors(_spectrum(a / n), _spectrum(g), ridges[layer.weight])
        for a, n, g, layer in zip(*sums, net.layers, strict=True)
    ]


def _outputs(
    net: DenseLayers, params: PyTree, still: list[jax.Array]
) -> tuple[tuple[jax.Array, list[jax.Array]], Callable[[jax.Array], tuple[list[jax.Array]]]]:
    """Return z, all layers' inputs, and the map of z's cotangents to those of all outputs."""

    def run(moves: list[jax.Array]) -> tuple[jax.Array, list[jax.Array]]:
        passed = net(params, moves)
        return passed.outputs[-1], passed.inputs

    z, pull, inputs = jax.vjp(run, still, has_aux=True)
    return (z, inputs), pull


def _ridges(net: DenseLayers, params: PyTree, damping: float) -> list[jax.Array]:
    """Return ρ + r for each leaf."""

    def around(params: PyTree) -> jax.Array:
        return net(params, hold=range(len(net.layers))).loss

    ones = jax.tree.map(jnp.ones_like, params)
    bent = jax.jvp(jax.grad(around), (params,), (ones,))[1]
    wide = jax.tree.leaves(at_least_float32(bent))
    return [damping + jnp.maximum(jnp.mean(leaf), 0) for leaf in wide]


def _spectrum(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    values, vectors = jnp.linalg.eigh(matrix)
    return jnp.maximum(values, 0), vectors


def _last_axis(x: jax.Array, layer: Layer) -> jax.Array:
    """Return what is shaped like `s` as `(examples, outputs)`."""
    if layer.axis is None:
        return x.reshape(-1, 1)
    return jnp.moveaxis(x, layer.axis, -1).reshape(-1, layer.shape[layer.axis])
