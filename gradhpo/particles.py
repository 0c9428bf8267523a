"""Particles: one computation in many copies, batched, in chunks or divided over devices, summed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gradhpo.errors import check_count
from gradhpo.state import PyTree


def summed(
    function: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]],
    own: PyTree,
    shared: PyTree,
    chunk: int | None = None,
    mesh: Mesh | None = None,
    axis: str = "trial",
) -> tuple[PyTree, PyTree]:
    """Return the sum of what `function(own, shared)` first returns, and all of what it returns too.

    Args:
      function: of one particle's own values, and of those that all share; traceable.
      own: a pytree of arrays with a leading axis of particles.
      shared: a pytree of arrays.
      chunk: how many are computed at once; by default all.
      mesh: whose devices along `axis` each take a part of the particles; they meet in one
        reduction.
      axis: of the mesh.

    Returns:
      The sum, and the rest with a leading axis of particles, which lies divided over the devices.
    """

    def here(own: PyTree, shared: PyTree) -> tuple[PyTree, PyTree]:
        def batch(own: PyTree) -> tuple[PyTree, PyTree]:
            made, rest = jax.vmap(function, in_axes=(0, None))(own, shared)
            return jax.tree.map(lambda x: x.sum(0), made), rest

        return batch(own) if chunk is None else _in_chunks(batch, own, chunk)

    def on_device(own: PyTree, shared: PyTree) -> tuple[PyTree, PyTree]:
        total, rest = here(own, shared)
        vector, back = ravel_pytree(total)  # one reduction, however many leaves
        return back(jax.lax.psum(vector, axis)), rest

    if mesh is None:
        return here(own, shared)
    # Unchecked, so that a user's loop may start from a constant.
    divided = jax.shard_map(
        on_device, mesh=mesh, in_specs=(P(axis), P()), out_specs=(P(), P(axis)), check_vma=False
    )
    return divided(own, shared)


def _in_chunks(
    batch: Callable[[PyTree], tuple[PyTree, PyTree]], own: PyTree, chunk: int
) -> tuple[PyTree, PyTree]:
    """Return what `batch` makes of all, a chunk after another, so that no two are in memory."""
    parts = jax.tree.map(lambda x: x.reshape(-1, chunk, *x.shape[1:]), own)
    shapes = jax.eval_shape(batch, jax.tree.map(lambda x: x[0], parts))[0]
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def body(total: PyTree, part: PyTree) -> tuple[PyTree, PyTree]:
        made, rest = batch(part)
        return optax.tree.add(total, made), rest

    total, rest = jax.lax.scan(body, nothing, parts)
    return total, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rest)


def check_layout(name: str, count: int, chunk: Any, mesh: Any, axis: str) -> None:
    """Raise unless so many particles can be laid out so.

    Raises:
      TypeError: if the mesh is none.
      ValueError: if the mesh has no such axis, or something does not divide the particles.
    """
    devices = 1
    if mesh is not None:
        if not isinstance(mesh, Mesh):
            raise TypeError(f"mesh must be a jax.sharding.Mesh, got {type(mesh).__name__}")
        if axis not in mesh.shape:
            raise ValueError(f"axis must be one of the mesh's {tuple(mesh.shape)}, got {axis!r}")
        devices = mesh.shape[axis]
    if count % devices:
        raise ValueError(f"{name} must be a multiple of {devices} devices, got {count}")
    if chunk is not None and count // devices % check_count("chunk", chunk):
        each = f"{name} of a device, {count // devices}"
        raise ValueError(f"chunk must divide the {each}; got {chunk}")


def placed(tree: PyTree, mesh: Mesh | None, axis: str | None = None) -> PyTree:
    """Return arrays on the mesh's devices: divided along `axis`, or the same on all; traceable."""
    if mesh is None:
        return tree
    sharding = NamedSharding(mesh, P() if axis is None else P(axis))
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree)):
        return jax.lax.with_sharding_constraint(tree, sharding)
    return jax.device_put(tree, sharding)
