"""One update by an optax optimizer: what it may look at, and errors that say what to do."""

from __future__ import annotations

from typing import Any

import jax
import optax

from gradhpo.errors import check_same_tree
from gradhpo.state import PyTree

_FUNCTIONS = ("value_fn", "obj_fn", "grad_fn")
"""What optax's optimizers ask for that evaluate the loss anew within their update."""


def updated(
    name: str, optimizer: Any, gradient: PyTree, state: PyTree, params: PyTree, loss: Any
) -> tuple[PyTree, PyTree]:
    """Return the parameters and the optimizer's state after one update.

    The optimizer may look at `value`, the loss, and at `grad`.

    Args:
      name: which argument the optimizer is, "inner_optimizer" or "outer_optimizer".
      optimizer: an `optax.GradientTransformation`.
      gradient: of the loss, shaped like `params`.
      state: the optimizer's own.
      params: what it moves.
      loss: a scalar.

    Raises:
      TypeError: if it needs a function that evaluates the loss.
      ValueError: if the state is another optimizer's, or the update is not shaped like `params`, as
        that of an optimizer which takes a gradient for every example.
    """
    try:
        updates, new_state = _update(optimizer, gradient, state, params, loss)
    except Exception as error:
        _explain(name, optimizer, state, params, error)
        raise
    check_same_tree(f"{name}'s update", updates, "what it moves", params, dtypes=False)
    return optax.apply_updates(params, updates), new_state


def _update(
    optimizer: Any, gradient: PyTree, state: PyTree, params: PyTree, loss: Any
) -> tuple[PyTree, PyTree]:
    if isinstance(optimizer, optax.MultiSteps):  # it takes more arguments, and does not say so
        update: Any = optimizer.update
        optimizer = optax.GradientTransformationExtraArgs(optimizer.init, update)
    optimizer = optax.with_extra_args_support(optimizer)
    try:
        return optimizer.update(gradient, state, params, value=loss, grad=gradient)
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
    return optimizer.update(gradient, state, params)  # optax.contrib.sam, alone or in a chain


def _explain(name: str, optimizer: Any, state: PyTree, params: PyTree, error: Exception) -> None:
    """Raise an error that says what is wrong with the arguments, where that is known."""
    if asked := [function for function in _FUNCTIONS if function in str(error)]:
        raise TypeError(
            f"{name} asks for {asked[0]}: it evaluates the loss anew within its update, as optax's "
            "line searches (optax.lbfgs with its default linesearch), Hutchinson's estimate "
            "(optax.contrib.sophia) and optax.contrib.sam with opaque_mode=True do, and such an "
            f"update cannot be differentiated here. {name} must be an optimizer that looks at the "
            "gradient, the weights and the value of the loss, such as optax.lbfgs(linesearch=None)"
        ) from error
    expected = jax.tree.structure(jax.eval_shape(optimizer.init, params))
    if jax.tree.structure(state) != expected:
        field = "inner_opt_state" if name == "inner_optimizer" else "outer_opt_state"
        raise ValueError(
            f"state.{field} is not a state of this {name}: it has the structure "
            f"{jax.tree.structure(state)}, and {name}.init makes {expected}. Pass as `state` what "
            "this optimizer's own init or step returned"
        ) from error
