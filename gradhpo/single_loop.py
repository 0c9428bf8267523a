"""Single loops: the weights, λ, and the solution of the linear system between them move at once.

`H v = -∇_w L_val`, `H = ∂²L_train/∂w²`, is solved by a step of the inner optimizer at every step:
`D_w = ∇_w L_train`, `D_v = H v + ∇_w L_val`, `D_λ = ∂²L_train/∂λ∂w·v + ∇_λ L_val`, all at the
point before the step (Dagréou et al. NeurIPS 2022, Section 2).
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gradhpo.errors import check_count
from gradhpo.hypergradient import Validation, validation
from gradhpo.inner import InnerStep, Moved, optimizer_at
from gradhpo.optimizer import HypergradientMethod
from gradhpo.state import BilevelState, PyTree, prepare, remembered
from gradhpo.task import Aux, Task, split_fixed
from gradhpo.unseen import refuse_unseen

SOLUTION, SOLUTION_STATE = "solution", "solution_opt_state"
"""What the state keeps: `v`, shaped like the weights, and the state of what moves it."""


class Oracles(NamedTuple):
    """What the data of a step say at the point before it: each is a mean over examples."""

    gradient: PyTree
    """`∇_w L_train`."""
    hessian_v: PyTree
    """`H v`."""
    mixed_v: PyTree
    """`∂²L_train/∂λ∂w·v`."""
    alpha: PyTree
    """`∇_w L_val`."""
    direct: PyTree
    """`∇_λ L_val`."""


class Directions(NamedTuple):
    """What one step finds at the point before it."""

    hypergradient: PyTree
    """`D_λ`."""
    moved: Moved
    """The weights after a step along `D_w`."""
    val: Validation
    """At the weights before the step."""
    memory: dict[str, Any]
    """`v` after a step along `D_v`, the state of its optimizer, and what `reduced` remembers."""


class SingleLoopMethod(HypergradientMethod):
    """A method that keeps `v`, and moves it together with the weights and λ.

    `linear_optimizer` moves it; by default the inner optimizer does, in a state of its own.
    """

    linear_optimizer: Any = None
    T: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("T", self.T)
        if self.update_fn is not None and self.linear_optimizer is None:
            raise ValueError(
                f"{type(self).__name__} needs a linear_optimizer with an update_fn, which cannot "
                "move the solution of the linear system; got None"
            )
        linear = self.linear_optimizer
        if linear is not None and not callable(getattr(linear, "update", linear)):
            accepted = "an optax.GradientTransformation or a function of the hyperparameters"
            raise TypeError(f"linear_optimizer must be {accepted}, got {linear!r}")

    def init(
        self, params: PyTree, hyperparams: PyTree, *, model_state: PyTree = None
    ) -> BilevelState:
        """Return the state before the first step, with `v = 0`; see `BilevelOptimizer.init`."""
        state = super().init(params, hyperparams, model_state=model_state)
        nothing = optax.tree.zeros_like(split_fixed(state.params)[0])
        chosen = self.inner_optimizer if self.linear_optimizer is None else self.linear_optimizer
        first = optimizer_at(chosen, state.hyperparams).init(nothing)
        return prepare(state.update(metadata={SOLUTION: nothing, SOLUTION_STATE: first}))

    def directions(self, state: BilevelState, task: Task) -> Directions:
        """Return the three directions, and the weights and `v` moved along theirs."""
        (w, s), lam = task.start(state), state.hyperparams
        inner, batch = self.inner_step(task.train_loss), task.train_batch
        refuse_unseen(type(self).__name__, inner, state, task, self._tuned(lam))
        v = remembered(state, SOLUTION)

        def gradient(w: PyTree, lam: PyTree) -> tuple[PyTree, tuple[jax.Array, Aux]]:
            loss, aux, G = inner.gradient(w, s, lam, batch)
            return G, (loss, aux)

        G, pull, (loss, aux) = jax.vjp(gradient, w, lam, has_aux=True)
        hessian_v, mixed_v = pull(v)
        val = validation(task, w, s, lam)
        found = Oracles(G, hessian_v, mixed_v, val.alpha, val.direct)
        found, kept = self.reduced(found, state, task)
        if inner.update_fn is None:
            new, opt_state = inner.move(found.gradient, s.opt_state, w, lam, loss)
            moved = Moved(new, inner.after(s, opt_state, aux), loss, aux.metrics)
        else:
            moved = inner(w, s, lam, batch)
        memory = self._solved(inner, state, optax.tree.add(found.hessian_v, found.alpha))
        hypergradient = optax.tree.add(found.mixed_v, found.direct)
        return Directions(hypergradient, moved, val, memory | kept)

    def reduced(
        self, found: Oracles, state: BilevelState, task: Task
    ) -> tuple[Oracles, dict[str, Any]]:
        """Return the oracles with less variance, and what is remembered for that; as they are."""
        del state, task
        return found, {}

    def _solved(self, inner: InnerStep, state: BilevelState, residual: PyTree) -> dict[str, Any]:
        """Return `v` after a step along `D_v`, which is the gradient of `½vᵀHv + v·∇_w L_val`."""
        v, opt_state = remembered(state, SOLUTION), remembered(state, SOLUTION_STATE)
        if self.linear_optimizer is not None:
            linear = self.linear_optimizer
            inner = dataclasses.replace(inner, inner_optimizer=linear, update_fn=None)
        value = jnp.zeros(())  # of what it descends, which nobody asks for
        v, opt_state = inner.move(residual, opt_state, v, state.hyperparams, value)
        return {SOLUTION: v, SOLUTION_STATE: opt_state}
