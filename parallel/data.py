"""Data-parallel steps: the batch is divided over devices, and the result is one device's.

The losses are replaced by their mean over the mesh axis; differentiating that mean gives exact
derivatives of first and second order, so no algorithm knows that it runs in parallel.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.tree_util import keystr, tree_flatten_with_path, tree_map_with_path

from gradhpo import episodes
from gradhpo.compilation import jit
from gradhpo.errors import check_same_tree, scalar_loss
from gradhpo.optimizer import BilevelOptimizer
from gradhpo.parallel.collectives import gather, same_on_all, spread
from gradhpo.parallel.mesh import axis_size, put
from gradhpo.state import BilevelState, LossFn, PyTree, prepare

Backend = Literal["shard_map", "auto", "pmap"]
Rules = Callable[[str, Any], P]
# What the wrapped optimizer is, the data-parallel one is too.
_SHARED = (
    *("inner_optimizer", "outer_optimizer", "update_fn"),
    *("T", "calibration_period", "remembers_batch", "batch_axis"),
)


def data_parallel(
    optimizer: BilevelOptimizer,
    mesh: Mesh,
    *,
    axis: str = "data",
    backend: Backend = "shard_map",
    reduction: Literal["mean", "sum"] = "mean",
    rules: Rules | None = None,
) -> DataParallel:
    """Return `optimizer` with its batches divided over the devices of a mesh axis.

    The result has the same interface, and gives the numbers of one device: in `step`, `run`,
    `solve` and a population.

    - The losses average over the batch (or sum, with `reduction`). A loss with statistics of the
      batch (batch normalization) sees those of each device's part, as everywhere in data
      parallelism, and is then not what one device computes; with "auto" it is.
    - Per-example hyperparameters are looked up by an index in the batch, and work.
    - Randomness: a key in the batch is a leaf that is divided too, so give a key for each row.
      With "auto" nothing changes.
    - An optimizer of one's own sees its part of the batch: with "shard_map" and "pmap", only what
      comes from the losses or the `update_fn` is of the whole batch, and a step that would give
      each device a state of its own is refused.
    - An `update_fn` has its gradient inside; the weights it returns on each part are averaged.
      That is exact for an update linear in the gradient; for others use `inner_optimizer`.

    Args:
      optimizer: any `BilevelOptimizer`, one's own included.
      mesh: from `make_mesh`, or any mesh with Auto axes.
      axis: the mesh axis over which rows of a batch are divided.
      backend: "shard_map": one program for each device, the fewest collectives; state replicated.
        "auto": arrays are placed, and the compiler divides the work; exact for any function, and
        with `rules` the state is divided too (FSDP). "pmap": for code that needs `jax.pmap`.
      reduction: what the losses do over the rows of a batch.
      rules: with "auto", a function `(path, array) -> PartitionSpec` for every leaf of the state,
        the path as `jax.tree_util.keystr` writes it (`.params['w']`).

    Raises:
      ValueError: for an unknown backend, reduction or axis, for `rules` without "auto", or an
        optimizer that remembers batches.
    """
    return DataParallel(optimizer, mesh, axis, backend, reduction, rules)


@dataclasses.dataclass(frozen=True)
class DataParallel(BilevelOptimizer):
    """A data-parallel optimizer; made by `data_parallel`."""

    optimizer: BilevelOptimizer
    mesh: Mesh
    axis: str = "data"
    backend: Backend = "shard_map"
    reduction: Literal["mean", "sum"] = "mean"
    rules: Rules | None = None

    def __post_init__(self) -> None:
        axis_size(self.mesh, self.axis)
        for name, accepted in (
            ("backend", ("shard_map", "auto", "pmap")),
            ("reduction", ("mean", "sum")),
        ):
            if getattr(self, name) not in accepted:
                raise ValueError(f"{name} must be one of {accepted}, got {getattr(self, name)!r}")
        if self.rules is not None and self.backend != "auto":
            raise ValueError(f'rules need backend="auto", got {self.backend!r}')
        if self.optimizer.remembers_batch and self.backend != "auto":
            raise ValueError('distill_data mixes rows of whole batches: use backend="auto"')
        if self.backend == "pmap" and self.mesh.size != axis_size(self.mesh, self.axis):
            raise ValueError(f'backend="pmap" needs a mesh with no axis but {self.axis!r}')
        for name in _SHARED:
            object.__setattr__(self, name, getattr(self.optimizer, name))

    def init(self, params: PyTree, hyperparams: PyTree, **extra: Any) -> BilevelState:
        """Return the state before the first step, placed on the mesh; as the wrapped `init`."""
        state = self.optimizer.init(params, hyperparams, **extra)
        return self.place(state)

    def place(self, state: BilevelState) -> BilevelState:
        """Return the state on the mesh's devices: replicated, or by `rules`."""
        state = prepare(state)
        if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(state)):
            return self._constrain(state)
        return jax.tree.map(put, state, self._shardings(state))

    def compute_hypergradient(
        self,
        state: BilevelState,
        train_batch: PyTree,
        val_batch: PyTree,
        train_loss_fn: LossFn,
        val_loss_fn: LossFn,
    ) -> PyTree:
        """Return the hypergradient of the whole batch."""
        state = self.place(state)
        return _hypergradient(self, state, train_batch, val_batch, train_loss_fn, val_loss_fn)

    def advance(
        self,
        state: BilevelState,
        train_batch: PyTree,
        val_batch: PyTree,
        train_loss_fn: LossFn,
        val_loss_fn: LossFn,
        lr_hyper: Any = None,
    ) -> BilevelState:
        """Take the step on the parts of the batch; traceable."""
        batches, losses = (train_batch, val_batch), (train_loss_fn, val_loss_fn)
        new = self.divided("advance", state, batches, losses, lr_hyper, self.batch_axis)
        return self._constrain(new)

    def calibrate(
        self,
        state: BilevelState,
        train_batches: PyTree,
        val_batch: PyTree,
        train_loss_fn: LossFn,
        val_loss_fn: LossFn,
    ) -> BilevelState:
        """Estimate the wrapped optimizer's own settings, from divided batches."""
        batches, losses = (train_batches, val_batch), (train_loss_fn, val_loss_fn)
        return self.divided("calibrate", state, batches, losses, None, batch_axis=1)

    def reset(self, state: BilevelState, params: PyTree) -> BilevelState:
        """Return `state` at the beginning of an episode that starts from `params`."""
        return self._constrain(self.optimizer.reset(state, params))

    def run(self, state: BilevelState, *args: Any, **kwargs: Any) -> BilevelState:
        """Train in episodes; the arguments are those of the wrapped optimizer's `run`."""
        bound = inspect.signature(self.optimizer.run).bind(state, *args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        losses = (given["train_loss_fn"], given["val_loss_fn"])
        self.check_step(*losses, given["lr_hyper"])
        rest = (given["lr_reptile"], given["lr_hyper"], given["callback"], given["progress"])
        plan = episodes.Plan(given["M"], given.get("T", self.T), *rest)
        draw = (given["get_train_batch"], given["get_val_batch"])
        return episodes.run(self, prepare(self.place(state)), plan, *draw, *losses)

    @property
    def within(self) -> Within:
        """What a program takes that is inside a `shard_map` over this mesh already."""
        return Within(self, self.T, self.calibration_period, self.remembers_batch)

    def on_part(
        self,
        method: str,
        state: BilevelState,
        batches: tuple[PyTree, PyTree],
        losses: tuple[LossFn, LossFn],
        rate: tuple[Any, ...] = (),
    ) -> Any:
        """Call the wrapped optimizer's method on one device, with its part of whole batches.

        Raises:
          ValueError: if what it returns is not the same on all devices.
        """
        local = self._local_optimizer()
        names = ("train_loss_fn", "val_loss_fn")
        means = [self._over_devices(*named) for named in zip(names, losses, strict=True)]

        def call(state: BilevelState, batches: tuple[PyTree, PyTree], rate: Any) -> Any:
            return getattr(local, method)(state, *batches, *means, *rate)

        return same_on_all(call, self.axis, (False, True, False))(state, batches, rate)

    @property
    def _share(self) -> float:
        """What a device's loss counts for."""
        return 1 / axis_size(self.mesh, self.axis) if self.reduction == "mean" else 1

    def _over_devices(self, name: str, loss_fn: LossFn) -> LossFn:
        """Return the loss of the whole batch, as each device computes it with its part."""
        checked = scalar_loss(name, loss_fn)

        @functools.wraps(loss_fn)
        def loss(params: PyTree, hyperparams: PyTree, batch: PyTree) -> jax.Array:
            local = spread(params, self.axis), spread(hyperparams, self.axis)
            return gather(self._share * checked(*local, batch), self.axis)

        return loss

    def _local_optimizer(self) -> BilevelOptimizer:
        """Return the wrapped optimizer, an `update_fn` averaged over the devices."""
        own = self.update_fn
        if own is None:
            return self.optimizer

        @functools.wraps(own)
        def update_fn(params: PyTree, hyperparams: PyTree, batch: PyTree) -> PyTree:
            local = spread(params, self.axis)
            moved = own(local, spread(hyperparams, self.axis), batch)
            check_same_tree("update_fn", moved, "params", params)
            change = optax.tree.scale(self._share, optax.tree.sub(moved, local))
            change = gather(change, self.axis)
            return optax.tree.cast_like(optax.tree.add(params, change), params)

        averaged = copy.copy(self.optimizer)
        object.__setattr__(averaged, "update_fn", update_fn)
        return averaged

    def part(
        self, train_batch: PyTree, val_batch: PyTree, batch_axis: int
    ) -> tuple[PyTree, PyTree]:
        """Return this device's rows of whole batches, inside a `shard_map`."""
        n = axis_size(self.mesh, self.axis)
        _check_rows("train_batch", train_batch, n, batch_axis)
        _check_rows("val_batch", val_batch, n, 0)

        def rows(batch: PyTree, axis: int) -> PyTree:
            def mine(x: jax.Array) -> jax.Array:
                size = x.shape[axis] // n
                start = jax.lax.axis_index(self.axis) * size
                return jax.lax.dynamic_slice_in_dim(x, start, size, axis)

            return jax.tree.map(mine, batch)

        return rows(train_batch, batch_axis), rows(val_batch, 0)

    def divided(
        self,
        method: str,
        state: BilevelState,
        batches: tuple[PyTree, PyTree],
        losses: tuple[LossFn, LossFn],
        lr_hyper: Any,
        batch_axis: int,
    ) -> Any:
        """Call the wrapped optimizer's method on the parts of the batches."""
        n = axis_size(self.mesh, self.axis)
        train_batch, val_batch = batches
        _check_rows("train_batch", train_batch, n, batch_axis)
        _check_rows("val_batch", val_batch, n, 0)
        train_spec, val_spec = P(*[None] * batch_axis, self.axis), P(self.axis)
        rate = () if lr_hyper is None else (lr_hyper,)

        if self.backend == "auto":
            place = functools.partial(_constrain_all, self.mesh)
            batches = place(train_batch, train_spec), place(val_batch, val_spec)
            return getattr(self.optimizer, method)(state, *batches, *losses, *rate)

        def on_device(state: Any, train_batch: Any, val_batch: Any, rate: Any) -> Any:
            return self.on_part(method, state, (train_batch, val_batch), losses, rate)

        if self.backend == "pmap":
            parts = _split_rows(train_batch, n, batch_axis), _split_rows(val_batch, n, 0)
            devices = list(self.mesh.devices.ravel())
            mapped = jax.pmap(
                on_device, self.axis, in_axes=(None, 0, 0, None), out_axes=None, devices=devices
            )
            return mapped(state, *parts, rate)
        specs = (P(), train_spec, val_spec, P())
        # `on_part` has checked what the types of checked axes would, see `collectives`.
        mapped = jax.shard_map(
            on_device, mesh=self.mesh, in_specs=specs, out_specs=P(), check_vma=False
        )
        return mapped(state, train_batch, val_batch, rate)

    def _constrain(self, state: BilevelState) -> BilevelState:
        if self.backend != "auto":
            return state
        return jax.lax.with_sharding_constraint(state, self._shardings(state))

    def _shardings(self, state: BilevelState) -> BilevelState:
        def sharding(path: Any, leaf: Any) -> NamedSharding:
            spec = P() if self.rules is None else self.rules(keystr(path), leaf)
            return NamedSharding(self.mesh, spec)

        return tree_map_with_path(sharding, state)


@dataclasses.dataclass(frozen=True)
class Within:
    """A data-parallel optimizer inside a `shard_map`: of whole batches, each device takes its part.

    The part of `BilevelOptimizer` that a `Trial` asks for.
    """

    parallel: DataParallel
    T: int
    calibration_period: int
    remembers_batch: bool

    def init(self, params: PyTree, hyperparams: PyTree, **extra: Any) -> BilevelState:
        """Return the state before the first step."""
        return self.parallel.optimizer.init(params, hyperparams, **extra)

    def advance(
        self,
        state: BilevelState,
        train_batch: PyTree,
        val_batch: PyTree,
        train_loss_fn: LossFn,
        val_loss_fn: LossFn,
        lr_hyper: Any = None,
    ) -> BilevelState:
        """Take a step on this device's part of the batches."""
        parts = self.parallel.part(train_batch, val_batch, self.parallel.batch_axis)
        rate = () if lr_hyper is None else (lr_hyper,)
        losses = (train_loss_fn, val_loss_fn)
        return self.parallel.on_part("advance", state, parts, losses, rate)

    def calibrate(
        self,
        state: BilevelState,
        train_batches: PyTree,
        val_batch: PyTree,
        train_loss_fn: LossFn,
        val_loss_fn: LossFn,
    ) -> BilevelState:
        """Estimate the wrapped optimizer's own settings, from parts of the batches."""
        parts = self.parallel.part(train_batches, val_batch, 1)
        return self.parallel.on_part("calibrate", state, parts, (train_loss_fn, val_loss_fn))

    def reset(self, state: BilevelState, params: PyTree) -> BilevelState:
        """Return `state` at the beginning of an episode that starts from `params`."""
        return self.parallel.optimizer.reset(state, params)


def fully_sharded(mesh: Mesh, axis: str = "data") -> Rules:
    """Return rules that divide each array of the state along its first dimension that divides."""
    n = axis_size(mesh, axis)

    def rules(path: str, leaf: Any) -> P:
        del path
        fits = [i for i, size in enumerate(leaf.shape) if size and size % n == 0]
        return P(*[None] * fits[0], axis) if fits else P()

    return rules


def _check_rows(name: str, batch: PyTree, n: int, batch_axis: int) -> None:
    for path, leaf in tree_flatten_with_path(batch)[0]:
        shape = jnp.shape(leaf)
        if len(shape) <= batch_axis or shape[batch_axis] % n:
            raise ValueError(
                f"{name} must have a multiple of {n} rows, one part for each of {n} devices; got "
                f"shape {shape} at leaf {keystr(path) or 'root'}. Drop rows, or use pad_batch"
            )


def _split_rows(batch: PyTree, n: int, batch_axis: int) -> PyTree:
    def split(x: Any) -> Any:
        shape = jnp.shape(x)
        parts = jnp.reshape(x, (*shape[:batch_axis], n, -1, *shape[batch_axis + 1 :]))
        return jnp.moveaxis(parts, batch_axis, 0)

    return jax.tree.map(split, batch)


def _constrain_all(mesh: Mesh, batch: PyTree, spec: P) -> PyTree:
    return jax.lax.with_sharding_constraint(batch, NamedSharding(mesh, spec))


@functools.partial(jit, static_argnums=(0, 4, 5))
def _hypergradient(
    optimizer: DataParallel,
    state: BilevelState,
    train_batch: PyTree,
    val_batch: PyTree,
    train_loss_fn: LossFn,
    val_loss_fn: LossFn,
) -> PyTree:
    batches, losses = (train_batch, val_batch), (train_loss_fn, val_loss_fn)
    name = "compute_hypergradient"
    return optimizer.divided(name, state, batches, losses, None, optimizer.batch_axis)
