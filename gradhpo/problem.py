"""`Problem`: what an optimizer is given to solve. An example, a sweep and a benchmark take one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax

from gradhpo.errors import check_exactly_one, check_hashable, described, tracing
from gradhpo.host import Source
from gradhpo.state import LossFn, PyTree
from gradhpo.task import wanted

Batches: TypeAlias = Iterable[tuple[Any, Any]]

READ_AGAIN = (
    "must be readable again: a list, a function of a numpy.random.Generator that makes the "
    "iterator, or an iterator with get_state and set_state"
)


class Start(NamedTuple):
    """What a run starts from."""

    params: PyTree
    hyperparams: PyTree
    model_state: PyTree = None
    """What the losses remember; None where they remember nothing."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """A bilevel problem: `min_λ L_val(w(λ), λ)` with weights trained on `L_train(w, λ)`.

    Data comes from exactly one of `batch` and `batches`. All functions but `batches` are traced:
    they use `jax.numpy`, and what they do in Python they do once.

    Args:
      init: `key -> (params, hyperparams)`: the first weights and hyperparameters, two pytrees of
        floating-point arrays; or `(params, hyperparams, model_state)`, the last being what the
        losses remember, a pytree of arrays. `key` is a typed PRNG key, as in all of these.
      train_loss: `(params, hyperparams, batch) -> scalar`: what trains the weights. It may take
        `model_state`, such as running statistics, and `key`, for dropout say, by these names, and
        return `(scalar, Aux(model_state=…, metrics=…))`: the model state after the step, and
        metrics that join those of the step. The key is another one at every inner step, in every
        run, and on every device that a batch is divided over. What a loss remembers is a constant
        of each step, and averaged over such devices.
      val_loss: `(params, hyperparams, batch) -> scalar`: what the hyperparameters are tuned for;
        it needs a gradient in the weights, but for evolution strategies, which tune for an accuracy
        too. It may take `model_state`, as the training loss left
        it, and `key`, and return `(scalar, Aux(metrics=…))`.
      batch: `key -> (train_batch, val_batch)`, two pytrees of arrays for the two losses: drawn on
        the device, inside the compiled run, with a key of their own at every step; with `data`,
        `(key, data) -> (train_batch, val_batch)`. For all data at every step, ignore the key.
      batches: host data, a stream of pairs `(train_batch, val_batch)`, each a pytree of NumPy
        arrays or what becomes one (PyTorch's CPU tensors), typed PRNG keys too, all pairs of one
        shape (`drop_last`). Read a pair a step, in order, and sent ahead. One of:
        `rng -> iterable`, of a `numpy.random.Generator` seeded by the key of each run or trial;
        `() -> iterable`, the same stream for all; either with an argument `start`, the number of
        pairs before the first one wanted, so that it begins in the middle; or an iterable itself,
        the same stream for all: a list, a loader, a dataset of Grain. What is read again must give
        the same pairs again. Where its iterator has `get_state` and `set_state`, as Grain's,
        nothing is read twice. An iterator, or a generator, is read on from where it stands.
      metrics: `(params, hyperparams) -> {name: array}`, or with `data`
        `(params, hyperparams, data) -> {name: array}`: what else to follow, a test accuracy say;
        it may take `model_state` too, by this name.
        Evaluated now and then, see `solve(eval_every=…)`; arrays of any shape (in a sweep,
        scalars).
      data: `key -> data`, a pytree of arrays made once for a run and handed to `batch` and
        `metrics`, such as a random split or corrupted labels. They are arguments of the compiled
        run, not constants in it, so large arrays belong here.

    Raises:
      ValueError: if neither or both of `batch` and `batches` are given.
      TypeError: if something that must be a function is not.
    """

    init: Callable[[jax.Array], tuple[PyTree, ...]]
    train_loss: LossFn
    val_loss: LossFn
    batch: Callable[..., tuple[PyTree, PyTree]] | None = None
    batches: Batches | Callable[..., Batches] | None = dataclasses.field(
        default=None, compare=False
    )
    metrics: Callable[..., dict[str, Any]] | None = None
    data: Callable[[jax.Array], PyTree] | None = None

    def __post_init__(self) -> None:
        for name in ("init", "train_loss", "val_loss"):
            check_hashable(f"Problem.{name}", getattr(self, name))
        check_exactly_one("Problem", batch=self.batch, batches=self.batches)
        if self.batch is not None:
            check_hashable("Problem.batch", self.batch)
        else:
            Source(self.batches)
        for name in ("metrics", "data"):
            if getattr(self, name) is not None:
                check_hashable(f"Problem.{name}", getattr(self, name))

    def described(self) -> Problem:
        """Return the problem without its host data, which compiled code must not keep."""
        return self if self.batches is None else dataclasses.replace(self, batches=())

    @property
    def reopens(self) -> bool:
        """Whether a position in its data can be gone to again, in a new process too."""
        return self.batches is None or Source(self.batches).reopens

    def first_pair(self) -> PyTree:
        """Return the shapes of a pair of `batches`; None where there are none.

        Raises:
          ValueError: if `batches` cannot be read twice, or are empty.
        """
        if self.batches is None:
            return None
        if not self.reopens:
            got = type(self.batches).__name__
            raise ValueError(f"Problem.batches {READ_AGAIN}; got {got}, an iterator")
        return Source(self.batches).shapes()

    def start(self, key: jax.Array) -> tuple[PyTree, PyTree]:
        """Return the weights and hyperparameters from which `solve` starts with this key."""
        return self.first(key)[:2]

    def first(self, key: jax.Array) -> Start:
        """Return the weights, hyperparameters and model state that `solve` starts from."""
        with tracing("Problem.init", key=key):
            made = self.init(stream(key, "init"))
        two = "(params, hyperparams)"
        if isinstance(made, tuple | list) and len(made) == 3:
            return Start(*made)
        return Start(*_pair("init", f"{two}, or {two[:-1]}, model_state)", made))

    def start_data(self, key: jax.Array) -> PyTree:
        """Return the `data` that `solve` uses with this key; None where there is none."""
        if self.data is None:
            return None
        with tracing("Problem.data", key=key):
            return self.data(stream(key, "data"))

    def draw(self, key: jax.Array, data: PyTree) -> tuple[PyTree, PyTree]:
        """Return a training and a validation batch from `batch`."""
        assert self.batch is not None
        args = {"key": key} if self.data is None else {"key": key, "data": data}
        with tracing("Problem.batch", **args):
            made = self.batch(*args.values())
        return _pair("batch", "(train_batch, val_batch)", made)

    def draw_at(self, key: jax.Array, index: Any, data: PyTree) -> tuple[PyTree, PyTree]:
        """Return the batches of step `index` of a run with this key."""
        return self.draw(jax.random.fold_in(stream(key, "batches"), index), data)

    def measure(
        self, params: PyTree, hyperparams: PyTree, data: PyTree, model_state: PyTree = None
    ) -> dict[str, Any]:
        """Return `metrics`; empty where there are none.

        Raises:
          TypeError: if the function does not return arrays by name.
        """
        if self.metrics is None:
            return {}
        args = {"params": params, "hyperparams": hyperparams}
        args |= {} if self.data is None else {"data": data}
        more = wanted("Problem.metrics", self.metrics, len(args), model_state=model_state)
        with tracing("Problem.metrics", **args):
            made = self.metrics(*args.values(), **more)
        if not isinstance(made, Mapping) or not all(isinstance(name, str) for name in made):
            got = "names that are not strings" if isinstance(made, Mapping) else described(made)
            raise TypeError(f"Problem.metrics must return a dict of arrays by name, got {got}")
        return dict(made)


PURPOSES = (
    *("init", "data", "batches", "calibration", "optimizer", "diagnosis", "episodes"),
    "losses",
)
"""What a run's key is divided into, in an order that stays."""


def stream(key: jax.Array, purpose: str) -> jax.Array:
    """Return the part of a run's randomness that serves one purpose."""
    return jax.random.fold_in(key, PURPOSES.index(purpose))


def _pair(name: str, accepted: str, made: Any) -> tuple[Any, Any]:
    if not isinstance(made, tuple | list) or len(made) != 2:
        raise TypeError(f"Problem.{name} must return {accepted}, got {described(made)}")
    return made[0], made[1]
