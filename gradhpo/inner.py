"""Φ, the inner step: `w_t, s_t = Φ(w_{t-1}, s_{t-1}, λ; D_t)`. The one place that moves weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gradhpo.errors import check_same_tree, scalar_loss
from gradhpo.finite_derivatives import with_finite_derivatives
from gradhpo.state import LossFn, PyTree, as_array


class Moved(NamedTuple):
    """What one inner step leaves behind."""

    params: PyTree
    """`w_t`."""
    opt_state: PyTree
    """`s_t`."""
    train_loss: jax.Array
    """`L_train(w_{t-1}, λ, D_t)`: the loss whose gradient moved the weights."""


@dataclasses.dataclass(frozen=True)
class InnerStep:
    """One inner step, from an optax optimizer on the training loss or from the user's own function.

    Exactly one of `inner_optimizer` and `update_fn` is given. `inner_optimizer` may be a function
    `λ -> GradientTransformation`; then λ also receives gradients through the optimizer itself.
    """

    inner_optimizer: Any
    update_fn: Callable[[Any, Any, Any], Any] | None
    train_loss_fn: LossFn

    def __call__(
        self, params: PyTree, opt_state: PyTree, hyperparams: PyTree, batch: PyTree
    ) -> Moved:
        """Take the step."""
        return self._step(params, opt_state, hyperparams, batch, differentiable=False)

    def pullback(
        self, params: PyTree, opt_state: PyTree, hyperparams: PyTree, batch: PyTree
    ) -> tuple[Moved, Callable[[PyTree], PyTree]]:
        """Take the step, and return with it `α ↦ α·B`, from the same linearization."""

        def step(hyperparams: PyTree) -> tuple[PyTree, Moved]:
            moved = self._step(params, opt_state, hyperparams, batch, differentiable=True)
            return moved.params, moved

        _, pull, moved = jax.vjp(step, hyperparams, has_aux=True)
        return moved, lambda alpha: pull(alpha)[0]

    def pullback_both(
        self, params: PyTree, opt_state: PyTree, hyperparams: PyTree, batch: PyTree
    ) -> Callable[[PyTree], tuple[PyTree, PyTree]]:
        """Return `α ↦ (α·A, α·B)`, A and B being Φ's derivatives in the weights and in λ."""

        def step(params: PyTree, hyperparams: PyTree) -> PyTree:
            moved = self._step(params, opt_state, hyperparams, batch, differentiable=True)
            return moved.params

        return jax.vjp(step, params, hyperparams)[1]

    def differentiable(
        self, params: PyTree, opt_state: PyTree, hyperparams: PyTree, batch: PyTree
    ) -> Moved:
        """Take the step as a function to differentiate, in the weights, the state and λ."""
        return self._step(params, opt_state, hyperparams, batch, differentiable=True)

    def pullback_all(
        self, params: PyTree, opt_state: PyTree, hyperparams: PyTree, batch: PyTree
    ) -> Callable[[PyTree, PyTree], tuple[PyTree, PyTree, PyTree]]:
        """Return the map of cotangents of `w_t, s_t` to those of `w_{t-1}, s_{t-1}, λ`.

        The cotangents of a state are shaped like `differentiable_state`.
        """

        def step(params: PyTree, floating: PyTree, hyperparams: PyTree) -> tuple[PyTree, PyTree]:
            state = jax.tree.map(
                lambda x, leaf: leaf if x is None else x, floating, opt_state, is_leaf=_is_none
            )
            moved = self.differentiable(params, state, hyperparams, batch)
            return moved.params, self.differentiable_state(moved.opt_state)

        _, pull = jax.vjp(step, params, self.differentiable_state(opt_state), hyperparams)
        return lambda *cotangents: pull(cotangents)

    @staticmethod
    def differentiable_state(opt_state: PyTree) -> PyTree:
        """Return the optimizer's state with None in place of counts, keys and flags."""

        def keep(leaf: jax.Array) -> jax.Array | None:
            return leaf if jnp.issubdtype(leaf.dtype, jnp.floating) else None

        return jax.tree.map(keep, opt_state)

    def gradient(
        self, params: PyTree, hyperparams: PyTree, batch: PyTree
    ) -> tuple[jax.Array, PyTree]:
        """Return the training loss and `G`, its gradient in the weights."""
        return jax.value_and_grad(scalar_loss("train_loss_fn", self.train_loss_fn))(
            params, hyperparams, batch
        )

    def move(
        self, gradient: PyTree, opt_state: PyTree, params: PyTree, hyperparams: PyTree, loss: Any
    ) -> tuple[PyTree, PyTree]:
        """Apply the optimizer to the gradient `G`: `w_t, s_t = Ψ(G, s_{t-1}, w_{t-1}, λ)`."""
        optimizer = optax.with_extra_args_support(self.optimizer(hyperparams))
        updates, new_state = optimizer.update(
            gradient, opt_state, params, value=loss, grad=gradient
        )
        return optax.apply_updates(params, updates), _keep_types(new_state, opt_state)

    def pullback_move(
        self, gradient: PyTree, opt_state: PyTree, params: PyTree, hyperparams: PyTree, loss: Any
    ) -> tuple[tuple[PyTree, PyTree], Callable[[PyTree], tuple[PyTree, PyTree]]]:
        """Apply the optimizer, and return with it `α ↦ (∂w_t/∂G)ᵀα, (∂Ψ/∂λ)ᵀα`: cheap, no model."""

        def move(gradient: PyTree, hyperparams: PyTree) -> tuple[PyTree, tuple[PyTree, PyTree]]:
            moved = with_finite_derivatives(self.move)(
                gradient, opt_state, params, hyperparams, loss
            )
            return moved[0], moved

        _, pull, moved = jax.vjp(move, gradient, hyperparams, has_aux=True)
        return moved, pull

    def optimizer(self, hyperparams: PyTree) -> Any:
        """Return the optax optimizer at these hyperparameters."""
        return optimizer_at(self.inner_optimizer, hyperparams)

    def _step(
        self,
        params: PyTree,
        opt_state: PyTree,
        hyperparams: PyTree,
        batch: PyTree,
        differentiable: bool,
    ) -> Moved:
        if self.update_fn is not None:
            new = self.update_fn(params, hyperparams, batch)
            check_same_tree("update_fn", new, "params", params)
            new = jax.tree.map(as_array, new)
            loss = scalar_loss("train_loss_fn", self.train_loss_fn)
            return Moved(new, opt_state, loss(params, hyperparams, batch))
        loss, gradient = self.gradient(params, hyperparams, batch)
        move = with_finite_derivatives(self.move) if differentiable else self.move
        new_params, new_state = move(gradient, opt_state, params, hyperparams, loss)
        return Moved(new_params, new_state, loss)


