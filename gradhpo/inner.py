"""Φ, the inner step: `w_t, s_t = Φ(w_{t-1}, s_{t-1}, λ; D_t)`. The one place that moves weights."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gradhpo.dependence import depends
from gradhpo.errors import check_same_tree, scalar_loss
from gradhpo.finite_derivatives import with_finite_derivatives
from gradhpo.hypergradient import Mode, second_order
from gradhpo.injected import follow
from gradhpo.state import LossFn, PyTree, as_array
from gradhpo.updates import updated


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
    `mode` is how its derivatives are taken, see `MODES`.
    """

    inner_optimizer: Any
    update_fn: Callable[[Any, Any, Any], Any] | None
    train_loss_fn: LossFn
    mode: Mode = "reverse-over-reverse"
    jointly: bool = False
    """Whether the training gradient is taken in λ too, and that part dropped: an operation on λ
    with a VJP of its own (`jax.custom_vjp`) can then be differentiated again, by forward mode."""

    def __call__(
        self, params: PyTree, opt_state: PyTree, hyperparams: PyTree, batch: PyTree
    ) -> Moved:
        """Take the step."""
        return self._step(params, opt_state, hyperparams, batch, differentiable=False)

    def pullback(
        self, params: PyTree, opt_state: PyTree, hyperparams: PyTree, batch: PyTree
    ) -> tuple[Moved, Callable[[PyTree], PyTree]]:
        """Take the step, and return with it `α ↦ α·B`; no gradient is computed twice."""
        if self.mode != "reverse-over-reverse":
            return self._pullback_mixed(params, opt_state, hyperparams, batch)

        def step(hyperparams: PyTree) -> tuple[PyTree, Moved]:
            moved = self.differentiable(params, opt_state, hyperparams, batch)
            return moved.params, moved

        _, pull, moved = jax.vjp(step, hyperparams, has_aux=True)
        return moved, lambda alpha: pull(alpha)[0]

    def _pullback_mixed(
        self, params: PyTree, opt_state: PyTree, hyperparams: PyTree, batch: PyTree
    ) -> tuple[Moved, Callable[[PyTree], PyTree]]:
        loss, gradient = self.gradient(params, hyperparams, batch)
        (new, new_state), pull = self.pullback_move(gradient, opt_state, params, hyperparams, loss)

        def alpha_b(alpha: PyTree) -> PyTree:
            # α·B = ∇_λ ⟨u, ∇_w L_train⟩ + the optimizer's own terms, u = (∂w_t/∂G)ᵀα.
            u, loss_bar, direct = pull(alpha)
            arguments = (params, hyperparams, batch, u, loss_bar)
            (mixed,) = second_order(self.train_loss, *arguments, self.mode, (1,))
            return optax.tree.add(mixed, direct)

        return Moved(new, new_state, loss), alpha_b

    def pullback_both(
        self, params: PyTree, opt_state: PyTree, hyperparams: PyTree, batch: PyTree
    ) -> Callable[[PyTree], tuple[PyTree, PyTree]]:
        """Return `α ↦ (α·A, α·B)`, A and B being Φ's derivatives in the weights and in λ."""

        def step(params: PyTree, hyperparams: PyTree) -> PyTree:
            return self.differentiable(params, opt_state, hyperparams, batch).params

        return jax.vjp(step, params, hyperparams)[1]

    def differentiable(
        self, params: PyTree, opt_state: PyTree, hyperparams: PyTree, batch: PyTree
    ) -> Moved:
        """Take the step as a function to differentiate, in the weights, the state and λ.

        The training loss it returns is not to be differentiated. In a mixed mode the step has a
        reverse rule of its own, so `jax.vjp` and `jax.grad` work on it, and `jax.jvp` does not.
        """
        if self.mode == "reverse-over-reverse":
            return self._step(params, opt_state, hyperparams, batch, differentiable=True)
        return _mixed_step(self, params, opt_state, hyperparams, batch)

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
        argnums = (0, 1) if self.jointly else (0,)
        loss, gradients = jax.value_and_grad(self.train_loss, argnums)(params, hyperparams, batch)
        return loss, gradients[0]

    @property
    def train_loss(self) -> LossFn:
        """`train_loss_fn`, checked while it is traced."""
        return scalar_loss("train_loss_fn", self.train_loss_fn)

    def move(
        self, gradient: PyTree, opt_state: PyTree, params: PyTree, hyperparams: PyTree, loss: Any
    ) -> tuple[PyTree, PyTree]:
        """Apply the optimizer to the gradient `G`: `w_t, s_t = Ψ(G, s_{t-1}, w_{t-1}, λ)`."""
        state = opt_state
        if not is_optax(self.inner_optimizer):
            state = follow(state, self.init_of(params), hyperparams)
        optimizer = self.optimizer(hyperparams)
        new, new_state = updated("inner_optimizer", optimizer, gradient, state, params, loss)
        return new, _keep_types(new_state, opt_state)

    def pullback_move(
        self, gradient: PyTree, opt_state: PyTree, params: PyTree, hyperparams: PyTree, loss: Any
    ) -> tuple[tuple[PyTree, PyTree], Callable[[PyTree], tuple[PyTree, Any, PyTree]]]:
        """Apply the optimizer, and return with it `α ↦ (u, l̄, (∂Ψ/∂λ)ᵀα)`: cheap, no model.

        `u = (∂w_t/∂G)ᵀα`; `l̄ = ⟨α, ∂w_t/∂L_train⟩` for an optimizer that looks at the loss, such as
        Polyak's, and None for all others.
        """

        def move(gradient: PyTree, loss: Any, hyperparams: PyTree) -> tuple[PyTree, Any]:
            moved = with_finite_derivatives(self.move, clamp_roots=True)(
                gradient, opt_state, params, hyperparams, loss
            )
            return moved[0], moved

        _, pull, moved = jax.vjp(move, gradient, loss, hyperparams, has_aux=True)
        uses_loss = self.uses_loss(gradient, opt_state, params, hyperparams, loss)

        def pulled(alpha: PyTree) -> tuple[PyTree, Any, PyTree]:
            u, loss_bar, direct = pull(alpha)
            return u, loss_bar if uses_loss else None, direct

        return moved, pulled

    def uses_loss(
        self, gradient: PyTree, opt_state: PyTree, params: PyTree, hyperparams: PyTree, loss: Any
    ) -> bool:
        """Whether the optimizer looks at the training loss itself, and not only its gradient."""
        return depends(
            lambda loss: self.move(gradient, opt_state, params, hyperparams, loss), loss
        )[0]

    def optimizer(self, hyperparams: PyTree) -> Any:
        """Return the optax optimizer at these hyperparameters."""
        return optimizer_at(self.inner_optimizer, hyperparams)

    def init_of(self, params: PyTree) -> Callable[[PyTree], PyTree]:
        """Return `λ ↦ s_0`, the optimizer's first state for these weights."""
        return lambda hyperparams: self.optimizer(hyperparams).init(params)

    def _step(
        self,
        params: PyTree,
        opt_state: PyTree,
        hyperparams: PyTree,
        batch: PyTree,
        differentiable: bool,
    ) -> Moved:
        if self.update_fn is not None:
            update = self.update_fn
            if differentiable:
                # A user's own model is in there: the root of a negative number stays NaN.
                update = with_finite_derivatives(update)
            new = update(params, hyperparams, batch)
            check_same_tree("update_fn", new, "params", params)
            new = jax.tree.map(as_array, new)
            return Moved(new, opt_state, self.train_loss(params, hyperparams, batch))
        loss, gradient = self.gradient(params, hyperparams, batch)
        move = with_finite_derivatives(self.move, clamp_roots=True) if differentiable else self.move
        new_params, new_state = move(gradient, opt_state, params, hyperparams, loss)
        return Moved(new_params, new_state, loss)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mixed_step(
    inner: InnerStep, params: PyTree, opt_state: PyTree, hyperparams: PyTree, batch: PyTree
) -> Moved:
    """Take the step; backward, in mixed mode (MixFlow-MG, Kemaev et al. ICML 2025).

    What is kept for the backward pass is the point and its gradient G, and nothing of the model.
    Cotangents go back through the optimizer first, to one vector u in the place of G; what u meets
    behind it, ∂G/∂w and ∂G/∂λ, is symmetric to derivatives along u, which need no tape.
    """
    return _mixed_forward(inner, params, opt_state, hyperparams, batch)[0]


