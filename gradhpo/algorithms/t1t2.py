"""T1-T2 with DARTS differences: One-Step without second derivatives.

Luketina et al. ICML 2016; Liu et al. ICLR 2019, eq. 7-8. With an optimizer other than SGD, the
vector is first pulled back through the optimizer's own update: with Adam, that is SAMA (Choe et al.
NeurIPS 2023).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import optax

from gradhpo import ema
from gradhpo.errors import check_count, check_number
from gradhpo.hypergradient import (
    coordinate_differences,
    mixed_difference,
    validation,
)
from gradhpo.inner import InnerStep, Moved
from gradhpo.optimizer import Estimate, HypergradientMethod
from gradhpo.state import BilevelState, PyTree, remembered
from gradhpo.task import Carried, Task


@dataclass(frozen=True)
class T1T2Optimizer(HypergradientMethod):
    """T1-T2: One-Step's estimate, with finite differences in place of second derivatives.

    With an `inner_optimizer` it costs two more gradients, whatever the size of λ; at a step where a
    weight has no gradient and the optimizer divides by its size, as Adam does, the part of such
    weights is taken by a derivative instead. With an `update_fn` it shifts every coordinate of λ on
    its own: 2·dim(λ) evaluations of `update_fn`.

    Args:
      inner_optimizer: an `optax.GradientTransformation`, or a function of λ that returns one.
      outer_optimizer: an `optax.GradientTransformation` for λ, in place of `lr_hyper`.
      gamma: in [0, 1]; above 0, `B` is taken at the EMA point w*_t of HyperDistill's eq. 13
        instead of `w_{t-1}`, and the state remembers that point.
      T: steps in an episode of `run`.
      update_fn: `(params, hyperparams, batch) -> params`, in place of `inner_optimizer`.
      eps: the step of the differences, along `u` or in λ. By default `0.01/‖u‖₂` (DARTS), or the
        cube root of the machine epsilon times `max(1, |λ_i|)`. A smaller one is needed for λ
        that must stay positive and is small itself, such as a learning rate.

    Raises:
      ValueError: if neither or both of `inner_optimizer` and `update_fn` are given, or a number
        is out of range.

    References:
      Luketina et al., Scalable Gradient-Based Tuning of Continuous Regularization
      Hyperparameters, ICML 2016. Liu et al., DARTS, ICLR 2019, eq. 7-8. Choe et al., Making
      Scalable Meta Learning Practical, NeurIPS 2023 (SAMA: the same with Adam's update).
    """

    inner_optimizer: Any = None
    outer_optimizer: Any = None
    gamma: float = 0.0
    T: int = 20
    update_fn: Callable[..., Any] | None = None
    eps: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "gamma", check_number("gamma", self.gamma, 0, 1))
        check_count("T", self.T)
        if self.eps is not None:
            eps = check_number("eps", self.eps, 0, float("inf"), open_low=True)
            object.__setattr__(self, "eps", eps)

    @property
    def by_values(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether λ is shifted, coordinate by coordinate."""
        return self.update_fn is not None

    def init(
        self, params: PyTree, hyperparams: PyTree, *, model_state: PyTree = None
    ) -> BilevelState:
        """Return the state before the first step; see `BilevelOptimizer.init`."""
        state = super().init(params, hyperparams, model_state=model_state)
        if self.gamma == 0:
            return state
        return state.update(metadata={"w_star": ema.distilled_start(state.params)})

    def reset(self, state: BilevelState, params: PyTree) -> BilevelState:
        """Return `state` at the beginning of an episode that starts from `params`."""
        state = super().reset(state, params)
        if self.gamma == 0:
            return state
        return state.update(metadata={"w_star": ema.distilled_start(params)})

    def estimate(self, state: BilevelState, task: Task) -> Estimate:
        """Return `g_FO` plus the difference quotient in place of `α_t·B_t`."""
        (w, s), lam, train_batch = task.start(state), state.hyperparams, task.train_batch
        inner = self.inner_step(task.train_loss)
        memory: dict[str, Any] = {}
        if self.gamma > 0:
            keep = ema.keep_fraction(self.gamma, state.step + 1)
            memory["w_star"] = ema.distilled_point(remembered(state, "w_star"), w, keep)
        elif self.update_fn is None:
            moved, alpha_b = self._moved_with_difference(inner, w, s, lam, train_batch)
            val = validation(task, moved.params, moved.carried, lam)
            return Estimate.of(optax.tree.add(val.direct, alpha_b(val.alpha)), moved, val)
        moved = inner(w, s, lam, train_batch)
        val = validation(task, moved.params, moved.carried, lam)
        at = optax.tree.cast_like(memory.get("w_star", w), w)
        if self.update_fn is None:
            alpha_b = self._moved_with_difference(inner, at, s, lam, train_batch)[1]
        else:
            alpha_b = self._coordinate_difference(inner, at, s, lam, train_batch)
        return Estimate.of(optax.tree.add(val.direct, alpha_b(val.alpha)), moved, val, memory)

    def _moved_with_difference(
        self, inner: InnerStep, w: PyTree, s: Carried, lam: PyTree, batch: PyTree
    ) -> tuple[Moved, Callable[[PyTree], PyTree]]:
        """Take the step from `w`, and return with it `α ↦ α·B` at `w` by eq. 8's difference."""
        moved, gradient, pull = inner.moved_with_pull(w, s, lam, batch)
        objective = inner.objective(s, batch)

        def grad_lambda(w: PyTree) -> PyTree:
            return jax.grad(objective, argnums=1)(w, lam)

        def alpha_b(alpha: PyTree) -> PyTree:
            # u = (∂w_t/∂G)ᵀα; `direct` is the optimizer's own dependence on λ.
            u, loss_bar, direct = pull(alpha)
            if loss_bar is not None:
                direct = optax.tree.add_scale(direct, loss_bar, grad_lambda(w))
            mixed = mixed_difference(objective, w, lam, u, gradient, self.eps)
            return optax.tree.add(mixed, direct)

        return moved, alpha_b

    def _coordinate_difference(
        self, inner: InnerStep, w: PyTree, s: Carried, lam: PyTree, batch: PyTree
    ) -> Callable[[PyTree], PyTree]:
        def phi(lam: PyTree) -> PyTree:
            return inner(w, s, lam, batch).params

        return lambda alpha: coordinate_differences(phi, alpha, lam, self.eps)