def optimizer_at(inner_optimizer: Any, hyperparams: PyTree) -> Any:
    """Return `inner_optimizer`, called with λ where it is a function of λ.

    Raises:
      TypeError: if it is neither an optax optimizer nor a function that returns one.
    """
    is_optimizer = is_optax(inner_optimizer)
    optimizer = inner_optimizer if is_optimizer else inner_optimizer(hyperparams)
    if not is_optax(optimizer):
        raise TypeError(
            "inner_optimizer must be an optax.GradientTransformation, or a function of the "
            f"hyperparameters that returns one; the function returned {type(optimizer).__name__}"
        )
    return optimizer


def is_optax(value: Any) -> bool:
    """Whether `value` has the two functions of an `optax.GradientTransformation`."""
    return callable(getattr(value, "init", None)) and callable(getattr(value, "update", None))


def _is_none(value: Any) -> bool:
    return value is None


def _keep_types(new_state: PyTree, old_state: PyTree) -> PyTree:
    """Cast the optimizer's new state to the old one's dtypes.

    A float32 learning rate among the hyperparameters makes optax widen the momentum of bfloat16
    weights, and the state would then no longer fit a `scan`.
    """
    check_same_tree("inner_optimizer's new state", new_state, "its state", old_state, dtypes=False)
    return jax.tree.map(lambda new, old: as_array(new, old.dtype), new_state, old_state)
