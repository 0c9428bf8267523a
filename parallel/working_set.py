"""How much memory a step of one slot works on, by its program."""

from __future__ import annotations

import math
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr

from gradhpo.convolutions import equations
from gradhpo.state import PyTree


def slot_bytes(program: ClosedJaxpr, state: PyTree, slots: int, own: int) -> float:
    """Return the bytes of a slot's state, and of the largest array that a step makes for a slot.

    Args:
      program: a few steps of all slots of a device at once: their arrays have an axis of them.
      state: with a leading slot axis; shapes are enough.
      slots: how many.
      own: of them, one device's.
    """
    made = (var.aval for eqn in equations(program.jaxpr) for var in eqn.outvars)
    sizes = [_bytes(aval) for aval in made if own in getattr(aval, "shape", ())]
    return sum(map(_bytes, jax.tree.leaves(state))) / slots + max(sizes, default=0) / own


def _bytes(array: Any) -> int:
    size = getattr(array.dtype, "itemsize", 4)
    return math.prod(array.shape) * size
