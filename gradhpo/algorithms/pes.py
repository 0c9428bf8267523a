"""PES: persistent evolution strategies (Vicol, Metz and Sohl-Dickstein, ICML 2021).

`g_t = Σ_i (L_t(λ + ε_ti) - L_t(λ - ε_ti)) ξ_ti / 2σ²N`, `ξ_ti = ε_1i + … + ε_ti`: a particle goes
on from where its own perturbations have led it, and their sum weights what it finds.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from gradhpo.evolution import EvolutionMethod
from gradhpo.state import PyTree


@dataclass(frozen=True)
class PESOptimizer(EvolutionMethod):
    """Persistent evolution strategies: the gradient of a long horizon, in windows of K inner steps.

    Every particle has weights of its own, which last until the episode ends (`episode_length` of
    `solve` and of populations, T of `run`, both in windows): the estimate of a window counts what λ
    did in all windows since the episode began, without bias while λ stands still. Its variance
    grows with their number. `metadata` holds `particles` and `perturbations` (ξ).

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
      Vicol, Metz and Sohl-Dickstein, Unbiased Gradient Estimation in Unrolled Computation Graphs
      with Persistent Evolution Strategies, ICML 2021, Algorithm 2.
    """

    persists = True

    def perturbation(
        self, fresh: PyTree, before: PyTree, begins: jax.Array
    ) -> tuple[PyTree, PyTree]:
        """Return a fresh ε, and ξ, its sum with those of the windows before."""
        total = jax.tree.map(lambda e, x: e + jnp.where(begins, 0, x), fresh, before)
        return fresh, total
