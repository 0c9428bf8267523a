"""The dense layers of a loss, found in its program: `s = aW + b`, whatever framework wrote them.

Nothing is asked of the model: the traced program is replayed, and where an array is multiplied by a
matrix that is a leaf of the weights, the inputs `a` are kept and the outputs `s` can be moved.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jax.tree_util import keystr, tree_flatten_with_path

from gradhpo.dependence import depends
from gradhpo.origins import Joined, Leaf, Origin, Output, followed, whole
from gradhpo.replay import bind
from gradhpo.state import PyTree

_CALLS = {"jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2"}


@dataclasses.dataclass
class Layer:
    """Where a layer's weights are among the leaves, and where its outputs lie."""

    weight: int
    outputs: int
    """How many there are."""
    turned: bool
    """Whether the leaf has the outputs before the inputs."""
    axis: int | None
    """Of `s`: the axis of outputs. None where there is one output, and no axis of it."""
    shape: tuple[int, ...]
    """Of `s`."""
    dtype: Any
    bias: int | None = None


class Pass(NamedTuple):
    """What one evaluation of the loss showed."""

    loss: jax.Array
    inputs: list[jax.Array]
    """`a` of each layer, `(examples, inputs)`."""
    outputs: list[jax.Array]
    """`s` of each layer, without the bias, as far as it was moved."""


class DenseLayers:
    """The dense layers of `function(params)`, in the order in which they are computed.

    Args:
      function: `params -> scalar`; its last layer's outputs must be all that it sees of the others.
      params: a pytree of floating arrays, each the matrix or the bias of one dense layer.

    Raises:
      ValueError: names what is no dense layer's, or a layer that the last one does not see, or that
        the loss sees otherwise too.
    """

    def __init__(self, function: Callable[[PyTree], jax.Array], params: PyTree) -> None:
        self._closed: ClosedJaxpr = jax.make_jaxpr(function)(params)
        paths, self.structure = tree_flatten_with_path(params)
        self.names = [f"params{keystr(path)}" for path, _ in paths]
        self._shapes = [jnp.shape(leaf) for _, leaf in paths]
        self.axes: list[str] = []
        """Of the mesh, over which the examples are spread."""
        self.layers: list[Layer] = []
        jax.eval_shape(lambda params: self(params).loss, params)
        self._check(params)

    def __call__(
        self,
        params: PyTree,
        moves: Sequence[jax.Array] | None = None,
        hold: Collection[int] = (),
    ) -> Pass:
        """Evaluate the loss.

        Args:
          params: the weights.
          moves: what is added to each layer's outputs.
          hold: layers whose outputs, with the bias, are taken for constants.
        """
        leaves = jax.tree.leaves(params)
        biased = [i for i, layer in enumerate(self.layers) if layer.bias is not None]
        replay = _Replay(self._shapes, moves, hold, biased)
        origins = [whole(i, shape) for i, shape in enumerate(self._shapes)]
        outputs, _ = replay.through(self._closed.jaxpr, self._closed.consts, leaves, origins)
        self.layers, self.axes = replay.layers, sorted(replay.spread)
        return Pass(outputs[0], replay.inputs, replay.outputs)

    def still(self) -> list[jax.Array]:
        """Return `moves` of zeros."""
        return [jnp.zeros(layer.shape, layer.dtype) for layer in self.layers]

    def _check(self, params: PyTree) -> None:
        seen = [i for layer in self.layers for i in (layer.weight, layer.bias) if i is not None]
        for i, name in enumerate(self.names):
            if seen.count(i) != 1:
                times = "of no dense layer" if i not in seen else "of several layers"
                raise ValueError(
                    f"{name} of shape {self._shapes[i]} is {times}: each leaf must be the matrix "
                    "or the bias of one, multiplied and added outside of loops and branches"
                )
        if not self.layers:
            raise ValueError("params have no dense layer: there is no leaf")
        self._check_uses(params)
        last = len(self.layers) - 1
        still = jax.eval_shape(self.still)

        def outputs(moves: list[jax.Array]) -> jax.Array:
            return self(params, moves).outputs[last]

        def past_the_last(moves: list[jax.Array]) -> jax.Array:
            return self(params, moves, hold=[last]).loss

        reached, passed = depends(outputs, still), depends(past_the_last, still)
        for i, layer in enumerate(self.layers):
            if not reached[i] or passed[i]:
                how = "otherwise than" if reached[i] else "and not"
                raise ValueError(
                    f"the loss sees the layer of {self.names[layer.weight]} {how} through the last "
                    f"one, of {self.names[self.layers[last].weight]}"
                )

    def _check_uses(self, params: PyTree) -> None:
        """Refuse weights and outputs that reach the loss beside their layer too."""
        every = range(len(self.layers))

        def before_bias(moves: list[jax.Array]) -> PyTree:
            passed = self(params, moves, hold=every)
            return passed.loss, passed.inputs

        beside = depends(before_bias, jax.eval_shape(self.still))
        for layer, found in zip(self.layers, beside, strict=True):
            if found and layer.bias is not None:
                raise ValueError(
                    f"the outputs of the layer of {self.names[layer.weight]} are used without its "
                    f"bias too, {self.names[layer.bias]}"
                )

        beside = depends(lambda params: self(params, hold=every).inputs, params)
        for name, found in zip(self.names, beside, strict=True):
            if found:
                raise ValueError(
                    f"{name} is used otherwise than in its dense layer too, as a tied embedding or "
                    "in a loop: a later layer's inputs depend on it directly"
                )


