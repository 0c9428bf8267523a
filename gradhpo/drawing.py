"""What the methods share that draw at random: a key in the state, and how they are laid out."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gradhpo.particles import check_layout, placed, summed
from gradhpo.state import BilevelState, PyTree, prepare, remembered
from gradhpo.task import Task, typed_key
from gradhpo.unrolling import UnrollingMethod

Sampler = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]
"""`(key, shape, dtype) -> array`, as those of `jax.random`."""


class DrawingMethod(UnrollingMethod):
    """A method that averages over draws, each of which takes the inner steps on its own.

    `metadata` holds `key`, from which each step draws, so that a state says all of what comes.
    """

    chunk: int | None = None
    mesh: Mesh | None = None
    axis: str = "trial"

    draws = True
    keeps: tuple[str, ...] = ()
    """The names of `memory`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        name, count = self.drawn
        check_layout(name, count, self.chunk, self.mesh, self.axis)

    @property
    @abc.abstractmethod
    def drawn(self) -> tuple[str, int]:
        """What is drawn at a step, and how many."""

    def memory(self, state: BilevelState) -> dict[str, Any]:
        """Return what the draws keep from step to step, with a leading axis of them."""
        del state
        return {}

    def init(
        self,
        params: PyTree,
        hyperparams: PyTree,
        *,
        model_state: PyTree = None,
        key: jax.Array | None = None,
    ) -> BilevelState:
        """Return the state before the first step; see `BilevelOptimizer.init`.

        Args:
          params: weights, a pytree of floating arrays.
          hyperparams: hyperparameters, a pytree of floating arrays.
          model_state: what the losses remember, a pytree of arrays, for losses that take it.
          key: decides all draws; by default `jax.random.key(0)`.
        """
        key = jax.random.key(0) if key is None else typed_key("key", key)
        state = super().init(params, hyperparams, model_state=model_state)
        state = placed(prepare(state.update(metadata={"key": key})), self.mesh)
        return state.update(metadata=placed(self.memory(state), self.mesh, self.axis))

    def averaged(
        self,
        function: Callable[[jax.Array, PyTree, BilevelState, Task], tuple[PyTree, PyTree]],
        state: BilevelState,
        task: Task,
    ) -> tuple[PyTree, dict[str, Any]]:
        """Return the mean of what `function` first returns for each draw, and the new memory.

        Args:
          function: `(key, kept, state, task) -> (estimate, kept)`, of one draw's key and what it
            keeps, as in `memory`; traceable.
          state: without anything that the draws keep.
          task: as it is given to a step.
        """
        key, now = jax.random.split(remembered(state, "key"))
        count = self.drawn[1]
        kept = {name: remembered(state, name) for name in self.keeps}

        def one(own: Any, shared: Any) -> tuple[PyTree, PyTree]:
            return function(*own, *shared)

        own = (jax.random.split(now, count), kept)
        shared = (dataclasses.replace(state, metadata={}), task)
        total, kept = summed(one, own, shared, self.chunk, self.mesh, self.axis)
        mean = jax.tree.map(lambda x: x / count, total)
        return mean, {"key": key, **kept}

    def draw(self, key: jax.Array, hyperparams: PyTree, sampler: Sampler) -> PyTree:
        """Return a tree shaped like λ of draws; 0 for leaves that no hypergradient moves."""
        leaves, structure = jax.tree.flatten(hyperparams)
        keys = jax.random.split(key, len(leaves))
        moving = self._tuned(hyperparams)
        return structure.unflatten(
            sampler(key, leaf.shape, leaf.dtype) if moves else jnp.zeros_like(leaf)
            for key, leaf, moves in zip(keys, leaves, moving, strict=True)
        )
