"""`Problem`: what an optimizer is given to solve. An example, a sweep and a benchmark take one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import jax
import numpy as np

from gradhpo.errors import check_exactly_one, check_hashable, described, tracing
from gradhpo.state import LossFn, PyTree

Batches: TypeAlias = Iterable[tuple[Any, Any]]

READ_AGAIN = (
    "must be readable again from the start: a list, or a function of a numpy.random.Generator that "
    "makes the iterator"
)


@dataclasses.dataclass(frozen=True)
class Problem:
    """A bilevel problem: `min_λ L_val(w(λ), λ)` with weights trained on `L_train(w, λ)`.

    Data comes from exactly one of `batch` and `batches`. All functions but `batches` are traced:
    they use `jax.numpy`, and what they do in Python they do once.

    Args:
      init: `key -> (params, hyperparams)`: the first weights and hyperparameters, two pytrees of
        floating-point arrays. `key` is a typed PRNG key, as in all of these.
      train_loss: `(params, hyperparams, batch) -> scalar`: what trains the weights.
      val_loss: `(params, hyperparams, batch) -> scalar`: what the hyperparameters are tuned for;
        it needs a gradient in the weights.
      batch: `key -> (train_batch, val_batch)`, two pytrees of arrays for the two losses: drawn on
        the device, inside the compiled run, with a key of their own at every step; with `data`,
        `(key, data) -> (train_batch, val_batch)`. For all data at every step, ignore the key.
      batches: host data: an iterable of `(train_batch, val_batch)`, each a pytree of NumPy arrays
        (typed PRNG keys may be among them), all pairs of one shape; or a function
        `rng -> iterable` of a `numpy.random.Generator`, which `solve` seeds by its key. Read a
        pair a step, in order, and sent ahead; use `drop_last` where a loader's last batch is
        smaller.
      metrics: `(params, hyperparams) -> {name: array}`, or with `data`
        `(params, hyperparams, data) -> {name: array}`: what else to follow, a test accuracy say.
        Evaluated now and then, see `solve(eval_every=…)`; arrays of any shape (in a sweep,
        scalars).
      data: `key -> data`, a pytree of arrays made once for a run and handed to `batch` and
        `metrics`, such as a random split or corrupted labels. They are arguments of the compiled
        run, not constants in it, so large arrays belong here.

    Raises:
      ValueError: if neither or both of `batch` and `batches` are given.
      TypeError: if something that must be a function is not.
    """

    init: Callable[[jax.Array], tuple[PyTree, PyTree]]
    train_loss: LossFn
    val_loss: LossFn
    batch: Callable[..., tuple[PyTree, PyTree]] | None = None
    batches: Batches | Callable[[np.random.Generator], Batches] | None = dataclasses.field(
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
        elif not callable(self.batches) and not isinstance(self.batches, Iterable):
            got = type(self.batches).__name__
            accepted = "an iterable of (train, val) pairs, or a function of a NumPy generator"
            raise TypeError(f"Problem.batches must be {accepted}, got {got}")
        for name in ("metrics", "data"):
            if getattr(self, name) is not None:
                check_hashable(f"Problem.{name}", getattr(self, name))

    def described(self) -> Problem:
        """Return the problem without its host data, which compiled code must not keep."""
        return self if self.batches is None else dataclasses.replace(self, batches=())

    @property
    def reopens(self) -> bool:
        """Whether its data can be read again from the start, in a new process too."""
        return callable(self.batches) or not isinstance(self.batches, Iterator)

    def first_pair(self) -> PyTree:
        """Return the first of `batches`, read from a start of its own, for its shapes; else None.

        Raises:
          ValueError: if `batches` cannot be read twice, or are empty.
        """
        if self.batches is None:
            return None
        if not self.reopens:
            got = type(self.batches).__name__
            raise ValueError(f"Problem.batches {READ_AGAIN}; got {got}, an iterator")
        given: Any = self.batches
        pairs: Any = given(np.random.default_rng(0)) if callable(given) else given
        for pair in pairs:
            return pair
        raise ValueError("Problem.batches is empty")

    def start(self, key: jax.Array) -> tuple[PyTree, PyTree]:
        """Return the weights and hyperparameters from which `solve` starts with this key."""
        with tracing("Problem.init", key=key):
            made = self.init(stream(key, "init"))
        return _pair("init", "(params, hyperparams)", made)

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

    def measure(self, params: PyTree, hyperparams: PyTree, data: PyTree) -> dict[str, Any]:
        """Return `metrics`; empty where there are none.

        Raises:
          TypeError: if the function does not return arrays by name.
        """
        if self.metrics is None:
            return {}
        args = {"params": params, "hyperparams": hyperparams}
        args |= {} if self.data is None else {"data": data}
        with tracing("Problem.metrics", **args):
            made = self.metrics(*args.values())
        if not isinstance(made, Mapping) or not all(isinstance(name, str) for name in made):
            got = "names that are not strings" if isinstance(made, Mapping) else described(made)
            raise TypeError(f"Problem.metrics must return a dict of arrays by name, got {got}")
        return dict(made)


def stream(key: jax.Array, purpose: str) -> jax.Array:
    """Return the part of a run's randomness that serves one purpose."""
    purposes = ("init", "data", "batches", "calibration", "optimizer", "diagnosis", "episodes")
    return jax.random.fold_in(key, purposes.index(purpose))


def _pair(name: str, accepted: str, made: Any) -> tuple[Any, Any]:
    if not isinstance(made, tuple | list) or len(made) != 2:
        raise TypeError(f"Problem.{name} must return {accepted}, got {type(made).__name__}")
    return made[0], made[1]
