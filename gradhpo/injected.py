"""What an optax optimizer keeps of λ in its state, from `init` on.

`optax.inject_hyperparams` keeps its numbers there, to be changed from step to step: they are read
anew at the λ of every step, and so receive gradients. Other states that `init` makes from λ, such
as the step sizes of rprop, are constants to every hypergradient, and so λ must not move by one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.tree_util import keystr, tree_flatten_with_path

from gradhpo.dependence import dependents, depends
from gradhpo.errors import warn_user
from gradhpo.state import PyTree, as_array

_INJECTED = (optax.InjectHyperparamsState, optax.InjectStatefulHyperparamsState)

InitOf = Callable[[PyTree], PyTree]
"""`λ -> the optimizer's state at init`."""


def follow(state: PyTree, init_of: InitOf, hyperparams: PyTree) -> PyTree:
    """Return `state` with the numbers that `inject_hyperparams` holds read anew at this λ.

    Those that do not depend on λ stay as they are in `state`, and so do schedules.
    """
    injected = _injected(state)
    if not any(injected):
        return state
    moving = dependents(init_of, hyperparams)
    leaves, structure = jax.tree.flatten(state)
    fresh = jax.tree.leaves(init_of(hyperparams))
    followed = [
        as_array(new, old.dtype) if held and moves else old
        for old, new, held, moves in zip(leaves, fresh, injected, moving, strict=True)
    ]
    return structure.unflatten(followed)


def check_initial_state(
    init_of: InitOf,
    move: Callable[[PyTree, PyTree], PyTree],
    hyperparams: PyTree,
    used: Callable[[], list[bool]],
) -> None:
    """Raise if λ moves by a hypergradient that misses what `init` reads of it; warn of injection.

    Args:
      init_of: `λ -> state`.
      move: `(state, λ) -> (params, new state)`, one step of the optimizer.
      hyperparams: λ.
      used: returns for each leaf of λ whether it moves by its hypergradient.
    """
    state = init_of(hyperparams)
    made = dependents(init_of, hyperparams)
    if not any(made):
        return
    paths = [keystr(path) for path, _ in tree_flatten_with_path(state)[0]]
    injected = _injected(state)
    if followed := [path for path, m, i in zip(paths, made, injected, strict=True) if m and i]:
        warn_user(
            f"inner_optimizer keeps numbers that depend on the hyperparameters in its state, at "
            f"{', '.join(followed)} (optax.inject_hyperparams), where optax would leave them as "
            "they were at init. Every step reads them at its own hyperparameters instead, so they "
            "get gradients, and what is written into the state by hand has no effect",
            UserWarning,
        )
    hidden = [m and not i for m, i in zip(made, injected, strict=True)]
    if not _acts(move, state, hidden, hyperparams):
        return
    seen_by = depends(lambda lam: _pick(init_of(lam), hidden), hyperparams)
    names = [keystr(path) for path, _ in tree_flatten_with_path(hyperparams)[0]]
    refused = [n for n, d, u in zip(names, seen_by, used(), strict=True) if d and u]
    if refused:
        where = ", ".join(path for path, h in zip(paths, hidden, strict=True) if h)
        raise ValueError(
            f"hyperparams{refused[0]} sets what inner_optimizer's init puts into its state, at "
            f"{where}. That state is a constant to the hypergradient, which would miss this part, "
            "or be zero. Make the state from numbers, or hold this leaf fixed by an "
            "outer_optimizer that ignores its gradient, such as optax.set_to_zero: a sweep then "
            "searches it"
        )


def _acts(
    move: Callable[[PyTree, PyTree], PyTree], state: PyTree, hidden: list[bool], lam: PyTree
) -> bool:
    """Whether the hidden leaves of a state reach the weights, or a state other than themselves."""
    leaves, structure = jax.tree.flatten(state)

    def moved(values: list[Any]) -> PyTree:
        given = iter(values)
        mixed = [next(given) if h else leaf for leaf, h in zip(leaves, hidden, strict=True)]
        params, new_state = move(structure.unflatten(mixed), lam)
        return params, _pick(new_state, [not h for h in hidden])

    values = _pick(state, hidden)
    return bool(values) and any(dependents(moved, values))


def _pick(tree: PyTree, chosen: list[bool]) -> list[Any]:
    return [leaf for leaf, yes in zip(jax.tree.leaves(tree), chosen, strict=True) if yes]


def _injected(state: PyTree) -> list[bool]:
    """Return for each leaf of a state whether `inject_hyperparams` holds it, unscheduled."""

    def mark(node: PyTree) -> PyTree:
        if not isinstance(node, _INJECTED):
            return False
        scheduled = getattr(node, "hyperparams_states", {})
        held = {
            name: jax.tree.map(lambda _, name=name: name not in scheduled, value)
            for name, value in node.hyperparams.items()
        }
        return type(node)(*map(marks, node))._replace(hyperparams=held)

    def marks(tree: PyTree) -> PyTree:
        return jax.tree.map(mark, tree, is_leaf=lambda node: isinstance(node, _INJECTED))

    return jax.tree.leaves(marks(state))
