"""MA-SOBA: SOBA, λ moved by a moving average of its directions (Chen et al. JMLR 2024).

`λ_{k+1} = λ_k - α h_k`, `h_{k+1} = (1 - θ) h_k + θ D_λ`, `D_λ` as in `gradhpo.single_loop`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import optax

from gradhpo.errors import check_number
from gradhpo.hypergradient import at_least_float32
from gradhpo.optimizer import Estimate
from gradhpo.single_loop import SingleLoopMethod
from gradhpo.state import BilevelState, PyTree, prepare, remembered
from gradhpo.task import Task

AVERAGE = "average"
"""What the state keeps: `h`, shaped like λ, in float32 at least."""


@dataclass(frozen=True)
class MASOBAOptimizer(SingleLoopMethod):
    """MA-SOBA: SOBA with its noise averaged over steps, before λ moves.

    `metadata` holds `average` (h) beside what `SOBAOptimizer` keeps. λ moves by the average as it
    is before this step's direction joins it, and it begins at 0: so does what
    `compute_hypergradient` returns, and the first step leaves λ where it is. All else is as in
    `SOBAOptimizer`.

    Args:
      inner_optimizer: an `optax.GradientTransformation`, or a function of λ that returns one. It
        moves the solution of the linear system as well.
      outer_optimizer: an `optax.GradientTransformation` for λ, in place of `lr_hyper`. One without
        momentum, of which the average is one.
      averaging: θ in (0, 1], the weight of a new direction; with 1 the average is the last one.
      linear_optimizer: what moves the solution instead; needed with an `update_fn`.
      update_fn: `(params, hyperparams, batch) -> params`, in place of `inner_optimizer`.
      T: steps in an episode of `run`.

    Raises:
      ValueError: as `SOBAOptimizer`, and if `averaging` is out of range.

    References:
      Chen, Xiao and Balasubramanian, Optimal Algorithms for Stochastic Bilevel Optimization under
      Relaxed Smoothness Conditions, JMLR 25, 2024, Algorithm 1.
    """

    inner_optimizer: Any = None
    outer_optimizer: Any = None
    averaging: float = 0.1
    linear_optimizer: Any = None
    update_fn: Callable[..., Any] | None = None
    T: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        averaging = check_number("averaging", self.averaging, 0, 1, open_low=True)
        object.__setattr__(self, "averaging", averaging)

    def init(
        self, params: PyTree, hyperparams: PyTree, *, model_state: PyTree = None
    ) -> BilevelState:
        """Return the state before the first step, with `h = 0`; see `BilevelOptimizer.init`."""
        state = super().init(params, hyperparams, model_state=model_state)
        nothing = optax.tree.zeros_like(at_least_float32(state.hyperparams))
        return prepare(state.update(metadata={AVERAGE: nothing}))

    def estimate(self, state: BilevelState, task: Task) -> Estimate:
        """Return `h_k`, with `h_{k+1}` in the memory."""
        found, before = self.directions(state, task), remembered(state, AVERAGE)
        after = jax.tree.map(self._mixed, before, found.hypergradient)
        hypergradient = optax.tree.cast_like(before, state.hyperparams)
        memory = {**found.memory, AVERAGE: after}
        return Estimate.of(hypergradient, found.moved, found.val, memory)

    def _mixed(self, h: jax.Array, new: jax.Array) -> jax.Array:
        return (1 - self.averaging) * h + self.averaging * new.astype(h.dtype)
