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
from gradhpo.errors import check_same_tree, tracing
from gradhpo.finite_derivatives import with_finite_derivatives
from gradhpo.hypergradient import Loss, Mode, second_order
from gradhpo.injected import follow
from gradhpo.state import LossFn, PyTree, as_array
from gradhpo.task import (
    NEXT,
    TRAIN,
    Aux,
    Carried,
    evaluate,
    is_none,
    split_fixed,
    wanted,
    without_aux,
)
from gradhpo.updates import updated


class Moved(NamedTuple):
    """What one inner step leaves behind."""

    params: PyTree
    """`w_t`: the floating-point leaves."""
    carried: Carried
    """`s_t`."""
    train_loss: jax.Array
    """`L_train(w_{t-1}, λ, D_t)`: the loss whose gradient moved the weights."""
    metrics: dict[str, jax.Array]
    """What else the training loss returned, by its full name."""


@dataclasses.dataclass(frozen=True)
class InnerStep:
    """One inner step, from an optax optimizer on the training loss or from the user's own function.

    Exactly one of `inner_optimizer` and `update_fn` is given. `inner_optimizer` may be a function
    `λ -> GradientTransformation`; then λ also receives gradients through the optimizer itself.
    `mode` is how its derivatives are taken, see `MODES`.
    """

    inner_optimizer: Any
    update_fn: Callable[..., Any] | None
    train_loss_fn: LossFn
    mode: Mode = "reverse-over-reverse"
    jointly: bool = False
    """Whether the training gradient is taken in λ too, and that part dropped: an operation on λ
    with a VJP of its own (`jax.custom_vjp`) can then be differentiated again, by forward mode."""
    through_model_state: bool = False
    """Whether the model state is differentiated too; else it is a constant of each step."""

    def __call__(
        self, params: PyTree, carried: Carried, hyperparams: PyTree, batch: PyTree
    ) -> Moved:
        """Take the step."""
        return self._step(params, carried, hyperparams, batch, differentiable=False)

    def pullback(
        self, params: PyTree, carried: Carried, hyperparams: PyTree, batch: PyTree
    ) -> tuple[Moved, Callable[[PyTree], PyTree]]:
        """Take the step, and return with it `α ↦ α·B`; no gradient is computed twice."""
        if self.mode != "reverse-over-reverse":
            return self._pullback_mixed(params, carried, hyperparams, batch)

        def step(hyperparams: PyTree) -> tuple[PyTree, Moved]:
            moved = self.differentiable(params, carried, hyperparams, batch)
            return moved.params, moved

        _, pull, moved = jax.vjp(step, hyperparams, has_aux=True)
        return moved, lambda alpha: pull(alpha)[0]

    def _pullback_mixed(
        self, params: PyTree, carried: Carried, hyperparams: PyTree, batch: PyTree
    ) -> tuple[Moved, Callable[[PyTree], PyTree]]:
        moved, _, pull = self.moved_with_pull(params, carried, hyperparams, batch)

        def alpha_b(alpha: PyTree) -> PyTree:
            # α·B = ∇_λ ⟨u, ∇_w L_train⟩ + the optimizer's own terms, u = (∂w_t/∂G)ᵀα.
            u, loss_bar, direct = pull(alpha)
            objective = self.objective(carried, batch)
            (mixed,) = second_order(objective, params, hyperparams, u, loss_bar, self.mode, (1,))
            return optax.tree.add(mixed, direct)

        return moved, alpha_b

    def moved_with_pull(
        self, params: PyTree, carried: Carried, hyperparams: PyTree, batch: PyTree
    ) -> tuple[Moved, PyTree, Callable[[PyTree], tuple[PyTree, Any, PyTree]]]:
        """Take the step, and return with it `G` and what `pullback_move` gives."""
        loss, aux, gradient = self.gradient(params, carried, hyperparams, batch)
        before = (carried.opt_state, params, hyperparams, loss)
        (new, new_state), pull = self.pullback_move(gradient, *before)
        moved = Moved(new, self.after(carried, new_state, aux), loss, aux.metrics)
        return moved, gradient, pull

    def pullback_both(
        self, params: PyTree, carried: Carried, hyperparams: PyTree, batch: PyTree
    ) -> Callable[[PyTree], tuple[PyTree, PyTree]]:
        """Return `α ↦ (α·A, α·B)`, A and B being Φ's derivatives in the weights and in λ."""

        def step(params: PyTree, hyperparams: PyTree) -> PyTree:
            return self.differentiable(params, carried, hyperparams, batch).params

        return jax.vjp(step, params, hyperparams)[1]

    def differentiable(
        self, params: PyTree, carried: Carried, hyperparams: PyTree, batch: PyTree
    ) -> Moved:
        """Take the step as a function to differentiate, in the weights, the state and λ.

        The training loss it returns is not to be differentiated. In a mixed mode the step has a
        reverse rule of its own, so `jax.vjp` and `jax.grad` work on it, and `jax.jvp` does not.
        """
        if self.mode == "reverse-over-reverse":
            return self._step(params, carried, hyperparams, batch, differentiable=True)
        opt_state, rest = carried.opt_state, carried._replace(opt_state=None)
        made: Any = _mixed_step(self, params, opt_state, hyperparams, (rest, batch))
        new, new_state, loss, aux = made
        return Moved(new, self.after(carried, new_state, aux), loss, aux.metrics)

    def pullback_all(
        self, params: PyTree, carried: Carried, hyperparams: PyTree, batch: PyTree
    ) -> Callable[[PyTree, PyTree], tuple[PyTree, PyTree, PyTree]]:
        """Return the map of cotangents of `w_t, s_t` to those of `w_{t-1}, s_{t-1}, λ`.

        The cotangents of a state are shaped like `differentiable_state`.
        """

        def step(params: PyTree, floating: PyTree, hyperparams: PyTree) -> tuple[PyTree, PyTree]:
            state = jax.tree.map(
                lambda x, leaf: leaf if x is None else x,
                floating,
                carried.opt_state,
                is_leaf=is_none,
            )
            before = carried._replace(opt_state=state)
            moved = self.differentiable(params, before, hyperparams, batch)
            return moved.params, self.differentiable_state(moved.carried)

        _, pull = jax.vjp(step, params, self.differentiable_state(carried), hyperparams)
        return lambda *cotangents: pull(cotangents)

    @staticmethod
    def differentiable_state(carried: Carried) -> PyTree:
        """Return the optimizer's state with None in place of counts, keys and flags."""

        def keep(leaf: jax.Array) -> jax.Array | None:
            return leaf if jnp.issubdtype(leaf.dtype, jnp.floating) else None

        return jax.tree.map(keep, carried.opt_state)

    def gradient(
        self, params: PyTree, carried: Carried, hyperparams: PyTree, batch: PyTree
    ) -> tuple[jax.Array, Aux, PyTree]:
        """Return the training loss, what it returned besides, and `G`, its gradient in `w`."""
        argnums = (0, 1) if self.jointly else (0,)
        loss, aux, gradients = self._gradients(params, carried, hyperparams, batch, argnums)
        return loss, aux, gradients[0]

    def gradients(
        self, params: PyTree, carried: Carried, hyperparams: PyTree, batch: PyTree
    ) -> tuple[jax.Array, Aux, PyTree, PyTree]:
        """Return what `gradient` does, and the gradient in λ, from one backward pass."""
        loss, aux, both = self._gradients(params, carried, hyperparams, batch, (0, 1))
        return loss, aux, *both

    def _gradients(
        self,
        params: PyTree,
        carried: Carried,
        hyperparams: PyTree,
        batch: PyTree,
        argnums: tuple[int, ...],
    ) -> tuple[jax.Array, Aux, tuple[PyTree, ...]]:
        gradient_of = jax.value_and_grad(self._evaluated(carried, batch), argnums, has_aux=True)
        (loss, aux), gradients = gradient_of(params, hyperparams)
        return loss, aux, gradients

    def objective(self, carried: Carried, batch: PyTree) -> Loss:
        """Return the training loss as a function of the weights and λ alone."""
        evaluated = self._evaluated(carried, batch)
        return lambda params, hyperparams: evaluated(params, hyperparams)[0]

    def _evaluated(
        self, carried: Carried, batch: PyTree
    ) -> Callable[[PyTree, PyTree], tuple[jax.Array, Aux]]:
        given = self._given(carried)

        def evaluated(params: PyTree, hyperparams: PyTree) -> tuple[jax.Array, Aux]:
            arguments = (carried.whole(params), hyperparams, batch)
            return evaluate("train_loss_fn", self.train_loss_fn, arguments, **given)

        return evaluated

    def _given(self, carried: Carried) -> dict[str, Any]:
        """Return what the training loss and an `update_fn` may take of what is carried."""
        seen = self._as_constant(carried.model_state)
        return carried._replace(model_state=seen).given(TRAIN)

    def _as_constant(self, model_state: PyTree) -> PyTree:
        return model_state if self.through_model_state else jax.lax.stop_gradient(model_state)

    def after(self, before: Carried, opt_state: PyTree, aux: Aux) -> Carried:
        """Return `s_t` from `s_{t-1}`, the optimizer's new state, and what the loss returned."""
        new = before.model_state if aux.model_state is None else aux.model_state
        return Carried(opt_state, self._as_constant(new), before.draw(NEXT), before.fixed)

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
        carried: Carried,
        hyperparams: PyTree,
        batch: PyTree,
        differentiable: bool,
    ) -> Moved:
        if self.update_fn is not None:
            return self._own_update(params, carried, hyperparams, batch, differentiable)
        loss, aux, gradient = self.gradient(params, carried, hyperparams, batch)
        move = with_finite_derivatives(self.move, clamp_roots=True) if differentiable else self.move
        new, new_state = move(gradient, carried.opt_state, params, hyperparams, loss)
        return Moved(new, self.after(carried, new_state, aux), loss, aux.metrics)

    def _own_update(
        self,
        params: PyTree,
        carried: Carried,
        hyperparams: PyTree,
        batch: PyTree,
        differentiable: bool,
    ) -> Moved:
        loss, aux = self._evaluated(carried, batch)(params, hyperparams)

        def update(params: PyTree, hyperparams: PyTree) -> tuple[PyTree, PyTree]:
            whole = carried.whole(params)
            new, model_state = self._updated(whole, carried, hyperparams, batch)
            check_same_tree("update_fn", new, "params", whole)
            return split_fixed(jax.tree.map(as_array, new)), model_state

        # A user's own model is in there: the root of a negative number stays NaN.
        update = with_finite_derivatives(update) if differentiable else update
        (new, fixed), model_state = update(params, hyperparams)
        aux = aux if model_state is None else Aux(model_state, aux.metrics)
        after = self.after(carried, carried.opt_state, aux)._replace(fixed=fixed)
        return Moved(new, after, loss, aux.metrics)

    def _updated(
        self, whole: PyTree, carried: Carried, hyperparams: PyTree, batch: PyTree
    ) -> tuple[PyTree, PyTree]:
        """Return what `update_fn` makes of the weights, and of the model state if it returns it."""
        assert self.update_fn is not None
        given = wanted("update_fn", self.update_fn, **self._given(carried))
        made = self.update_fn(whole, hyperparams, batch, **given)
        new, aux = without_aux(made)
        if aux is None:
            return new, None
        if aux.metrics:
            raise ValueError("update_fn returns metrics: return them from train_loss_fn")
        if aux.model_state is not None:
            like = ("model_state", carried.model_state)
            check_same_tree("update_fn's model_state", aux.model_state, *like, dtypes=False)
        return new, aux.model_state


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mixed_step(
    inner: InnerStep,
    params: PyTree,
    opt_state: PyTree,
    hyperparams: PyTree,
    rest: tuple[Carried, PyTree],
) -> tuple[PyTree, PyTree, jax.Array, Aux]:
    """Take the step; backward, in mixed mode (MixFlow-MG, Kemaev et al. ICML 2025).

    What is kept for the backward pass is the point and its gradient G, and nothing of the model.
    Cotangents go back through the optimizer first, to one vector u in the place of G; what u meets
    behind it, ∂G/∂w and ∂G/∂λ, is symmetric to derivatives along u, which need no tape. `rest`,
    what else is carried and the batch, is not differentiated.
    """
    return _mixed_forward(inner, params, opt_state, hyperparams, rest)[0]


