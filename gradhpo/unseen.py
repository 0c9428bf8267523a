"""Hyperparameters that act outside the training loss, which methods of a minimum cannot see."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.tree_util import keystr, tree_flatten_with_path

from gradhpo.dependence import depends_by_coordinate
from gradhpo.inner import InnerStep
from gradhpo.state import BilevelState, PyTree
from gradhpo.task import Task


def refuse_unseen(
    method: str, inner: InnerStep, state: BilevelState, task: Task, moving: list[bool]
) -> None:
    """Raise if a coordinate of λ enters the inner step's update, but not the training gradient.

    Args:
      method: its name, for the error.
      inner: the inner step.
      state: where a step begins.
      task: with one training batch.
      moving: for each leaf of λ, whether it moves by its hypergradient; others are free to act.
    """
    (w, s), lam, batch = task.start(state), state.hyperparams, task.train_batch
    loss, _, gradient = jax.eval_shape(inner.gradient, w, s, lam, batch)

    def update(lam: PyTree, gradient: PyTree, loss: Any) -> PyTree:
        if inner.update_fn is not None:
            return inner(w, s, lam, batch).params
        return inner.move(gradient, s.opt_state, w, lam, loss)[0]

    in_update = depends_by_coordinate(update, lam, gradient, loss)
    if not any(m and here.any() for m, here in zip(moving, in_update, strict=True)):
        return
    through = "update_fn" if inner.update_fn is not None else "inner_optimizer"
    in_gradient = depends_by_coordinate(lambda lam: inner.gradient(w, s, lam, batch)[2], lam)
    paths = [keystr(path) for path, _ in tree_flatten_with_path(lam)[0]]
    for path, tuned, moves, seen in zip(paths, moving, in_update, in_gradient, strict=True):
        for index in np.argwhere(moves & ~seen)[:1].tolist() if tuned else ():
            whole = not seen.any() or not index
            raise ValueError(
                f"hyperparams{path}{'' if whole else index} acts on the weights through the "
                f"{through} only: at a minimum of train_loss_fn its implicit gradient is zero. "
                f"{method} needs it in the gradient of train_loss_fn; UnrolledOptimizer "
                "and OneStepOptimizer do not"
            )
