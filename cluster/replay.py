"""A trial computed again from scratch, alone, by the sweep's own program: the same bits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gradhpo.cluster import importing
from gradhpo.cluster.lineage import Turn
from gradhpo.cluster.orders import Spec
from gradhpo.cluster.variant import Variant, by_name
from gradhpo.state import BilevelState, PyTree


class Replay:
    """It runs in every slot of one shard.

    Args:
      spec: what the sweep's workers were told, with the layout that the variant had.
      variant: its number.
      turns: the trial's life.
      load_data: returns what the problem's function gets as `data`.
    """

    def __init__(
        self, spec: Spec, variant: int, turns: Sequence[Turn], load_data: Callable[[], Any]
    ) -> None:
        self._spec, self._number, self._turns, self._load_data = spec, variant, turns, load_data

    def state(self) -> BilevelState:
        """Return its state, NumPy arrays, after its last generation."""
        import jax

        variant = self._variant(self._spec.steps)
        state = variant.zeros()
        for index, turn in enumerate(self._turns):
            state, _ = variant.turn(state, turn.order(self._spec.slots, fresh=index == 0))
        return jax.tree.map(np.asarray, _row(variant, state))

    def trajectory(self) -> dict[str, np.ndarray]:
        """Return the λ that each step was taken with, and that after the last, by dotted name."""
        variant = self._variant(1)
        state, values = variant.zeros(), list[PyTree]()
        for index, turn in enumerate(self._turns):
            order = turn.order(self._spec.slots, fresh=index == 0)
            for _ in range(self._spec.steps):
                values.append(variant.hyperparams_at(state, order))
                state, _ = variant.turn(state, order)
                order = dataclasses.replace(order, fresh=np.zeros_like(order.fresh), changes={})
        values.append(_row(variant, state).hyperparams)
        return by_name(values)

    def _variant(self, steps: int) -> Variant:
        """Return what computes so many steps at a time."""
        importing.extend_path(self._spec.sys_path)
        spec = dataclasses.replace(self._spec, steps=steps)
        variant = Variant(spec, spec.space.variants()[self._number], self._load_data())
        variant.prepare(None)
        return variant


def _row(variant: Variant, state: Any) -> BilevelState:
    """Return slot 0 of a state."""
    return variant.unflatten({n: leaf[0] for n, leaf in variant.take(state, [0]).items()})
