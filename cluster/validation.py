"""The validation loss over a whole set, measured after every generation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from gradhpo.errors import tracing
from gradhpo.problem import Problem
from gradhpo.state import PyTree
from gradhpo.task import evaluate

NAME = "validation_loss"
"""The column."""
SEED = 0
"""Of the key that a loss may take: the same for all trials and generations."""


def with_validation(problem: Problem, batch: Callable[..., PyTree]) -> Problem:
    """Return a problem whose metrics have the loss on a batch too.

    Args:
      problem: the sweep's.
      batch: `data -> batch`, of `Problem.data`'s, or `() -> batch` where there is none.

    Raises:
      ValueError: if `Problem.metrics` has a metric of that name, when it is traced.
    """
    kind = _Plain if problem.data is None else _OfData
    return dataclasses.replace(problem, metrics=kind(problem, batch))


@dataclasses.dataclass(frozen=True)
class _Measured:
    problem: Problem
    batch: Callable[..., PyTree]

    def measure(
        self, params: PyTree, hyperparams: PyTree, model_state: PyTree, data: tuple[PyTree, ...]
    ) -> dict[str, Any]:
        made = self.problem.measure(params, hyperparams, data[0] if data else None, model_state)
        if NAME in made:
            raise ValueError(f"Problem.metrics has {NAME!r}, which validation= measures")
        with tracing("validation", **({"data": data[0]} if data else {})):
            batch = self.batch(*data)
        about = {"model_state": model_state, "key": jax.random.key(SEED)}
        loss, _ = evaluate(
            "val_loss_fn", self.problem.val_loss, (params, hyperparams, batch), **about
        )
        return {**made, NAME: loss}


class _Plain(_Measured):
    def __call__(
        self, params: PyTree, hyperparams: PyTree, *, model_state: PyTree = None
    ) -> dict[str, Any]:
        return self.measure(params, hyperparams, model_state, ())


class _OfData(_Measured):
    def __call__(
        self, params: PyTree, hyperparams: PyTree, data: PyTree, *, model_state: PyTree = None
    ) -> dict[str, Any]:
        return self.measure(params, hyperparams, model_state, (data,))
