"""Implicit: the hypergradient at a minimum of the training loss, by the implicit function theorem.

`g = g_FO - α·H⁻¹·∂²L_train/∂w∂λ`, `H = ∂²L_train/∂w²`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import keystr, tree_flatten_with_path

from gradhpo.dependence import depends_by_coordinate
from gradhpo.errors import check_count, check_number
from gradhpo.hypergradient import at_least_float32, norm, second_order, validation
from gradhpo.inner import InnerStep
from gradhpo.optimizer import Estimate
from gradhpo.state import BilevelState, PyTree
from gradhpo.task import Carried, Task
from gradhpo.unrolling import UnrollingMethod


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
      solver: of `H x = α`. "cg": conjugate gradients that make the residual `H x - α` least, also
        known as conjugate residuals, which a singular `H` (more weights than examples) does not
        disturb; they stop at a direction in which `H` is not positive. "neumann": the
        series `x = η Σ_{k<K} (I - ηH)^k α`, which converges for η below 2 over the largest
        eigenvalue. At a minimum it equals K unrolled steps of SGD with rate η.
      K: iterations of "cg" at most, or terms of "neumann".
      neumann_rate: η > 0, required by "neumann".
      update_fn: `(params, hyperparams, batch) -> params`, in place of `inner_optimizer`.
      batches: "repeat" takes `train_batch` at all T steps; "stack" takes a stack of batches with
        a leading axis of length T, one for each.

    Raises:
      ValueError: if neither or both of `inner_optimizer` and `update_fn` are given, or
        `neumann_rate` is missing or has no use; in `step`, if a hyperparameter acts on the weights
        through the inner optimizer or the `update_fn` only.

    References:
      Pedregosa, Hyperparameter Optimization with Approximate Gradient, ICML 2016 (conjugate
      gradients). Stiefel, Relaxationsmethoden bester Strategie zur Lösung linearer
      Gleichungssysteme, Comment. Math. Helv. 29, 1955 (their residual form). Lorraine
      et al., Optimizing Millions of Hyperparameters by Implicit Differentiation, AISTATS 2020,
      Alg. 3 (Neumann).
    """

    inner_optimizer: Any = None
    outer_optimizer: Any = None
    unroll_steps: int = 1
    solver: Literal["cg", "neumann"] = "cg"
    K: int = 10
    neumann_rate: float | None = None
    update_fn: Callable[..., Any] | None = None
    batches: Literal["repeat", "stack"] = "repeat"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("K", self.K)
        if self.solver not in ("cg", "neumann"):
            raise ValueError(f'solver must be "cg" or "neumann", got {self.solver!r}')
        if (self.solver == "neumann") != (self.neumann_rate is not None):
            got = f"solver={self.solver!r} with neumann_rate={self.neumann_rate!r}"
            raise ValueError(f'neumann_rate goes with solver="neumann", which needs it; got {got}')
        if self.neumann_rate is not None:
            eta = check_number("neumann_rate", self.neumann_rate, 0, float("inf"), open_low=True)
            object.__setattr__(self, "neumann_rate", eta)

    def estimate(self, state: BilevelState, task: Task) -> Estimate:
        """Return `g_FO - xᵀ ∂²L_train/∂w∂λ` at `w_T`, `x` the solution of `H x = α`."""
        lam, inner = state.hyperparams, self.inner_step(task.train_loss)
        batch = self.batch_at(task.train_batch)(self.unroll_steps - 1)
        _refuse_unseen(inner, *task.start(state), lam, batch)
        moved = self.unroll(inner, state, task, lam)
        val = validation(task, moved.params, moved.carried, lam)

        objective = inner.objective(moved.carried, batch)

        def gradient(w: PyTree) -> PyTree:
            return jax.grad(objective)(w, lam)

        hessian = jax.linearize(gradient, moved.params)[1]
        if self.neumann_rate is None:
            # For α of length 1, since squares of small numbers are none in low precision.
            length = norm(val.alpha)
            unit = optax.tree.scale(
                jnp.where(length > 0, 1 / jnp.where(length > 0, length, 1), 0), val.alpha
            )
            x = _conjugate_residuals(hessian, optax.tree.cast_like(unit, val.alpha), self.K)
            x = optax.tree.cast_like(optax.tree.scale(length, x), val.alpha)
        else:
            x = _neumann(hessian, val.alpha, self.K, self.neumann_rate)

        point = (moved.params, lam, x, None)
        (mixed,) = second_order(objective, *point, "forward-over-reverse", (1,))
        return Estimate.of(optax.tree.sub(val.direct, mixed), moved, val)


