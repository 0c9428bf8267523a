"""FG²U: forward gradients through T inner steps (Shen et al., NeurIPS 2024).

`g = Σ_i ⟨dL_val(w_T(λ), λ)/dλ, v_i⟩ v_i / b`, v_i of random signs; the product is one directional
derivative, which goes along with the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import optax
from jax.sharding import Mesh

from gradhpo.drawing import DrawingMethod
from gradhpo.errors import check_count
from gradhpo.forward_mode import refuse_custom_vjp
from gradhpo.hypergradient import Validation, at_least_float32
from gradhpo.optimizer import Estimate
from gradhpo.state import BilevelState, PyTree
from gradhpo.task import Task


@dataclass(frozen=True)
class ForwardGradientOptimizer(DrawingMethod):
    """Forward gradients: the exact hypergradient through T inner steps along random directions.

    Unbiased, in memory that grows neither with T nor with dim(λ): beside the weights go their
    tangents, one set for each direction of a chunk. The relative variance is about dim(λ) / b. Only
    forward mode is used: an `update_fn` may hold a `while_loop`.

    Args:
      inner_optimizer: an `optax.GradientTransformation`, or a function of λ that returns one.
      outer_optimizer: an `optax.GradientTransformation` for λ, in place of `lr_hyper`. Directions
        are 0 in leaves of λ that it does not move.
      unroll_steps: T, the inner steps in one step.
      directions: b, how many directions are drawn in a step.
      update_fn: `(params, hyperparams, batch) -> params`, in place of `inner_optimizer`.
      batches: "repeat" takes `train_batch` at all T steps; "stack" takes a stack of batches with
        a leading axis of length T, one for each.
      through_model_state: whether what the losses remember is differentiated too, exactly, from the
        first step's on; otherwise it is a constant of each step.
      chunk: how many directions are taken at once; by default all.
      mesh: whose devices along `axis` each take a part of the directions; `parallel.make_mesh`
        makes one.
      axis: of the mesh.

    Raises:
      ValueError: if neither or both of `inner_optimizer` and `update_fn` are given, or a number
        is out of range, or directions cannot be laid out so.

    References:
      Shen et al., Memory-Efficient Gradient Unrolling for Large-Scale Bi-level Optimization,
      NeurIPS 2024. Baydin et al., Gradients without Backpropagation, 2022.
    """

    inner_optimizer: Any = None
    outer_optimizer: Any = None
    unroll_steps: int = 1
    directions: int = 1
    update_fn: Callable[..., Any] | None = None
    batches: Literal["repeat", "stack"] = "repeat"
    through_model_state: bool = False
    chunk: int | None = None
    mesh: Mesh | None = None
    axis: str = "trial"

    def __post_init__(self) -> None:
        check_count("directions", self.directions)
        super().__post_init__()

    @property
    def drawn(self) -> tuple[str, int]:
        """Directions."""
        return "directions", self.directions

    def estimate(self, state: BilevelState, task: Task) -> Estimate:
        """Return the mean of the directions' estimates, with `w_T`."""
        inner, lam = self.inner_step(task.train_loss), state.hyperparams
        moved = self.unroll(inner, state, task, lam)
        loss, metrics = task.validate(moved.params, moved.carried, lam)
        val = Validation(loss, None, None, metrics)
        mean, memory = self.averaged(self._along, state, task)
        return Estimate.of(optax.tree.cast_like(mean, lam), moved, val, memory)

    def _along(
        self, key: jax.Array, kept: dict[str, Any], state: BilevelState, task: Task
    ) -> tuple[PyTree, dict[str, Any]]:
        """Return the hypergradient's part along one direction."""
        inner, lam = self.inner_step(task.train_loss), state.hyperparams
        direction = self.draw(key, lam, jax.random.rademacher)

        def objective(lam: PyTree) -> jax.Array:
            there = self.unroll(inner.differentiable, state, task, lam)
            return task.validate(there.params, there.carried, lam)[0]

        def slope(lam: PyTree) -> jax.Array:
            return jax.jvp(objective, (lam,), (direction,))[1]

        refuse_custom_vjp("ForwardGradientOptimizer", "UnrolledOptimizer", slope, lam)
        return optax.tree.scale(at_least_float32(slope(lam)), at_least_float32(direction)), kept