def _mixed_forward(
    inner: InnerStep, params: PyTree, opt_state: PyTree, hyperparams: PyTree, batch: PyTree
) -> tuple[Moved, Any]:
    loss, gradient = inner.gradient(params, hyperparams, batch)
    moved = Moved(*inner.move(gradient, opt_state, params, hyperparams, loss), loss)
    return moved, (gradient, opt_state, params, hyperparams, loss, batch)


def _mixed_backward(inner: InnerStep, kept: Any, cotangents: Moved) -> Any:
    *point, batch = kept
    _, _, params, hyperparams, _ = point
    _, pull = jax.vjp(with_finite_derivatives(inner.move, clamp_roots=True), *point)
    u, state_bar, *direct, loss_bar = pull((cotangents.params, cotangents.opt_state))
    loss_bar = loss_bar if inner.uses_loss(*point) else None
    arguments = (params, hyperparams, batch, u, loss_bar)
    through_model = second_order(inner.train_loss, *arguments, inner.mode, (0, 1))
    params_bar, hyperparams_bar = optax.tree.add(through_model, tuple(direct))
    return params_bar, state_bar, hyperparams_bar, None


_mixed_step.defvjp(_mixed_forward, _mixed_backward)


def optimizer_at(inner_optimizer: Any, hyperparams: PyTree) -> Any:
    """Return `inner_optimizer`, called with λ where it is a function of λ.

    Raises:
      TypeError: if it is neither an optax optimizer nor a function that returns one, or the
        function needs the numbers of λ while they are being differentiated.
    """
    if is_optax(inner_optimizer):
        return inner_optimizer
    try:
        optimizer = inner_optimizer(hyperparams)
    except _NUMBER_NEEDED as error:
        raise TypeError(
            "inner_optimizer, a function of the hyperparameters, needs a hyperparameter's number, "
            "for an `if`, a `float()`, an `int()` or NumPy, and λ has none while it is traced to "
            "be differentiated. optax's warm-up schedules test their peak so: give them the peak "
            "1, and scale it by λ:\n"
            "    shape = optax.warmup_cosine_decay_schedule(0, 1.0, warmup_steps, decay_steps)\n"
            "    inner_optimizer = lambda l: optax.adamw(lambda count: jnp.exp(l) * shape(count))"
        ) from error
    if not is_optax(optimizer):
        raise TypeError(
            "inner_optimizer must be an optax.GradientTransformation, or a function of the "
            f"hyperparameters that returns one; the function returned {type(optimizer).__name__}"
        )
    return optimizer


_NUMBER_NEEDED = (
    jax.errors.ConcretizationTypeError,  # and TracerBoolConversionError
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)


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
