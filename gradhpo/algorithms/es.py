"""ES: truncated evolution strategies; no derivative is taken of the losses in λ.

`g = Σ_i (L(λ + ε_i) - L(λ - ε_i)) ε_i / 2σ²N`, L over K inner steps from the same weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax

from gradhpo.evolution import EvolutionMethod
from gradhpo.state import PyTree


@dataclass(frozen=True)
class ESOptimizer(EvolutionMethod):
    """Truncated evolution strategies: the gradient of the smoothed loss of the next K inner steps.

    All particles start each window from the state's own weights, so what λ did to them before is
    not seen: with K short of the horizon it is as biased as truncated unrolling. Unbiased at K = T.

    Args:
      inner_optimizer: an `optax.GradientTransformation`, or a function of λ that returns one.
      outer_optimizer: an `optax.GradientTransformation` for λ, in place of `lr_hyper`. Leaves of λ
        that it does not move are not perturbed.
      unroll_steps: K, the inner steps in one step.
      particles: how many walk beside the weights, in pairs of opposite perturbations.
      sigma: σ, the standard deviation of the perturbation of each number of λ.
      update_fn: `(params, hyperparams, batch) -> params`, in place of `inner_optimizer`; it need
        not be differentiable, and may hold a `while_loop`.
      batches: "repeat" takes `train_batch` at all K steps; "stack" takes a stack of batches with
        a leading axis of length K, one for each.
      objective: "last" for the validation loss after the K steps; "mean" for the mean of those
        after every one. It may be an accuracy, or any other function without a gradient.
      T: steps in an episode of `run`.
      chunk: how many pairs walk at once; by default all.
      mesh: whose devices along `axis` each take a part of the pairs; `parallel.make_mesh` makes
        one.
      axis: of the mesh.

    Raises:
      ValueError: if neither or both of `inner_optimizer` and `update_fn` are given, or a number
        is out of range, or pairs cannot be laid out so.

    References:
      Metz et al., Understanding and Correcting Pathologies in the Training of Learned Optimizers,
      ICML 2019. Salimans et al., Evolution Strategies as a Scalable Alternative to Reinforcement
      Learning, 2017.
    """

    def perturbation(
        self, fresh: PyTree, before: PyTree, begins: jax.Array
    ) -> tuple[PyTree, PyTree]:
        """Return a fresh ε, twice."""
        del before, begins
        return fresh, fresh
