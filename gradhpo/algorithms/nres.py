"""NRES: noise-reuse evolution strategies (Li et al., NeurIPS 2023).

`g_t = Σ_i (L_t(λ + ε_i) - L_t(λ - ε_i)) ε_i / 2σ²N`: PES with one ε for all windows of an episode,
so that nothing adds up.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from gradhpo.evolution import EvolutionMethod
from gradhpo.state import PyTree


@dataclass(frozen=True)
class NRESOptimizer(EvolutionMethod):
    """Noise-reuse evolution strategies: as PES, with perturbations that stay for an episode.

    Every particle has weights of its own, which last until the episode ends (`episode_length` of
    `solve` and of populations, T of `run`, both in windows), and one perturbation for all of it.
    What it smooths is λ moved once, not anew in each window; the variance does not grow with the
    number of windows. It needs episodes: without, the first draw decides all. `metadata` holds
    `particles` and `perturbations` (ε).

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
      Li et al., Variance-Reduced Gradient Estimation via Noise-Reuse in Online Evolution
      Strategies, NeurIPS 2023.
    """

    persists = True

    def perturbation(
        self, fresh: PyTree, before: PyTree, begins: jax.Array
    ) -> tuple[PyTree, PyTree]:
        """Return a fresh ε, twice."""
        """Return the episode's ε, twice: a fresh one where it begins."""
        kept = jax.tree.map(lambda e, x: jnp.where(begins, e, x), fresh, before)
        return kept, kept
