"""Hyperparameters that nothing leads from to the validation loss: told before anything compiles.

A leaf of λ gets a hypergradient if a derivative leads from it to the validation loss, directly or
by way of the weights; to a method of zeroth order, if a value does. Otherwise its hypergradient is
0 whatever the numbers, and it never moves.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.tree_util import keystr, tree_flatten_with_path

from gradhpo.dependence import depends, influences
from gradhpo.errors import UnreachedWarning, warn_user
from gradhpo.inner import InnerStep, is_optax
from gradhpo.remembered import about
from gradhpo.state import BilevelState, PyTree
from gradhpo.task import Carried, Task


class Ways(NamedTuple):
    """How a method can see λ, and which of it moves."""

    method: str
    """Its name."""
    inner: InnerStep | None
    """The step whose derivatives it takes; None for a method that does not look at the weights."""
    by_values: bool
    """Whether it takes differences through the step, and so sees what has no derivative too."""
    tuned: Callable[[], list[bool]]
    """Returns for each leaf of λ whether it moves by its hypergradient."""
    zero_order: bool = False
    """Whether it looks at values of the validation loss alone, and takes no derivative at all."""


def check_reach(ways: Ways, state: BilevelState, task: Task) -> None:
    """Warn of leaves of λ that get no hypergradient, once for a problem; raise if none gets any.

    A method that does not look at the weights is a baseline, and only warned of.

    Args:
      ways: how the method sees λ.
      state: where a step begins.
      task: with one training batch.

    Raises:
      ValueError: if no leaf that should move reaches the validation loss.
    """
    paths = [f"hyperparams{keystr(p)}" for p, _ in tree_flatten_with_path(state.hyperparams)[0]]
    moving = ways.tuned()
    told: set[tuple[Any, ...]] = about(task.train_loss, task.val_loss).setdefault("reach", set())
    question = (ways.method, _step_key(ways.inner), *moving, *paths)
    if question in told:
        return
    reasons = _reasons(ways, state, task)
    if any(reasons):
        silent = [
            f"{path} gets no hypergradient: {why}"
            for path, why, moves in zip(paths, reasons, moving, strict=True)
            if why and moves
        ]
        message = f"{ways.method}: {'; '.join(silent)}"
        if ways.inner is not None and silent and len(silent) == sum(moving):
            raise ValueError(f"{message}. No hyperparameter would ever move")
        if silent:
            warn_user(f"{message}. It stays as it is", UnreachedWarning)
    told.add(question)


def _reasons(ways: Ways, state: BilevelState, task: Task) -> list[str]:
    """Return for each leaf of λ why it gets no hypergradient; empty where it gets one."""
    (w, s), lam = task.start(state), state.hyperparams
    inner, leaves = ways.inner, jax.tree.leaves(lam)
    none = [False] * len(leaves)

    def move(w: PyTree, s: Carried, lam: PyTree) -> tuple[PyTree, Carried]:
        assert inner is not None
        moved = inner(w, s, lam, task.train_batch)
        return moved.params, moved.carried

    def move_by(lam: PyTree) -> PyTree:
        return move(w, s, lam)

    def val(w: PyTree, s: Carried, lam: PyTree) -> jax.Array:
        return task.validate(w, s, lam)[0]

    derivative = not (ways.by_values or ways.zero_order)
    behind = [] if inner is None else influences(move, (w, s, lam), derivative=derivative)
    n, before = len(jax.tree.leaves(w)), len(jax.tree.leaves((w, s)))
    (in_val,) = influences(val, (w, s, lam), derivative=not ways.zero_order)
    # What the losses remember is a constant to a derivative.
    seen = _leading_to({i for i in in_val if i < (before if ways.zero_order else n)}, behind)
    direct = [before + i in in_val for i in range(len(leaves))]
    to_weights = [x for x in _leading_to(set(range(n)), behind) if x < len(behind)]
    moves = [any(before + i in behind[x] for x in to_weights) for i in range(len(leaves))]
    reached = [
        d or leaf.size == 0 or any(before + i in behind[x] for x in seen if x < len(behind))
        for i, (d, leaf) in enumerate(zip(direct, leaves, strict=True))
    ]
    if all(reached):
        return [""] * len(reached)
    shown = depends(lambda lam: val(w, s, lam), lam, derivative=False)
    used = none if inner is None else depends(move_by, lam, derivative=False)

    fixed = ""
    if inner is not None and is_optax(inner.inner_optimizer):
        fixed = " (inner_optimizer would as a function: lambda lam: optax.sgd(lam[...]))"

    def reason(i: int) -> str:
        if reached[i]:
            return ""
        if inner is None:
            return "this method differentiates val_loss_fn alone, which does not use it"
        read = any(leaf < n for leaf in in_val)
        if (moves[i] and read) or (used[i] and ways.zero_order):
            return "it moves only weights that val_loss_fn does not read"
        if moves[i]:
            return "val_loss_fn has no gradient in the weights, which it moves (is it an accuracy?)"
        if used[i] or shown[i]:
            blocked = "stop_gradient, a sign, a comparison, rounding or integers"
            return f"it is used, but no derivative goes through ({blocked})"
        return f"neither the update of the weights nor val_loss_fn uses it{fixed}"

    return [reason(i) for i in range(len(reached))]


def _leading_to(leaves: set[int], behind: list[set[int]]) -> set[int]:
    """Return the leaves of a state from which, in any number of steps, one of `leaves` is reached.

    Args:
      leaves: indices of leaves of the state.
      behind: for each leaf of the next state, the leaves that it depends on.
    """
    while True:
        more = leaves.union(*(behind[leaf] for leaf in leaves if leaf < len(behind)))
        more = {leaf for leaf in more if leaf < len(behind)} | leaves
        if more == leaves:
            return leaves
        leaves = more


def _step_key(inner: InnerStep | None) -> int | None:
    """Return what tells one way to move the weights from another."""
    if inner is None:
        return None
    moves = inner.inner_optimizer if inner.update_fn is None else inspect.unwrap(inner.update_fn)
    try:
        return hash(moves)
    except TypeError:
        return id(moves)