def _mixed_forward(
    inner: InnerStep,
    params: PyTree,
    opt_state: PyTree,
    hyperparams: PyTree,
    rest: tuple[Carried, PyTree],
) -> tuple[Any, Any]:
    loss, aux, gradient = inner.gradient(params, rest[0], hyperparams, rest[1])
    moved = inner.move(gradient, opt_state, params, hyperparams, loss)
    return (*moved, loss, aux), (gradient, opt_state, params, hyperparams, loss, rest)


def _mixed_backward(inner: InnerStep, kept: Any, cotangents: Any) -> Any:
    *point, rest = kept
    _, _, params, hyperparams, _ = point
    _, pull = jax.vjp(with_finite_derivatives(inner.move, clamp_roots=True), *point)
    u, state_bar, *direct, loss_bar = pull(cotangents[:2])
    loss_bar = loss_bar if inner.uses_loss(*point) else None
    arguments = (params, hyperparams, u, loss_bar)
    through_model = second_order(inner.objective(*rest), *arguments, inner.mode, (0, 1))
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
        with tracing(
            "inner_optimizer, a function of the hyperparameters,", hyperparams=hyperparams
        ):
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


def _keep_types(new_state: PyTree, old_state: PyTree) -> PyTree:
    """Cast the optimizer's new state to the old one's dtypes.

    A float32 learning rate among the hyperparameters makes optax widen the momentum of bfloat16
    weights, and the state would then no longer fit a `scan`.
    """
    check_same_tree("inner_optimizer's new state", new_state, "its state", old_state, dtypes=False)
    return jax.tree.map(lambda new, old: as_array(new, old.dtype), new_state, old_state)
