"""Hyperparameters that nothing leads from to the validation loss: told before anything compiles.

A leaf of λ gets a hypergradient if a derivative leads from it to the validation loss, directly or
by way of the weights. Otherwise its hypergradient is 0 whatever the numbers, and it never moves.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.tree_util import keystr, tree_flatten_with_path

from gradhpo.dependence import depends, influences
from gradhpo.errors import UnreachedWarning, scalar_loss, warn_user
from gradhpo.inner import InnerStep
from gradhpo.state import BilevelState, LossFn, PyTree


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


def check_reach(
    ways: Ways,
    state: BilevelState,
    train_batch: PyTree,
    val_batch: PyTree,
    losses: tuple[LossFn, LossFn],
) -> None:
    """Warn of leaves of λ that get no hypergradient, once for a problem; raise if none gets any.

    A method that does not look at the weights is a baseline, and only warned of.

    Args:
      ways: how the method sees λ.
      state: where a step begins.
      train_batch: one batch.
      val_batch: one batch.
      losses: the training and the validation loss.

    Raises:
      ValueError: if no leaf that should move reaches the validation loss.
    """
    paths = [f"hyperparams{keystr(p)}" for p, _ in tree_flatten_with_path(state.hyperparams)[0]]
    moving = ways.tuned()
    told, question = _told(losses), (ways.method, _step_key(ways.inner), *moving, *paths)
    if question in told:
        return
    reasons = _reasons(ways, state, train_batch, val_batch, losses)
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


def _reasons(
    ways: Ways,
    state: BilevelState,
    train_batch: PyTree,
    val_batch: PyTree,
    losses: tuple[LossFn, LossFn],
) -> list[str]:
    """Return for each leaf of λ why it gets no hypergradient; empty where it gets one."""
    w, s, lam = state.params, state.inner_opt_state, state.hyperparams
    val_loss = scalar_loss("val_loss_fn", losses[1])
    inner, leaves = ways.inner, jax.tree.leaves(lam)
    none = [False] * len(leaves)

    def move(w: PyTree, s: PyTree, lam: PyTree) -> tuple[PyTree, PyTree]:
        assert inner is not None
        moved = inner(w, s, lam, train_batch)
        return moved.params, moved.opt_state

    def move_by(lam: PyTree) -> PyTree:
        return move(w, s, lam)

    def val(both: tuple[PyTree, PyTree]) -> jax.Array:
        return val_loss(both[0], both[1], val_batch)

    derivative = not ways.by_values
    behind = [] if inner is None else influences(move, (w, s, lam), derivative=derivative)
    n = len(jax.tree.leaves(w))
    in_val = depends(val, (w, lam))
    seen = _leading_to({i for i in range(n) if in_val[i]}, behind)
    before, direct = len(behind), in_val[n:]
    to_weights = [x for x in _leading_to(set(range(n)), behind) if x < before]
    moves = [any(before + i in behind[x] for x in to_weights) for i in range(len(leaves))]
    reached = [
        d or leaf.size == 0 or any(before + i in behind[x] for x in seen if x < before)
        for i, (d, leaf) in enumerate(zip(direct, leaves, strict=True))
    ]
    if all(reached):
        return [""] * len(reached)
    shown = depends(val, (w, lam), derivative=False)[n:]
    used = none if inner is None else depends(move_by, lam, derivative=False)

    def reason(i: int) -> str:
        if reached[i]:
            return ""
        if inner is None:
            return "this method differentiates val_loss_fn alone, which does not use it"
        if moves[i] and any(in_val[:n]):
            return "it moves only weights that val_loss_fn does not read"
        if moves[i]:
            return "val_loss_fn has no gradient in the weights, which it moves: is it an accuracy?"
        if used[i] or shown[i]:
            blocked = "stop_gradient, a sign, a comparison, rounding or integers"
            return f"it is used, but no derivative goes through ({blocked})"
        return "neither the update of the weights nor val_loss_fn uses it"

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


_TOLD: weakref.WeakKeyDictionary[Any, weakref.WeakKeyDictionary[Any, set[tuple[Any, ...]]]] = (
    weakref.WeakKeyDictionary()
)


def _told(losses: tuple[LossFn, LossFn]) -> set[tuple[Any, ...]]:
    """Return what was asked about these losses before; it is kept as long as they are."""
    train_loss, val_loss = (inspect.unwrap(loss) for loss in losses)
    try:
        return _TOLD.setdefault(train_loss, weakref.WeakKeyDictionary()).setdefault(val_loss, set())
    except TypeError:  # no weak references to them: it is asked again
        return set()


def _step_key(inner: InnerStep | None) -> int | None:
    """Return what tells one way to move the weights from another."""
    if inner is None:
        return None
    moves = inner.inner_optimizer if inner.update_fn is None else inspect.unwrap(inner.update_fn)
    try:
        return hash(moves)
    except TypeError:
        return id(moves)