def _neumann(hessian: Callable[[PyTree], PyTree], alpha: PyTree, K: int, eta: float) -> PyTree:
    """Return `η Σ_{k<K} (I - ηH)^k α`."""

    def term(carry: tuple[PyTree, PyTree], _: None) -> tuple[tuple[PyTree, PyTree], None]:
        power, total = carry
        power = optax.tree.add_scale(power, -eta, hessian(power))  # (I - ηH)^k α
        return (power, optax.tree.add(total, power)), None

    (_, total), _ = jax.lax.scan(term, (alpha, alpha), length=K - 1)
    return optax.tree.scale(eta, total)


def _conjugate_residuals(hessian: Callable[[PyTree], PyTree], alpha: PyTree, K: int) -> PyTree:
    """Return `x` with `‖H x - α‖` least over the Krylov space of K products, or fewer.

    Unlike conjugate gradients, which follow the part of α outside of H's range down a slope without
    end, these leave it alone: `xᵀ ∂²L/∂w∂λ` does not see it. They stop where nothing is left of the
    residual but rounding, or that part, or a direction in which H is not positive.
    """
    rounding = max(float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(alpha))
    square = _inner(alpha, alpha)
    negligible = rounding**0.75  # of H's norm: what a product leaves of a vector H maps to 0

    def iteration(carry: Any, _: None) -> tuple[Any, None]:
        x, residual, direction, image, rho, largest, done = carry
        of_residual = hessian(residual)
        rr = _inner(residual, residual)
        stretch = _inner(of_residual, of_residual)
        new_rho = _inner(residual, of_residual)
        largest = jnp.maximum(largest, stretch / jnp.where(rr > 0, rr, 1))
        done |= (rr <= rounding**2 * square) | (stretch <= negligible**2 * largest * rr)
        done |= new_rho <= 0
        turn = jnp.where(done, 0, new_rho / jnp.where(rho > 0, rho, 1))
        direction = _add_scale(residual, turn, direction)
        image = _add_scale(of_residual, turn, image)
        length = _inner(image, image)
        step = jnp.where(done, 0, new_rho / jnp.where(length > 0, length, 1))
        x = _add_scale(x, step, direction)
        residual = _add_scale(residual, -step, image)
        return (x, residual, direction, image, new_rho, largest, done), None

    nothing, zero = optax.tree.zeros_like(alpha), 0 * square
    start = (nothing, alpha, nothing, nothing, zero, zero, square <= 0)
    return jax.lax.scan(iteration, start, length=K)[0][0]


def _inner(a: PyTree, b: PyTree) -> jax.Array:
    """Return the inner product, in float32 or better."""
    return jnp.asarray(optax.tree.vdot(at_least_float32(a), at_least_float32(b)))


def _add_scale(a: PyTree, factor: Any, b: PyTree) -> PyTree:
    return optax.tree.cast_like(optax.tree.add_scale(a, factor, b), a)


def _refuse_unseen(inner: InnerStep, w: PyTree, s: Carried, lam: PyTree, batch: PyTree) -> None:
    """Raise if a coordinate of λ enters the inner step's update, but not the training gradient."""
    loss, _, gradient = jax.eval_shape(inner.gradient, w, s, lam, batch)

    def update(lam: PyTree, gradient: PyTree, loss: Any) -> PyTree:
        if inner.update_fn is not None:
            return inner(w, s, lam, batch).params
        return inner.move(gradient, s.opt_state, w, lam, loss)[0]

    in_update = depends_by_coordinate(update, lam, gradient, loss)
    if not any(here.any() for here in in_update):
        return
    through = "update_fn" if inner.update_fn is not None else "inner_optimizer"
    in_gradient = depends_by_coordinate(lambda lam: inner.gradient(w, s, lam, batch)[2], lam)
    paths = [keystr(path) for path, _ in tree_flatten_with_path(lam)[0]]
    for path, moves, seen in zip(paths, in_update, in_gradient, strict=True):
        for index in np.argwhere(moves & ~seen)[:1].tolist():
            whole = not seen.any() or not index
            raise ValueError(
                f"hyperparams{path}{'' if whole else index} acts on the weights through the "
                f"{through} only: at a minimum of train_loss_fn its implicit gradient is zero. "
                "ImplicitOptimizer needs it in the gradient of train_loss_fn; UnrolledOptimizer "
                "and OneStepOptimizer do not"
            )
