"""What the methods share whose step takes T inner steps and then moves λ once."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp

from gradhpo.errors import check_count, stack_length, warn_user
from gradhpo.inner import Moved
from gradhpo.optimizer import HypergradientMethod
from gradhpo.state import BilevelState, PyTree
from gradhpo.task import Carried, Task

Remat: TypeAlias = Literal["none", "sqrt", "step"]
"""What reverse mode keeps of an unroll: see `UnrolledOptimizer`."""

REMATS = ("none", "sqrt", "step")


class UnrollingMethod(HypergradientMethod):
    """A method whose `step` unrolls `unroll_steps` inner steps; `run` takes one step an episode.

    With `batches="repeat"` the step takes `train_batch` at all T inner steps; with "stack",
    `train_batch` is a stack of batches with a leading axis of length T, one for each.
    """

    unroll_steps: int = 1
    batches: Literal["repeat", "stack"] = "repeat"
    persists: bool = False
    """Whether steps of an episode build on one another: what is unrolled are windows of it."""

    T = 1  # one step an episode: it unrolls the inner steps itself

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("unroll_steps", self.unroll_steps)
        if self.batches not in ("repeat", "stack"):
            raise ValueError(f'batches must be "repeat" or "stack", got {self.batches!r}')

    @property
    def batch_axis(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """1 for a stack of batches, 0 for a batch."""
        return int(self.batches == "stack")

    def batch_at(self, train_batch: PyTree) -> Callable[[Any], PyTree]:
        """Return `t ↦ D_{t+1}`, the batch of the inner step with index t, counted from 0."""
        if self.batches == "repeat":
            return lambda t: train_batch
        stack_length("train_batch", train_batch, expected=self.unroll_steps)
        return lambda t: jax.tree.map(lambda x: x[t], train_batch)

    def check_reach(self, state: BilevelState, task: Task) -> None:
        """Tell of a stack of batches that would be taken as one batch, and what else there is."""
        T, batches = self.unroll_steps, (task.val_batch, task.train_batch)
        if self.batches == "repeat" and T > 1 and _is_stack_of(*batches, T):
            warn_user(
                f"train_batch looks like a stack of {T} batches: it is shaped like val_batch with "
                f'a leading axis of length unroll_steps={T}. batches="repeat" takes all of it at '
                'every inner step; batches="stack" takes one batch a step',
                UserWarning,
            )
        super().check_reach(state, task)

    def unroll(
        self,
        step: Callable[[PyTree, Carried, PyTree, PyTree], Moved],
        state: BilevelState,
        task: Task,
        hyperparams: PyTree,
        remat: Remat = "none",
    ) -> Moved:
        """Take the T inner steps `step(w, s, λ, D)` from the state's weights; a `scan`.

        The loss and metrics returned are those of the last step. `remat` is what reverse mode
        keeps.
        """
        batch_at, T = self.batch_at(task.train_batch), self.unroll_steps

        def body(carry: tuple[PyTree, Carried], t: Any) -> tuple[Any, Any]:
            w, s, *told = step(*carry, hyperparams, batch_at(t))
            return (w, s), told

        def last(told: Any) -> Any:
            return jax.tree.map(lambda rows: rows[-1], told)

        def segment(carry: Any, steps: jax.Array) -> tuple[Any, Any]:
            carry, told = jax.lax.scan(body, carry, steps)
            return carry, last(told)

        if remat == "step":
            body = jax.checkpoint(body, prevent_cse=False)
        start, steps = task.start(state), jnp.arange(T)
        length = math.isqrt(T - 1) + 1  # ⌈√T⌉
        if remat != "sqrt" or length == T:
            carry, told = segment(start, steps)
            return Moved(*carry, *told)
        segment = jax.checkpoint(segment, prevent_cse=False)
        whole = T - T % length
        carry, told = jax.lax.scan(segment, start, steps[:whole].reshape(-1, length))
        if whole == T:
            return Moved(*carry, *last(told))
        carry, told = segment(carry, steps[whole:])
        return Moved(*carry, *told)


def _is_stack_of(one: PyTree, stack: PyTree, length: int) -> bool:
    """Whether each leaf of `stack` has the shape of that of `one` behind an axis of this length.

    False if `one` holds vectors only, which may well be one row of a batch of `length` rows.
    """
    if jax.tree.structure(one) != jax.tree.structure(stack):
        return False
    shapes = [[jnp.shape(leaf) for leaf in jax.tree.leaves(tree)] for tree in (one, stack)]
    rows = any(len(shape) > 1 for shape in shapes[0])
    return rows and all((length, *a) == b for a, b in zip(*shapes, strict=True))
