"""Where values of a program come from: a leaf of the weights, or the outputs of a dense layer.

Followed through operations that move elements and change none: a leaf that is transposed, repeated
along an axis, or joined with others into one vector and cut out again, as data parallelism does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple


class Leaf(NamedTuple):
    """A value that is a leaf: for each of its axes the leaf's, or None where it is repeated.

    None too for an axis of length 1, which moves no element wherever it goes.
    """

    place: int
    axes: tuple[int | None, ...]


class Joined(NamedTuple):
    """A vector of whole leaves, one behind the other."""

    places: tuple[int, ...]


class Output(NamedTuple):
    """The outputs of a layer; `axis` has one element for each. None: there is one output."""

    layer: int
    axis: int | None


Origin = Leaf | Joined | Output | None
Shapes = Sequence[tuple[int, ...]]


def whole(place: int, shape: Sequence[int]) -> Leaf:
    """Return a leaf as it is."""
    return Leaf(place, tuple(None if n == 1 else axis for axis, n in enumerate(shape)))


def followed(eqn: Any, origins: Sequence[Origin], shapes: Shapes) -> Origin:
    """Return where an equation's first output comes from; `shapes` are the leaves'."""
    rule = _RULES.get(eqn.primitive.name)
    return None if rule is None else rule(eqn, origins, shapes)


def _same(eqn: Any, origins: Sequence[Origin], shapes: Shapes) -> Origin:
    del eqn, shapes
    return origins[0]


def _concatenated(eqn: Any, origins: Sequence[Origin], shapes: Shapes) -> Origin:
    places: tuple[int, ...] = ()
    for atom, origin in zip(eqn.invars, origins, strict=True):
        vector = _as_vector(origin, atom.aval.shape, shapes)
        if vector is None:
            return None
        places += vector.places
    return Joined(places)


def _transposed(eqn: Any, origins: Sequence[Origin], shapes: Shapes) -> Origin:
    del shapes
    return _with_axes(origins[0], list(eqn.params["permutation"]))


def _broadcast(eqn: Any, origins: Sequence[Origin], shapes: Shapes) -> Origin:
    del shapes
    before, after = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    axes: list[int | None] = [None] * len(after)
    for i, place in enumerate(eqn.params["broadcast_dimensions"]):
        axes[place] = i if before[i] == after[place] else None
    return _with_axes(origins[0], axes)


def _reshaped(eqn: Any, origins: Sequence[Origin], shapes: Shapes) -> Origin:
    origin = origins[0]
    before, after = tuple(eqn.invars[0].aval.shape), tuple(eqn.outvars[0].aval.shape)
    if isinstance(origin, Joined):
        alone = len(origin.places) == 1 and after == shapes[origin.places[0]]
        return whole(origin.places[0], after) if alone else None
    if [n for n in before if n != 1] == [n for n in after if n != 1]:
        left = iter([i for i, n in enumerate(before) if n != 1])
        return _with_axes(origin, [None if n == 1 else next(left) for n in after])
    if isinstance(origin, Output):  # examples along several axes, or along one again
        last = origin.axis == len(before) - 1 and after[-1:] == before[-1:]
        return Output(origin.layer, len(after) - 1) if last else _with_axes(origin, [])
    return _as_vector(origin, before, shapes) if len(after) == 1 else None


def _cut(eqn: Any, origins: Sequence[Origin], shapes: Shapes) -> Origin:
    origin = origins[0]
    if not isinstance(origin, Joined) or eqn.params["strides"] is not None:
        return None
    ends = [0, *accumulate(math.prod(shapes[i]) for i in origin.places)]
    bounds = eqn.params["start_indices"][0], eqn.params["limit_indices"][0]
    if not set(bounds) <= set(ends):
        return None
    places = origin.places[slice(*map(ends.index, bounds))]
    vector = len(places) == 1 and len(shapes[places[0]]) == 1
    return whole(places[0], shapes[places[0]]) if vector else Joined(places)


def _as_vector(origin: Origin, shape: Sequence[int], shapes: Shapes) -> Joined | None:
    """Return a leaf whose elements are in their order, whatever its shape, as a vector of one."""
    if isinstance(origin, Joined):
        return origin
    if not isinstance(origin, Leaf) or math.prod(shape) != math.prod(shapes[origin.place]):
        return None
    axes = [axis for axis in origin.axes if axis is not None]
    return Joined((origin.place,)) if axes == sorted(axes) else None


def _with_axes(origin: Origin, axes: Sequence[int | None]) -> Origin:
    """Return an origin whose axes are others: for each of before, or None for a new one."""
    if isinstance(origin, Output):
        if origin.axis is None:
            return origin
        return Output(origin.layer, axes.index(origin.axis)) if origin.axis in axes else None
    if not isinstance(origin, Leaf):
        return None
    return Leaf(origin.place, tuple(None if i is None else origin.axes[i] for i in axes))


_Rule = Callable[[Any, Sequence[Origin], Shapes], Origin]
_RULES: dict[str, _Rule] = {
    **dict.fromkeys(("convert_element_type", "copy", "reduce_precision"), _same),
    **dict.fromkeys(("sharding_constraint", "spread"), _same),
    "broadcast_in_dim": _broadcast,
    "concatenate": _concatenated,
    "reshape": _reshaped,
    "slice": _cut,
    "squeeze": _reshaped,
    "transpose": _transposed,
}