class _Replay:
    """Evaluates a program, and follows the leaves and the layers' outputs through it."""

    def __init__(
        self,
        shapes: list[tuple[int, ...]],
        moves: Sequence[jax.Array] | None,
        hold: Collection[int],
        biased: Collection[int],
    ) -> None:
        self._shapes, self._moves, self._hold, self._biased = shapes, moves, hold, biased
        self.layers: list[Layer] = []
        self.inputs: list[jax.Array] = []
        self.outputs: list[jax.Array] = []
        self.spread: set[str] = set()

    def through(
        self, jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any], origins: Sequence[Origin]
    ) -> tuple[list[Any], list[Origin]]:
        """Return a program's outputs, and where they come from."""
        values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
        known: dict[Any, Origin] = dict(zip(jaxpr.invars, origins, strict=False))

        def read(atom: Any) -> tuple[Any, Origin]:
            if isinstance(atom, Literal):
                return atom.val, None
            return values[atom], known.get(atom)

        for eqn in jaxpr.eqns:
            pairs = [read(atom) for atom in eqn.invars]
            inputs, here = [value for value, _ in pairs], [origin for _, origin in pairs]
            outputs, there = self._equation(eqn, inputs, here)
            values.update(zip(eqn.outvars, outputs, strict=True))
            known.update(zip(eqn.outvars, there, strict=True))
        ends = [read(atom) for atom in jaxpr.outvars]
        return [value for value, _ in ends], [origin for _, origin in ends]

    def _equation(
        self, eqn: Any, inputs: list[Any], origins: list[Origin]
    ) -> tuple[list[Any], list[Origin]]:
        name: str = eqn.primitive.name
        nothing: list[Origin] = [None] * len(eqn.outvars)
        if not any(origins):
            return bind(eqn, inputs), nothing
        if name in _CALLS and (body := eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))):
            # From jax 0.12 on there is one class of both, which has constants or none.
            jaxpr = body.jaxpr if isinstance(body, ClosedJaxpr) else body
            return self.through(jaxpr, getattr(body, "consts", []), inputs, origins)
        outputs = bind(eqn, inputs)
        if name == "dot_general" and (made := self._layer(eqn, inputs, origins)):
            return [self._moved(outputs[0])], [made]
        if name in ("add", "add_any") and (made := self._with_bias(origins)):
            held = made.layer in self._hold
            return [jax.lax.stop_gradient(outputs[0]) if held else outputs[0]], [made]
        if name == "spread" and any(isinstance(origin, Leaf | Joined) for origin in origins):
            self.spread.add(eqn.params["axes"])
        return outputs, [followed(eqn, origins, self._shapes), *nothing[1:]]

    def _layer(self, eqn: Any, inputs: list[Any], origins: list[Origin]) -> Output | None:
        (contracted, batched) = eqn.params["dimension_numbers"]
        of_leaves = [isinstance(origin, Leaf) for origin in origins]
        if all(of_leaves) or any(map(len, batched)) or len(contracted[0]) != 1:
            return None  # a product of leaves is a penalty's, such as b·b
        for side, origin in enumerate(origins):
            own = tuple(eqn.invars[side].aval.shape)
            if not isinstance(origin, Leaf) or len(own) > 2:
                continue
            if math.prod(own) != math.prod(self._shapes[origin.place]):  # some of it is repeated
                continue
            x, along = inputs[1 - side], contracted[1 - side][0]
            out, axis, outputs, turned = eqn.outvars[0].aval, None, 1, False
            if len(own) == 2:
                inner, outer = contracted[side][0], 1 - contracted[side][0]
                axis, outputs = 0 if side == 0 else len(out.shape) - 1, own[outer]
                before, after = origin.axes[outer], origin.axes[inner]
                turned = before is not None and after is not None and before < after
            made = Layer(origin.place, outputs, turned, axis, tuple(out.shape), out.dtype)
            self.layers.append(made)
            self.inputs.append(jnp.moveaxis(x, along, -1).reshape(-1, x.shape[along]))
            return Output(len(self.layers) - 1, None if outputs == 1 else axis)
        return None

    def _moved(self, outputs: jax.Array) -> jax.Array:
        here = len(self.layers) - 1
        if self._moves is not None:
            outputs = outputs + self._moves[here].astype(outputs.dtype)
        if here in self._hold and here not in self._biased:
            outputs = jax.lax.stop_gradient(outputs)
        self.outputs.append(outputs)
        return outputs

    def _with_bias(self, origins: list[Origin]) -> Output | None:
        """Return the layer to whose outputs a bias is added, now known to have it."""
        for output, leaf in (origins, origins[::-1]):
            if not isinstance(output, Output) or not isinstance(leaf, Leaf):
                continue
            alone = [axis for axis, own in enumerate(leaf.axes) if own is not None]
            layer, size = self.layers[output.layer], math.prod(self._shapes[leaf.place])
            wanted = [] if output.axis is None else [output.axis]
            if alone == wanted and size == layer.outputs and layer.bias is None:
                layer.bias = leaf.place
                return output
        return None
