"""`Problem`: what an optimizer is given to solve. An example, a sweep and a benchmark take one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import jax
import numpy as np

from gradhpo.errors import check_exactly_one, check_hashable, described, tracing
from gradhpo.state import LossFn, PyTree

Batches: TypeAlias = Iterable[tuple[Any, Any]]


@dataclasses.dataclass(frozen=True)
class Problem:
    """A bilevel problem: `min_λ L_val(w(λ), λ)` with weights trained on `L_train(w, λ)`.

    Data comes from exactly one of `batch` and `batches`.

    Raises:
      ValueError: if neither or both of `batch` and `batches` are given.
      TypeError: if something that must be a function is not.
    """

    init: Callable[[jax.Array], tuple[PyTree, PyTree]]
    """`key -> (params, hyperparams)`, traceable."""
    train_loss: LossFn
    """`(params, hyperparams, batch) -> scalar`."""
    val_loss: LossFn
    """`(params, hyperparams, batch) -> scalar`."""
    batch: Callable[..., tuple[PyTree, PyTree]] | None = None
    """`key -> (train_batch, val_batch)`, traceable: drawn on the device, inside the compiled run;
    `(key, data) -> …` where there is `data`. For all data at every step, ignore the key."""
    batches: Batches | Callable[[np.random.Generator], Batches] | None = dataclasses.field(
        default=None, compare=False
    )
    """Host data: an iterable of `(train_batch, val_batch)` NumPy pairs, all of one shape, or a
    function that makes one from a random generator (seeded by the key of `solve`)."""
    metrics: Callable[..., dict[str, Any]] | None = None
    """`(params, hyperparams) -> {name: array}`, traceable: what else to follow, a test accuracy
    say; `(params, hyperparams, data) -> …` where there is `data`. Evaluated now and then, see
    `solve(eval_every=…)`."""
    data: Callable[[jax.Array], PyTree] | None = None
    """`key -> data`, traceable: arrays made once for a run and handed to `batch` and `metrics`,
    such as a random split or corrupted labels. They are arguments of the compiled run, not
    constants in it, so large arrays belong here."""

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
    purposes = ("init", "data", "batches", "calibration", "optimizer", "diagnosis")
    return jax.random.fold_in(key, purposes.index(purpose))


def _pair(name: str, accepted: str, made: Any) -> tuple[Any, Any]:
    if not isinstance(made, tuple | list) or len(made) != 2:
        raise TypeError(f"Problem.{name} must return {accepted}, got {type(made).__name__}")
    return made[0], made[1]
