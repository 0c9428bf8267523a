"""Meshes with the axes "trial", "data" and others, and this process's part in a job of several."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gradhpo.state import PyTree, is_key


def make_mesh(
    *, trial: int = 1, data: int | None = None, devices: Any = None, **others: int
) -> Mesh:
    """Return a mesh with the axes "trial" and "data", and others by name.

    Args:
      trial: devices along "trial", over which a population's slots are divided.
      data: devices along "data", over which batches are divided; by default all that remain.
      devices: a sequence of devices; by default all of the job's.
      **others: devices along further axes, over which `rules` divide arrays; those along the last
        axis are neighbours.

    Raises:
      ValueError: if there are not as many devices as the sizes' product.
    """
    found: Sequence[Any] = jax.devices() if devices is None else list(devices)
    known = {"trial": trial, **others}
    if data is None and min(known.values()) >= 1:
        taken = math.prod(known.values())
        if len(found) % taken:
            sizes = " times ".join(f"{name}={size}" for name, size in known.items())
            raise ValueError(f"{sizes} does not divide {len(found)} devices: give data= too")
        data = len(found) // taken
    sizes = {"trial": trial, "data": 0 if data is None else data, **others}
    size = math.prod(sizes.values())
    if min(sizes.values()) < 1 or size > len(found):
        wanted = " times ".join(f"{name}={size}" for name, size in sizes.items())
        raise ValueError(f"{wanted} devices wanted, {len(found)} found")
    # Explicit axes, the default of `jax.make_mesh`, would make `shard_map` refuse unsharded input.
    axis_types = (AxisType.Auto,) * len(sizes)
    used = np.asarray(found[:size]).reshape(*sizes.values())
    return Mesh(used, tuple(sizes), axis_types=axis_types)


def axis_size(mesh: Mesh, axis: str) -> int:
    """Return the number of devices along an axis.

    Raises:
      ValueError: if the mesh has no such axis.
    """
    if axis not in mesh.shape:
        raise ValueError(f"axis must be one of the mesh's {tuple(mesh.shape)}, got {axis!r}")
    return mesh.shape[axis]


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    bind_address: str | None = None,
) -> None:
    """Join this process to a job of several, before any JAX computation.

    Without arguments the job is read from the environment of SLURM, Open MPI or a TPU pod, as
    `jax.distributed.initialize` does it.

    Args:
      coordinator: `host:port` of process 0.
      num_processes: processes in the job.
      process_id: this process's number, from 0.
      bind_address: `host:port` on which process 0 listens; by default all of its addresses.

    Raises:
      ValueError: if only some of the three are given, or the number is out of range.
    """
    given = {
        "coordinator": coordinator,
        "num_processes": num_processes,
        "process_id": process_id,
    }
    missing = [name for name, value in given.items() if value is None]
    if missing and len(missing) < len(given):
        raise ValueError(f"initialize takes all of {list(given)} or none; missing {missing}")
    if process_id is not None and not 0 <= process_id < (num_processes or 0):
        raise ValueError(f"process_id must be in [0, {num_processes}), got {process_id}")
    jax.distributed.initialize(
        coordinator, num_processes, process_id, coordinator_bind_address=bind_address
    )


def global_batch(batch: PyTree, mesh: Mesh, axis: str = "data") -> PyTree:
    """Return the batch of the whole job from this process's rows of it.

    Args:
      batch: a pytree of arrays `(rows of this process, …)`, as many in each process.
      mesh: a mesh over the devices of all processes.
      axis: the mesh axis that divides the rows.
    """
    axis_size(mesh, axis)
    sharding = NamedSharding(mesh, P(axis))
    parts = axis_size(mesh, axis) // jax.process_count()

    def whole(rows: Any) -> jax.Array:
        shape = np.shape(rows)
        if not shape or (parts and shape[0] % parts):
            raise ValueError(
                f"batch must have a multiple of {parts} rows in each process, one part for each of "
                f"its devices; got shape {shape}. Drop rows, or use pad_batch"
            )
        return jax.make_array_from_process_local_data(sharding, np.asarray(rows))

    return jax.tree.map(functools.partial(_through_key_data, whole), batch)


def pad_batch(batch: PyTree, devices: int) -> tuple[PyTree, np.ndarray]:
    """Pad a batch with its last row to a multiple of `devices` rows, with weights that undo that.

    The weights are 0 for padded rows and `padded rows / rows` for the others: the mean of
    `weights * loss of each row` over all rows, on one device or on many, is the mean over the real
    rows. Pass the weights in the batch, and use them so in the loss.

    Args:
      batch: a pytree of arrays `(rows, …)`.
      devices: the number of devices along the data axis.

    Returns:
      The padded batch, and the weights, float32 `(padded rows,)`.
    """
    sizes = {np.shape(leaf)[0] for leaf in jax.tree.leaves(batch)}
    if len(sizes) != 1:
        raise ValueError(f"batch must have one number of rows, got {sorted(sizes)}")
    (rows,) = sizes
    if not rows:
        raise ValueError("batch has no rows to pad with")
    padded = math.ceil(rows / devices) * devices

    last = np.minimum(np.arange(padded), rows - 1)

    def pad(leaf: Any) -> Any:
        return leaf[last] if is_key(leaf) else np.asarray(leaf)[last]

    weights = np.where(np.arange(padded) < rows, padded / rows, 0).astype(np.float32)
    return jax.tree.map(pad, batch), weights


def to_host(x: Any) -> np.ndarray:
    """Return an array of the devices, all of it, as NumPy; in a job of several processes too."""
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(x, tiled=True))
    return np.asarray(x)


def put(tree: PyTree, sharding: Any) -> PyTree:
    """Return arrays placed by `sharding`; in a job of several processes each places its part.

    `jax.device_put` would compare the whole arrays of all processes first, at every call.
    """
    if sharding is None or sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)

    def from_host(x: Any) -> jax.Array:
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, sharding, lambda part: host[part])

    def place(x: Any) -> jax.Array:
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return jax.device_put(x, sharding)  # of the whole job already
        return _through_key_data(from_host, x)

    return jax.tree.map(place, tree)


def _through_key_data(function: Callable[[Any], jax.Array], x: Any) -> jax.Array:
    """Return `function(x)`, of the numbers behind it where `x` is an array of PRNG keys."""
    if not is_key(x):
        return function(x)
    return jax.random.wrap_key_data(function(jax.random.key_data(x)), impl=jax.random.key_impl(x))
