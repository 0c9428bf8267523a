"""F2SA: a hypergradient from first derivatives alone, by a penalty (Kwon et al. ICML 2023).

`z ← z - γ ∇_w L_train(z)`, `y ← y - (γ/σ) [∇_w L_val(y) + σ ∇_w L_train(y)]`, T times, and then
`g = ∇_λ L_val(y) + σ [∇_λ L_train(y) - ∇_λ L_train(z)]`, σ the multiplier.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from gradhpo.errors import check_count, check_number
from gradhpo.hypergradient import validation
from gradhpo.inner import InnerStep, Moved
from gradhpo.optimizer import Estimate
from gradhpo.state import BilevelState, PyTree, prepare, remembered
from gradhpo.task import Carried, Task
from gradhpo.unrolling import UnrollingMethod
from gradhpo.unseen import refuse_unseen

PENALIZED, PENALIZED_STATE, MULTIPLIER = "penalized", "penalized_opt_state", "multiplier"
"""What the state keeps: `y`, the state of its optimizer, and σ."""


@dataclass(frozen=True)
class F2SAOptimizer(UnrollingMethod):
    """F2SA: two sets of weights, one trained and one drawn to the validation loss, and no Hessian.

    `z`, the state's weights, train as ever. `y` descends `L_train + L_val/σ` beside them, by the
    same optimizer in a state of its own (for SGD of rate γ, the paper's steps of `α = γ/σ` on
    `L_val + σ L_train`). How the training loss's own gradient in λ differs between the two tells
    how λ moves the minimum, with an error of the order of 1/σ. Nothing is differentiated twice: a
    loss needs no second derivative, and a step no memory for one. In float32 the difference is
    lost in rounding for σ above about 1000 times the scale of the losses.

    `metadata` holds `penalized` (y), `penalized_opt_state` and `multiplier` (σ). An episode begins
    with y at its weights; the multiplier goes on. What losses remember (running statistics) y
    reads as z has it. What `train_loss_fn` does not show is not seen: a hyperparameter that is
    tuned, and moves the weights through the inner optimizer only, is refused.

    Args:
      inner_optimizer: an `optax.GradientTransformation`, or a function of λ that returns one.
      outer_optimizer: an `optax.GradientTransformation` for λ, in place of `lr_hyper`.
      unroll_steps: T, the inner steps of z and of y in one step.
      multiplier: σ at first, above 0.
      growth: δ, what σ grows by at a step; 0 keeps it.
      batches: "repeat" takes `train_batch` at all T steps; "stack" takes a stack of batches with
        a leading axis of length T, one for each. z and y see the same.
      T: steps in an episode of `run`.

    Raises:
      ValueError: if there is no `inner_optimizer`, or a number is out of range; in `step`, if a
        hyperparameter acts on the weights through the inner optimizer only.

    References:
      Kwon, Kwon, Wright and Nowak, A Fully First-Order Method for Stochastic Bilevel Optimization,
      ICML 2023, Algorithm 1.
    """

    inner_optimizer: Any = None
    outer_optimizer: Any = None
    unroll_steps: int = 1
    multiplier: float = 1.0
    growth: float = 0.1
    batches: Literal["repeat", "stack"] = "repeat"
    T: int = 20

    persists = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("T", self.T)
        infinity = float("inf")
        multiplier = check_number("multiplier", self.multiplier, 0, infinity, open_low=True)
        object.__setattr__(self, "multiplier", multiplier)
        object.__setattr__(self, "growth", check_number("growth", self.growth, 0, infinity))

    def init(
        self, params: PyTree, hyperparams: PyTree, *, model_state: PyTree = None
    ) -> BilevelState:
        """Return the state before the first step, with `y = z`; see `BilevelOptimizer.init`."""
        state = super().init(params, hyperparams, model_state=model_state)
        return prepare(_together(state.update(metadata={MULTIPLIER: self.multiplier})))

    def reset(self, state: BilevelState, params: PyTree) -> BilevelState:
        """Return `state` at the beginning of an episode that starts from `params`."""
        return _together(super().reset(state, params))

    def estimate(self, state: BilevelState, task: Task) -> Estimate:
        """Return `g` at the weights after T steps of both."""
        inner, lam = self.inner_step(task.train_loss), state.hyperparams
        batch, sigma = self.batch_at(task.train_batch)(self.unroll_steps - 1), _sigma(state)
        refuse_unseen(
            type(self).__name__, inner, state, self._with_one_batch(task), self._tuned(lam)
        )
        z = self.unroll(inner, state, task, lam)
        y = self.unroll(_penalized(inner, task, sigma), _at_penalized(state), task, lam)
        val = validation(task, y.params, z.carried, lam)
        loss, metrics = task.validate(z.params, z.carried, lam)

        def in_lam(params: PyTree) -> PyTree:
            return jax.grad(inner.objective(z.carried, batch), 1)(params, lam)

        difference = optax.tree.sub(in_lam(y.params), in_lam(z.params))
        g = jax.tree.map(lambda f, d: f + sigma.astype(d.dtype) * d, val.direct, difference)
        memory = {
            PENALIZED: y.carried.whole(y.params),
            PENALIZED_STATE: y.carried.opt_state,
            MULTIPLIER: sigma + self.growth,
        }
        return Estimate.of(g, z, val._replace(loss=loss, metrics=metrics), memory)


def _penalized(inner: InnerStep, task: Task, sigma: jax.Array) -> Any:
    """Return the inner step of `L_train + L_val/σ`."""

    def step(params: PyTree, carried: Carried, lam: PyTree, batch: PyTree) -> Moved:
        loss, aux, gradient = inner.gradient(params, carried, lam, batch)
        val = validation(task, params, carried, lam)
        gradient = jax.tree.map(lambda g, a: g + a / sigma.astype(g.dtype), gradient, val.alpha)
        new, opt_state = inner.move(gradient, carried.opt_state, params, lam, loss)
        return Moved(new, inner.after(carried, opt_state, aux), loss, aux.metrics)

    return step


def _together(state: BilevelState) -> BilevelState:
    """Return the state with y where z is, in buffers of its own."""
    here = jax.tree.map(jnp.copy, (state.params, state.inner_opt_state))
    return state.update(metadata={PENALIZED: here[0], PENALIZED_STATE: here[1]})


def _at_penalized(state: BilevelState) -> BilevelState:
    """Return the state with y for its weights."""
    return state.update(
        params=remembered(state, PENALIZED), inner_opt_state=remembered(state, PENALIZED_STATE)
    )


def _sigma(state: BilevelState) -> jax.Array:
    return jnp.asarray(remembered(state, MULTIPLIER))
