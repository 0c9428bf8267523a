"""Data-parallel steps: the batch is divided over devices, and the result is one device's.

The losses are replaced by their mean over the mesh axis; differentiating that mean gives exact
derivatives of first and second order, so no algorithm knows that it runs in parallel.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
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
from gradhpo.errors import check_same_tree
from gradhpo.optimizer import BilevelOptimizer
from gradhpo.parallel.collectives import gather, same_on_all, spread
from gradhpo.parallel.mesh import axis_size, put
from gradhpo.parallel.rules import Rules
from gradhpo.remembered import stands_for
from gradhpo.state import BilevelState, LossFn, PyTree, is_key, prepare
from gradhpo.task import Aux, Task, evaluate, join_fixed, split_fixed, without_aux

Backend = Literal["shard_map", "auto", "pmap"]
# What the wrapped optimizer is, the data-parallel one is too.
_SHARED = (
    *("inner_optimizer", "outer_optimizer", "update_fn"),
    *("T", "calibration_period", "remembers_batch", "draws", "batch_axis"),
    "through_model_state",
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
        if getattr(self.optimizer, "mesh", None) is not None:
            raise ValueError(
                "data_parallel divides batches, and this optimizer its particles over a mesh: give "
                "one of the two"
            )
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
        *,
        key: jax.Array | None = None,
    ) -> PyTree:
        """Return the hypergradient of the whole batch."""
        task = Task.of(train_batch, val_batch, train_loss_fn, val_loss_fn, key)
        return _hypergradient(self, self.place(state), task)

    def hypergradient(self, state: BilevelState, task: Task) -> PyTree:
        """Return the hypergradient of the whole batch; traceable."""
        return self.divided("hypergradient", state, task, None, self.batch_axis)

    def told(self, state: BilevelState, task: Task) -> dict[str, jax.Array]:
        """Return the metrics that the losses return before a step; traceable."""
        return self.divided("told", state, task, None, self.batch_axis)

    def advance(self, state: BilevelState, task: Task, lr_hyper: Any = None) -> BilevelState:
        """Take the step on the parts of the batch; traceable."""
        state = self.ready(state, task)
        new = self.divided("advance", state, task, lr_hyper, self.batch_axis)
        return self._constrain(new)

    def calibrate(self, state: BilevelState, task: Task) -> BilevelState:
        """Estimate the wrapped optimizer's own settings, from divided batches."""
        return self.divided("calibrate", state, task, None, batch_axis=1)

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
        rest = (*rest, given["key"], tuple(given["observers"]))
        plan = episodes.Plan(given["M"], given.get("T", self.T), *rest)
        draw = (given["get_train_batch"], given["get_val_batch"])
        return episodes.run(self, prepare(self.place(state)), plan, *draw, *losses)

    @property
    def within(self) -> Within:
        """What a program takes that is inside a `shard_map` over this mesh already."""
        return Within(self, self.T, self.calibration_period, self.remembers_batch, self.draws)

    def on_part(
        self, method: str, state: BilevelState, task: Task, rate: tuple[Any, ...] = ()
    ) -> Any:
        """Call the wrapped optimizer's method on one device, with its part of whole batches.

        Raises:
          ValueError: if what it returns is not the same on all devices.
        """
        local = self._local_optimizer()
        losses = {
            "train_loss": self._over_devices("train_loss_fn", task.train_loss),
            "val_loss": self._over_devices("val_loss_fn", task.val_loss),
        }

        def call(state: BilevelState, batches: tuple[PyTree, PyTree], key: Any, rate: Any) -> Any:
            given = Task(*batches, **losses, key=key)
            return getattr(local, method)(state, given, *rate)

        own, batches = (False, True, False, False), (task.train_batch, task.val_batch)
        return same_on_all(call, self.axis, own)(state, batches, task.key, rate)

    @property
    def _share(self) -> float:
        """What a device's loss counts for."""
        return 1 / axis_size(self.mesh, self.axis) if self.reduction == "mean" else 1

    def _over_devices(self, name: str, loss_fn: LossFn) -> LossFn:
        """Return the loss of the whole batch, as each device computes it with its part."""
        prefix = name.removesuffix("loss_fn")

        @functools.wraps(loss_fn)
        def loss(params: PyTree, hyperparams: PyTree, batch: PyTree, **given: Any) -> Any:
            local = (self._spread(params), spread(hyperparams, self.axis), batch)
            value, aux = evaluate(name, loss_fn, local, **self._on_device(given))
            metrics = {n.removeprefix(prefix): self._mean(x) for n, x in aux.metrics.items()}
            whole = gather(self._share * value, self.axis)
            return whole, Aux(self._mean(aux.model_state), metrics)

        return stands_for(loss, loss_fn)

    def _spread(self, tree: PyTree) -> PyTree:
        """Return the floating-point leaves as each device's own, and the others as they are."""
        floating, others = split_fixed(tree)
        return join_fixed(spread(floating, self.axis), others)

    def _mean(self, tree: PyTree) -> PyTree:
        """Return the devices' mean of the floating-point leaves, and the others as they are."""
        floating, others = split_fixed(tree)
        share = 1 / axis_size(self.mesh, self.axis)
        mean = gather(jax.tree.map(lambda x: (share * x).astype(x.dtype), floating), self.axis)
        return join_fixed(mean, others)

    def _on_device(self, given: dict[str, Any]) -> dict[str, Any]:
        """Return what a loss takes besides, on this device: a key is another one on each."""
        if given.get("key") is not None:
            key = jax.random.fold_in(given["key"], jax.lax.axis_index(self.axis))
            given = {**given, "key": key}
        if given.get("model_state") is not None:
            given = {**given, "model_state": self._spread(given["model_state"])}
        return given

    def _local_optimizer(self) -> BilevelOptimizer:
        """Return the wrapped optimizer, an `update_fn` averaged over the devices."""
        own = self.update_fn
        if own is None:
            return self.optimizer

        @functools.wraps(own)
        def update_fn(params: PyTree, hyperparams: PyTree, batch: PyTree, **given: Any) -> PyTree:
            local = self._spread(params)
            made = own(local, spread(hyperparams, self.axis), batch, **self._on_device(given))
            moved, aux = without_aux(made)
            check_same_tree("update_fn", moved, "params", params)
            (new, others), (old, _), (before, _) = map(split_fixed, (moved, local, params))
            change = optax.tree.scale(self._share, optax.tree.sub(new, old))
            change = gather(change, self.axis)
            after = optax.tree.cast_like(optax.tree.add(before, change), before)
            after = join_fixed(after, others)
            if aux is None:
                return after
            return after, dataclasses.replace(aux, model_state=self._mean(aux.model_state))

        averaged = copy.copy(self.optimizer)
        object.__setattr__(averaged, "update_fn", update_fn)
        return averaged

    def part(self, task: Task, batch_axis: int) -> Task:
        """Return the task with this device's rows of whole batches, inside a `shard_map`."""
        n = axis_size(self.mesh, self.axis)
        _check_rows("train_batch", task.train_batch, n, batch_axis)
        _check_rows("val_batch", task.val_batch, n, 0)

        def rows(batch: PyTree, axis: int) -> PyTree:
            def mine(x: jax.Array) -> jax.Array:
                size = x.shape[axis] // n
                start = jax.lax.axis_index(self.axis) * size
                return jax.lax.dynamic_slice_in_dim(x, start, size, axis)

            return jax.tree.map(mine, batch)

        train_batch, val_batch = rows(task.train_batch, batch_axis), rows(task.val_batch, 0)
        return dataclasses.replace(task, train_batch=train_batch, val_batch=val_batch)

    def divided(
        self,
        method: str,
        state: BilevelState,
        task: Task,
        lr_hyper: Any,
        batch_axis: int,
    ) -> Any:
        """Call the wrapped optimizer's method on the parts of the batches."""
        n = axis_size(self.mesh, self.axis)
        train_batch, val_batch = task.train_batch, task.val_batch
        _check_rows("train_batch", train_batch, n, batch_axis)
        _check_rows("val_batch", val_batch, n, 0)
        train_spec, val_spec = P(*[None] * batch_axis, self.axis), P(self.axis)
        rate = () if lr_hyper is None else (lr_hyper,)

        if self.backend == "auto":
            place = functools.partial(_constrain_all, self.mesh)
            placed = {
                "train_batch": place(train_batch, train_spec),
                "val_batch": place(val_batch, val_spec),
            }
            return getattr(self.optimizer, method)(
                state, dataclasses.replace(task, **placed), *rate
            )

        def on_device(state: Any, train_batch: Any, val_batch: Any, key: Any, rate: Any) -> Any:
            part = Task(train_batch, val_batch, task.train_loss, task.val_loss, key)
            return self.on_part(method, state, part, rate)

        if self.backend == "pmap":
            parts = _split_rows(train_batch, n, batch_axis), _split_rows(val_batch, n, 0)
            devices = list(self.mesh.devices.ravel())
            mapped = jax.pmap(
                on_device,
                self.axis,
                in_axes=(None, 0, 0, None, None),
                out_axes=None,
                devices=devices,
            )
            return mapped(state, *parts, task.key, rate)
        specs = (P(), train_spec, val_spec, P(), P())
        # `on_part` has checked what the types of checked axes would, see `collectives`.
        mapped = jax.shard_map(
            on_device, mesh=self.mesh, in_specs=specs, out_specs=P(), check_vma=False
        )
        return mapped(state, train_batch, val_batch, task.key, rate)

    def _constrain(self, state: BilevelState) -> BilevelState:
        if self.backend != "auto":
            return state
        return jax.lax.with_sharding_constraint(state, self._shardings(state))

    def _shardings(self, state: BilevelState) -> BilevelState:
        def sharding(path: Any, leaf: Any) -> NamedSharding:
            rules = None if is_key(leaf) else self.rules
            spec = P() if rules is None else rules(keystr(path), leaf)
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
    draws: bool

    def init(self, params: PyTree, hyperparams: PyTree, **extra: Any) -> BilevelState:
        """Return the state before the first step."""
        return self.parallel.optimizer.init(params, hyperparams, **extra)

    def ready(self, state: BilevelState, task: Task) -> BilevelState:
        """Return the state with a place for each metric of the losses."""
        return self.parallel.ready(state, task)

    def advance(self, state: BilevelState, task: Task, lr_hyper: Any = None) -> BilevelState:
        """Take a step on this device's part of the batches."""
        part = self.parallel.part(task, self.parallel.batch_axis)
        rate = () if lr_hyper is None else (lr_hyper,)
        return self.parallel.on_part("advance", state, part, rate)

    def calibrate(self, state: BilevelState, task: Task) -> BilevelState:
        """Estimate the wrapped optimizer's own settings, from parts of the batches."""
        return self.parallel.on_part("calibrate", state, self.parallel.part(task, 1))

    def reset(self, state: BilevelState, params: PyTree) -> BilevelState:
        """Return `state` at the beginning of an episode that starts from `params`."""
        return self.parallel.optimizer.reset(state, params)


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


@functools.partial(jit, static_argnums=0)
def _hypergradient(optimizer: DataParallel, state: BilevelState, task: Task) -> PyTree:
    return optimizer.hypergradient(state, task.at(state.step))
