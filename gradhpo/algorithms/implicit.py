"""Implicit: the hypergradient at a minimum of the training loss, by the implicit function theorem.

`g = g_FO - α·(H + ρI)⁻¹·∂²L_train/∂w∂λ`, `H = ∂²L_train/∂w²`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from gradhpo import kfac
from gradhpo.conjugate_residuals import Operator, conjugate_residuals
from gradhpo.errors import check_count, check_number
from gradhpo.fingerprint import ADDED
from gradhpo.hypergradient import at_least_float32, norm, second_order, validation
from gradhpo.neumann_series import neumann_series
from gradhpo.nystrom import nystrom
from gradhpo.optimizer import Estimate
from gradhpo.state import BilevelState, PyTree, remembered
from gradhpo.task import Task, split_fixed
from gradhpo.unrolling import UnrollingMethod
from gradhpo.unseen import refuse_unseen

SOLVERS = ("cg", "neumann", "nystrom", "kfac")
DAMPED = ("nystrom", "kfac")
SOLUTION = "solution"
"""What a warm start keeps in the state: `x`, shaped like the weights."""


@dataclass(frozen=True)
class ImplicitOptimizer(UnrollingMethod):
    """Implicit differentiation: a step takes T inner steps, and λ moves as if `w_T` were a minimum.

    Exact where `∇_w L_train(w_T, λ) = 0` and the linear system is solved. `H` and the mixed
    derivative are those of the last inner step's training batch. What `train_loss_fn` does not
    show is not seen: a hyperparameter that moves the weights through the inner optimizer (or the
    `update_fn`) only, such as a learning rate, is refused.

    Args:
      inner_optimizer: an `optax.GradientTransformation`, or a function of λ that returns one.
      outer_optimizer: an `optax.GradientTransformation` for λ, in place of `lr_hyper`.
      unroll_steps: T, the inner steps in one step.
      solver: of `(H + ρI) x = α`. "cg": conjugate gradients that make the residual `H x - α` least,
        also known as conjugate residuals, which a singular `H` (more weights than examples) does
        not disturb; they stop at a direction in which `H` is not positive. "neumann": the
        series `x = η Σ_{k<K} (I - ηH)^k α`, which converges for η below 2 over the largest
        eigenvalue. At a minimum it equals K unrolled steps of SGD with rate η. "nystrom": `H` is
        replaced by one of rank K, from its products with K random directions (others at each
        step), and the system solved exactly: as good as `H` has few large eigenvalues. It needs
        memory for 2K copies of the weights. "kfac", where all weights are matrices and biases of
        dense layers: `H` is replaced by Kronecker products, one for each layer, without the
        curvature between layers and that of the layers themselves, for a loss that is a sum over
        examples. It needs the eigenvectors of matrices of a layer's width, and for each example the
        square of the last layer's outputs.
      K: iterations of "cg" at most, terms of "neumann", or the rank of "nystrom": as many products
        with `H`, each of the cost of about two gradients. Of "kfac" the random directions of the
        outputs, each of the cost of a gradient; as many as there are outputs, or more, are exact.
      neumann_rate: η > 0, required by "neumann"; the terms grow where an eigenvalue of `H + ρI` is
        below 0 or above 2/η. Training with momentum can reach the latter at the same η.
      update_fn: `(params, hyperparams, batch) -> params`, in place of `inner_optimizer`.
      batches: "repeat" takes `train_batch` at all T steps; "stack" takes a stack of batches with
        a leading axis of length T, one for each.
      damping: ρ, a ridge on `H`; required by "nystrom" and "kfac". Directions whose curvature is
        far below ρ count as if training had not yet moved along them: `1/ρ` is the length of
        training, its learning rates added up, that the hypergradient looks back on.
      warm_start: start from the solution of the step before, which the state then keeps, and solve
        for what is missing, by one product more, or two with "nystrom" and "kfac". If λ and the
        weights move little between steps, a small K is then enough.

    Raises:
      ValueError: if neither or both of `inner_optimizer` and `update_fn` are given, or
        `neumann_rate` or `damping` is missing, or the former has no use; in `step`, if a
        hyperparameter acts on the weights through the inner optimizer or the `update_fn` only.

    References:
      Pedregosa, Hyperparameter Optimization with Approximate Gradient, ICML 2016 (conjugate
      gradients). Stiefel, Relaxationsmethoden bester Strategie zur Lösung linearer
      Gleichungssysteme, Comment. Math. Helv. 29, 1955 (their residual form). Lorraine
      et al., Optimizing Millions of Hyperparameters by Implicit Differentiation, AISTATS 2020,
      Alg. 3 (Neumann). Hataya & Yamada, Nyström Method for Accurate and Scalable Implicit
      Differentiation, AISTATS 2023 (with columns of H; here, as in Frangella et al., Randomized
      Nyström Preconditioning, SIAM J. Matrix Anal. Appl. 44, 2023, with random directions). Martens
      & Grosse, Optimizing Neural Networks with Kronecker-factored Approximate Curvature, ICML 2015.
    """

    inner_optimizer: Any = None
    outer_optimizer: Any = None
    unroll_steps: int = 1
    solver: Literal["cg", "neumann", "nystrom", "kfac"] = "cg"
    K: int = 10
    neumann_rate: float | None = None
    update_fn: Callable[..., Any] | None = None
    batches: Literal["repeat", "stack"] = "repeat"
    damping: float = field(default=0.0, metadata=ADDED)
    warm_start: bool = field(default=False, metadata=ADDED)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("K", self.K)
        if self.solver not in SOLVERS:
            raise ValueError(f"solver must be one of {SOLVERS}, got {self.solver!r}")
        if (self.solver == "neumann") != (self.neumann_rate is not None):
            got = f"solver={self.solver!r} with neumann_rate={self.neumann_rate!r}"
            raise ValueError(f'neumann_rate goes with solver="neumann", which needs it; got {got}')
        if self.neumann_rate is not None:
            eta = check_number("neumann_rate", self.neumann_rate, 0, float("inf"), open_low=True)
            object.__setattr__(self, "neumann_rate", eta)
        object.__setattr__(self, "damping", check_number("damping", self.damping, 0, float("inf")))
        if self.solver in DAMPED and not self.damping:
            raise ValueError(f'solver="{self.solver}" needs a damping above 0, got 0')
        if not isinstance(self.warm_start, bool):
            raise TypeError(f"warm_start must be True or False, got {self.warm_start!r}")

    def init(
        self, params: PyTree, hyperparams: PyTree, *, model_state: PyTree = None
    ) -> BilevelState:
        """Return the state before the first step; see `BilevelOptimizer.init`."""
        state = super().init(params, hyperparams, model_state=model_state)
        if not self.warm_start:
            return state
        nothing = optax.tree.zeros_like(split_fixed(state.params)[0])
        return state.update(metadata={SOLUTION: nothing})

    def estimate(self, state: BilevelState, task: Task) -> Estimate:
        """Return `g_FO - xᵀ ∂²L_train/∂w∂λ` at `w_T`, `x` the solution of `(H + ρI) x = α`."""
        lam, inner = state.hyperparams, self.inner_step(task.train_loss)
        batch = self.batch_at(task.train_batch)(self.unroll_steps - 1)
        last = dataclasses.replace(task, train_batch=batch)
        refuse_unseen(type(self).__name__, inner, state, last, self._tuned(lam))
        moved = self.unroll(inner, state, task, lam)
        val = validation(task, moved.params, moved.carried, lam)

        objective = inner.objective(moved.carried, batch)

        def gradient(w: PyTree) -> PyTree:
            return jax.grad(objective)(w, lam)

        def loss(w: PyTree) -> jax.Array:
            return objective(w, lam)

        hessian = jax.linearize(gradient, moved.params)[1]
        x = self._solution(
            hessian, self._inverse(hessian, loss, moved.params, state), val.alpha, state
        )
        point = (moved.params, lam, x, None)
        (mixed,) = second_order(objective, *point, "forward-over-reverse", (1,))
        memory = {SOLUTION: x} if self.warm_start else None
        return Estimate.of(optax.tree.sub(val.direct, mixed), moved, val, memory)

    def _solution(
        self, hessian: Operator, inverse: Operator, alpha: PyTree, state: BilevelState
    ) -> PyTree:
        """Return `x`, from nothing or from where the step before left it."""
        if not self.warm_start:
            return inverse(alpha)
        before, damped = remembered(state, SOLUTION), self._damped(hessian)
        missing = optax.tree.sub(alpha, damped(before))
        # An old solution that is worse than none is dropped; so is one that is not finite.
        better = norm(missing) < norm(alpha)
        before = jax.tree.map(lambda x: jnp.where(better, x, 0), before)
        missing = jax.tree.map(lambda r, a: jnp.where(better, r, a), missing, alpha)
        more = inverse(missing)
        if self.solver in DAMPED:  # which is too long where what replaces H lacks a direction
            more = _of_least_residual(damped, more, missing)
        return optax.tree.add(before, more)

    def _inverse(
        self,
        hessian: Operator,
        loss: Callable[[PyTree], jax.Array],
        params: PyTree,
        state: BilevelState,
    ) -> Operator:
        """Return `b ↦ (H + ρI)⁻¹ b`, as the solver has it."""
        damped, rate = self._damped(hessian), self.neumann_rate
        key = jax.random.fold_in(jax.random.key(0), state.step)
        if self.solver == "kfac":
            return kfac.inverse(loss, params, self.K, self.damping, key)
        if self.solver == "nystrom":
            return lambda target: nystrom(hessian, target, self.K, self.damping, key)
        if rate is not None:
            return lambda target: neumann_series(damped, target, self.K, rate)
        return lambda target: conjugate_residuals(damped, target, self.K)

    def _damped(self, hessian: Operator) -> Operator:
        if not self.damping:
            return hessian
        return lambda v: optax.tree.cast_like(optax.tree.add_scale(hessian(v), self.damping, v), v)


def _of_least_residual(operator: Operator, x: PyTree, target: PyTree) -> PyTree:
    """Return `sx` with `‖s A x - b‖` least; a guess that is bettered so comes closer every time."""
    image = at_least_float32(operator(x))
    square = norm(image) ** 2
    along = optax.tree.vdot(image, at_least_float32(target))
    scale = jnp.where(square > 0, along / jnp.where(square > 0, square, 1), 0)
    return optax.tree.cast_like(optax.tree.scale(scale, x), x)
