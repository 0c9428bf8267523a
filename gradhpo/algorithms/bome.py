"""BOME: both levels descend the validation loss under a barrier (Ye et al. NeurIPS 2022).

`q(w, λ) = L_train(w, λ) - L_train(w_T, λ)`, `w_T` after T steps from `w`, held; then both `w` and
`λ` step along `∇L_val + μ ∇q`, `μ = max(φ - ⟨∇L_val, ∇q⟩, 0) / ‖∇q‖²`, `φ = η ‖∇q‖²` or `η q`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from gradhpo.errors import check_count, check_number
from gradhpo.hypergradient import at_least_float32, validation
from gradhpo.inner import InnerStep, Moved
from gradhpo.optimizer import Estimate, StatelessMethod
from gradhpo.state import BilevelState, PyTree
from gradhpo.task import Carried, Task
from gradhpo.unseen import refuse_unseen

BARRIERS = ("gradient", "gap")


@dataclass(frozen=True)
class BOMEOptimizer(StatelessMethod):
    """BOME: first derivatives alone, one set of weights, and no linear system.

    How far the weights are from a minimum of the training loss is a constraint, whose multiplier is
    computed anew at every step so that the constraint falls. The weights themselves descend the
    validation loss as far as it allows: they are fitted to it, and a figure to report needs data of
    its own. Deterministic: meant for all data, or large batches. All of a step is taken
    at the point before it, `metadata["val_loss"]` too. What `train_loss_fn` does not show is not
    seen: a hyperparameter that is tuned, and moves the weights through the inner optimizer only, is
    refused.

    Args:
      inner_optimizer: an `optax.GradientTransformation`, or a function of λ that returns one: the
        weights' step along `∇_w L_val + μ ∇_w q`.
      outer_optimizer: an `optax.GradientTransformation` for λ, in place of `lr_hyper`. The paper
        has one rate for the weights and λ.
      search_steps: T, the steps of gradient descent to `w_T`.
      search_optimizer: what takes them, from a first state of its own at every step; by
        default the inner optimizer.
      barrier: "gradient" for `φ = η ‖∇q‖²`, "gap" for `φ = η q`.
      eta: η > 0.

    Raises:
      ValueError: if there is no `inner_optimizer`, or a setting is out of range; in `step`, if a
        hyperparameter acts on the weights through the inner optimizer only.

    References:
      Ye, Liu, Wright, Stone and Liu, BOME! Bilevel Optimization Made Easy: A Simple First-Order
      Approach, NeurIPS 2022, Algorithm 1.
    """

    inner_optimizer: Any = None
    outer_optimizer: Any = None
    search_steps: int = 10
    search_optimizer: Any = None
    barrier: Literal["gradient", "gap"] = "gradient"
    eta: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("search_steps", self.search_steps)
        eta = check_number("eta", self.eta, 0, float("inf"), open_low=True)
        object.__setattr__(self, "eta", eta)
        if self.barrier not in BARRIERS:
            raise ValueError(f"barrier must be one of {BARRIERS}, got {self.barrier!r}")

    def estimate(self, state: BilevelState, task: Task) -> Estimate:
        """Return `∇_λ L_val + μ ∇_λ q`, with the weights moved along theirs."""
        (w, s), lam = task.start(state), state.hyperparams
        inner, batch = self.inner_step(task.train_loss), task.train_batch
        refuse_unseen(type(self).__name__, inner, state, task, self._tuned(lam))
        loss, aux, q_w, train_lam = inner.gradients(w, s, lam, batch)
        lowest = self._searched(inner, w, s, lam, batch)
        least, least_lam = jax.value_and_grad(inner.objective(s, batch), 1)(lowest, lam)
        q_lam = optax.tree.sub(train_lam, least_lam)
        val = validation(task, w, s, lam)
        mu = self._multiplier((val.alpha, val.direct), (q_w, q_lam), loss - least)

        def along(f: jax.Array, q: jax.Array) -> jax.Array:
            return f + mu.astype(q.dtype) * q

        new, opt_state = inner.move(jax.tree.map(along, val.alpha, q_w), s.opt_state, w, lam, loss)
        moved = Moved(new, inner.after(s, opt_state, aux), loss, aux.metrics)
        return Estimate.of(jax.tree.map(along, val.direct, q_lam), moved, val)

    def _searched(
        self, inner: InnerStep, w: PyTree, s: Carried, lam: PyTree, batch: PyTree
    ) -> PyTree:
        """Return `w_T`."""
        if self.search_optimizer is not None:
            inner = dataclasses.replace(inner, inner_optimizer=self.search_optimizer)

        def body(carry: tuple[PyTree, Carried], _: Any) -> tuple[Any, None]:
            moved = inner(*carry, lam, batch)
            return (moved.params, s._replace(opt_state=moved.carried.opt_state)), None

        start = (w, s._replace(opt_state=inner.init_of(w)(lam)))
        return jax.lax.scan(body, start, length=self.search_steps)[0][0]

    def _multiplier(self, f: PyTree, q: PyTree, gap: jax.Array) -> jax.Array:
        """Return μ; 0 where `∇q` is."""
        f, q = at_least_float32(f), at_least_float32(q)
        square = jnp.asarray(optax.tree.vdot(q, q))
        phi = self.eta * (square if self.barrier == "gradient" else gap)
        wanted = jnp.maximum(phi - optax.tree.vdot(f, q), 0)
        return jnp.where(square > 0, wanted / jnp.where(square > 0, square, 1), 0)
