"""Generalized Greedy: one-step terms of T inner steps, discounted by γ (ICLR 2025 subm., eq. 6)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from gradhpo.errors import check_number
from gradhpo.hypergradient import Mode, validation
from gradhpo.inner import Moved
from gradhpo.observers.telling import Observer
from gradhpo.optimizer import Estimate
from gradhpo.state import BilevelState, LossFn, PyTree
from gradhpo.task import Task
from gradhpo.unrolling import UnrollingMethod


@dataclass(frozen=True)
class GreedyOptimizer(UnrollingMethod):
    """Generalized Greedy: a step unrolls T inner steps and then moves λ once.

    `g = ∇_λ L_val(w_T, λ) + Σ_t γ^{T-t} ∇_w L_val(w_t, λ)·B_t`, accumulated while stepping
    forward, so memory does not grow with T.

    Args:
      inner_optimizer: an `optax.GradientTransformation`, or a function of λ that returns one.
      outer_optimizer: an `optax.GradientTransformation` for λ; required.
      unroll_steps: T, the inner steps in one step.
      gamma: γ in (0, 1]; toward 0 only the last step counts, as in One-Step.
      update_fn: `(params, hyperparams, batch) -> params`, in place of `inner_optimizer`.
      batches: "repeat" takes `train_batch` at all T steps; "stack" takes a stack of batches with
        a leading axis of length T, one for each.
      mode: how `α·∂Φ/∂λ` is taken: "reverse-over-reverse", "forward-over-reverse" or
        "reverse-over-forward", equal but for rounding. "auto" is the first, of the fewest FLOPs;
        the others need less memory where λ acts deep in a model of rematerialized blocks. An
        `update_fn` has the first alone.

    Raises:
      ValueError: if neither or both of `inner_optimizer` and `update_fn` are given, or there is
        no `outer_optimizer`, or a number is out of range.
    """

    inner_optimizer: Any = None
    outer_optimizer: Any = None
    unroll_steps: int = 1
    gamma: float = 0.9
    update_fn: Callable[..., Any] | None = None
    batches: Literal["repeat", "stack"] = "repeat"
    mode: Mode = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.outer_optimizer is None:
            raise ValueError("GreedyOptimizer needs an outer_optimizer: it takes no lr_hyper")
        gamma = check_number("gamma", self.gamma, 0, 1, open_low=True)
        object.__setattr__(self, "gamma", gamma)

    def step(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        state: BilevelState,
        train_batch: PyTree,
        val_batch: PyTree,
        train_loss_fn: LossFn,
        val_loss_fn: LossFn,
        *,
        key: jax.Array | None = None,
    ) -> BilevelState:
        """Take `unroll_steps` steps of the weights and one of λ; see `BilevelOptimizer.step`.

        There is no `lr_hyper`: the step size on λ lives in `outer_optimizer`. `state.step` grows
        by 1, and `train_loss` is that of the last inner step.
        """
        losses = (train_loss_fn, val_loss_fn)
        return super().step(state, train_batch, val_batch, *losses, key=key)

    def run(
        self,
        state: BilevelState,
        M: int,
        get_train_batch: Callable[[], Any],
        get_val_batch: Callable[[], Any],
        train_loss_fn: LossFn,
        val_loss_fn: LossFn,
        lr_reptile: float = 1.0,
        lr_hyper: float | None = None,
        callback: Callable[[int, BilevelState], Any] | None = None,
        progress: bool | None = None,
        *,
        key: jax.Array | None = None,
        observers: Iterable[Observer] = (),
    ) -> BilevelState:
        """Train for `M` episodes of one step each, `unroll_steps` inner steps; see the base class.

        `lr_hyper` is there for the shared signature and has no effect, which a warning says.
        """
        if lr_hyper is not None:
            message = "GreedyOptimizer.run ignores lr_hyper: outer_optimizer has the step size"
            warnings.warn(message, UserWarning, stacklevel=2)
        draw = (get_train_batch, get_val_batch, train_loss_fn, val_loss_fn)
        rest = (lr_reptile, None, callback, progress)
        return super().run(state, M, *draw, *rest, key=key, observers=observers)

    def estimate(self, state: BilevelState, task: Task) -> Estimate:
        """Return eq. 6 with the weights after T inner steps."""
        (w, s), lam, last = task.start(state), state.hyperparams, self.unroll_steps - 1
        inner, batch_at = self.inner_step(task.train_loss), self.batch_at(task.train_batch)

        def greedy_step(w: PyTree, s: PyTree, acc: PyTree, t: Any) -> tuple[Moved, Any, PyTree]:
            moved, pull = inner.pullback(w, s, lam, batch_at(t))
            val = validation(task, moved.params, moved.carried, lam)
            # acc ← γ·acc + α_t·B_t
            return moved, val, optax.tree.add(optax.tree.scale(self.gamma, acc), pull(val.alpha))

        def body(carry: tuple[PyTree, PyTree, PyTree], t: Any) -> tuple[Any, None]:
            w, s, acc = carry
            moved, _, acc = greedy_step(w, s, acc, t)
            return (moved.params, moved.carried, acc), None

        start = (w, s, optax.tree.zeros_like(lam))
        w, s, acc = jax.lax.scan(body, start, jnp.arange(last))[0] if last else start
        moved, val, acc = greedy_step(w, s, acc, last)
        return Estimate.of(optax.tree.add(val.direct, acc), moved, val)
