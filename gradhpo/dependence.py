"""What a function's outputs depend on, coordinate by coordinate, read from its jaxpr.

Nothing is computed. A dependence goes through an operation from each input to each output, but for
operations that move single elements or act on them one by one, through which elements are followed:
`λ[0]` is told from `λ[1]` behind `jnp.exp(λ)` or `ravel_pytree` too.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from gradhpo.state import PyTree

FOLLOWED = 1024
"""Elements of a leaf that are told from one another; those of a larger leaf are one source."""
MOST_ELEMENTS = 2**16
"""Of an array whose elements are followed at all; a larger one passes all of its sources on."""

Sources: TypeAlias = "int | np.ndarray"
"""Where a value comes from: a set of sources, as the bits of an integer, that each of its elements
may come from; or an array of its shape, with the one source of each element, and -1 for none."""

_NO_DERIVATIVE = {"stop_gradient", "floor", "ceil", "round", "sign"}
_ELEMENTWISE = {
    *("abs", "add", "add_any", "cbrt", "copy", "copy_p", "cos", "cosh", "div", "erf", "erfc"),
    *("exp", "exp2", "expm1", "integer_pow", "log", "log1p", "logistic", "max", "min", "mul"),
    *("convert_element_type", "neg", "pow", "reduce_precision", "rsqrt", "sin", "sinh", "sqrt"),
    *("square", "sub", "tan", "tanh"),
    *("spread", "gather_sum"),  # of data parallelism, which joins leaves into one vector
}


def depends(
    function: Callable[..., PyTree], argument: PyTree, *rest: Any, derivative: bool = True
) -> list[bool]:
    """Return for each leaf of `argument` whether `function(argument, *rest)` depends on it.

    Args:
      function: of `argument` and `rest`, traceable; it may close over traced arrays.
      argument: a pytree of arrays, or of their shapes and dtypes.
      rest: pytrees of arrays, or of their shapes and dtypes.
      derivative: whether only a derivative counts, which does not go through `stop_gradient`, a
        comparison, rounding or integers; otherwise values count.
    """
    by_coordinate = depends_by_coordinate(function, argument, *rest, derivative=derivative)
    return [bool(here.any()) for here in by_coordinate]


def depends_by_coordinate(
    function: Callable[..., PyTree], argument: PyTree, *rest: Any, derivative: bool = True
) -> list[np.ndarray]:
    """Return for each leaf of `argument` which of its coordinates `function` depends on.

    Args:
      function: as for `depends`.
      argument: as for `depends`.
      rest: as for `depends`.
      derivative: as for `depends`.

    Returns:
      An array of bools of each leaf's shape. A leaf of more than `FOLLOWED` elements is followed as
      a whole: True everywhere or nowhere.
    """
    leaves, ids, first = jax.tree.leaves(argument), list[np.ndarray](), 0
    for leaf in leaves:
        shape, size = jnp.shape(leaf), math.prod(jnp.shape(leaf))
        followed = size <= FOLLOWED
        ids.append(first + np.arange(size).reshape(shape) if followed else np.asarray(first))
        first += size if followed else 1
    found = _union(_followed(function, (argument, *rest), ids, derivative))
    present = np.array([found >> i & 1 for i in range(first)], bool)
    return [
        np.broadcast_to(present[here], jnp.shape(leaf))
        for here, leaf in zip(ids, leaves, strict=True)
    ]


def influences(
    function: Callable[..., PyTree], arguments: Sequence[Any], *, derivative: bool = True
) -> list[set[int]]:
    """Return for each leaf of `function(*arguments)` on which leaves of `arguments` it depends.

    Args:
      function: traceable; it may close over traced arrays.
      arguments: pytrees of arrays, or of their shapes and dtypes.
      derivative: as for `depends`; counts, flags and keys are then on neither side.
    """
    leaves = jax.tree.leaves(tuple(arguments))
    counts = [not derivative or jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in leaves]
    ids = [np.asarray(i if c else -1) for i, c in enumerate(counts)]
    found = [_union([sources]) for sources in _followed(function, arguments, ids, derivative)]
    return [{i for i in range(len(leaves)) if bits >> i & 1} for bits in found]


def dependents(
    function: Callable[..., PyTree], argument: PyTree, *rest: Any, derivative: bool = True
) -> list[bool]:
    """Return for each leaf of `function(argument, *rest)` whether it depends on `argument`.

    As `depends`, seen from the other end: by derivatives, so counts, flags and keys do not; or by
    values.
    """
    ids = [np.zeros((), int)] * len(jax.tree.leaves(argument))
    found = _followed(function, (argument, *rest), ids, derivative)
    return [_union([sources]) > 0 for sources in found]


def _followed(
    function: Callable[..., PyTree],
    arguments: Sequence[Any],
    ids: Sequence[np.ndarray],
    derivative: bool,
) -> list[Sources]:
    """Return the sources of the outputs, `ids` being those of the first leaves of the arguments.

    Each is an array of a leaf's shape, or of one source for all of its elements.
    """
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    inputs: list[Sources] = [0] * len(jaxpr.invars)
    for i, (var, of_leaf) in enumerate(zip(jaxpr.invars, ids, strict=False)):
        small = math.prod(var.aval.shape) <= MOST_ELEMENTS
        inputs[i] = np.broadcast_to(of_leaf, var.aval.shape) if small else _union([of_leaf])
    flow = _Flow(derivative)
    outputs = flow.through(jaxpr, inputs)
    return [_union(inputs)] * len(outputs) if flow.lost else outputs


class _Flow:
    """Follows sources through a jaxpr: of derivatives, or of values."""

    def __init__(self, derivative: bool) -> None:
        self.derivative = derivative
        self.lost = False
        """Whether values went through a mutable reference, where they are not followed."""

    def through(self, jaxpr: Jaxpr, inputs: Sequence[Sources]) -> list[Sources]:
        """Return the sources of a jaxpr's outputs, from those of its inputs."""
        known: dict[Any, Sources] = dict(zip(jaxpr.invars, inputs, strict=True))

        def read(atom: Any) -> Sources:
            return 0 if isinstance(atom, Literal) else known.get(atom, 0)

        for eqn in jaxpr.eqns:
            self.lost |= any(hasattr(atom.aval, "inner_aval") for atom in eqn.invars)
            outputs = self._equation(eqn, [read(atom) for atom in eqn.invars])
            known.update(
                (var, sources if self._passes(var.aval) else 0)
                for var, sources in zip(eqn.outvars, outputs, strict=True)
            )
        return [read(atom) for atom in jaxpr.outvars]

    def _passes(self, aval: Any) -> bool:
        return not self.derivative or jnp.issubdtype(aval.dtype, jnp.inexact)

    def _equation(self, eqn: Any, inputs: list[Sources]) -> Sequence[Sources]:
        name = eqn.primitive.name
        nothing = all(isinstance(sources, int) and not sources for sources in inputs)
        outputs: Sequence[Sources] | None
        # A derivative leads through 0 times λ, and a value does not.
        nothing |= not self.derivative and name == "mul" and any(map(_is_zero, eqn.invars))
        if nothing or (name in _NO_DERIVATIVE and self.derivative):
            outputs = [0] * len(eqn.outvars)
        elif name in ("scan", "while", "cond"):
            outputs = {"scan": self._scan, "while": self._while, "cond": self._cond}[name](
                eqn, inputs
            )
        elif (body := _body(eqn)) is not None:
            # The body of a `shard_map` sees parts of its inputs.
            pairs = zip(inputs, zip(eqn.invars, body.invars, strict=True), strict=True)
            outputs = self.through(body, [s if _alike(pair) else _union([s]) for s, pair in pairs])
            if name.startswith("custom_") and _union(outputs) != _union(inputs):
                outputs = None  # its own rule may lead where its body does not: a rounding, say
        else:
            outputs = _elements(eqn, inputs)
        return [_union(inputs)] * len(eqn.outvars) if outputs is None else outputs

    def _cond(self, eqn: Any, inputs: list[Sources]) -> list[Sources]:
        branches = [self.through(b.jaxpr, inputs[1:]) for b in eqn.params["branches"]]
        chosen = 0 if self.derivative else _union(inputs[:1])
        return [_union(parts) | chosen for parts in zip(*branches, strict=True)]

    def _scan(self, eqn: Any, inputs: list[Sources]) -> list[Sources]:
        body = eqn.params["jaxpr"].jaxpr
        # What is scanned over has one axis more outside; the parameters that say so vary with JAX.
        rows = sum(not _alike(pair) for pair in zip(eqn.invars, body.invars, strict=True))
        carried = sum(_alike(pair) for pair in zip(eqn.outvars, body.outvars, strict=True))
        consts = len(inputs) - carried - rows
        # An iteration sees a slice of what is scanned over: any of its elements.
        sets: list[Sources] = [_union([sources]) for sources in inputs]

        def iteration(carry: list[Sources]) -> list[Sources]:
            return self.through(body, [*inputs[:consts], *carry, *sets[consts + carried :]])

        carry = self._until_same(sets[consts:][:carried], iteration)
        return [*carry, *(_union([sources]) for sources in iteration(carry)[carried:])]

    def _while(self, eqn: Any, inputs: list[Sources]) -> list[Sources]:
        of_test, of_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        fixed = inputs[of_test:][:of_body]
        carry: list[Sources] = [_union([sources]) for sources in inputs[of_test + of_body :]]
        body, test = eqn.params["body_jaxpr"].jaxpr, eqn.params["cond_jaxpr"].jaxpr
        carry = self._until_same(carry, lambda carry: self.through(body, [*fixed, *carry]))
        lasts = 0 if self.derivative else _union(self.through(test, [*inputs[:of_test], *carry]))
        return [_union([sources]) | lasts for sources in carry]

    @staticmethod
    def _until_same(
        carry: list[Sources], body: Callable[[list[Sources]], list[Sources]]
    ) -> list[Sources]:
        """Return what a loop's carry may come from after any number of iterations."""
        while True:
            after = body(carry)
            more: list[Sources] = [_union(pair) for pair in zip(carry, after, strict=False)]
            if more == carry:
                return carry
            carry = more


def _union(all_sources: Sequence[Sources]) -> int:
    bits = 0
    for sources in all_sources:
        if isinstance(sources, int):
            bits |= sources
        else:
            for source in np.unique(sources[sources >= 0]):
                bits |= 1 << int(source)
    return bits


def _body(eqn: Any) -> Jaxpr | None:
    """Return the jaxpr that an operation calls with its own inputs, where it calls just one."""
    bodies = [
        value.jaxpr if isinstance(value, ClosedJaxpr) else value
        for value in eqn.params.values()
        if isinstance(value, ClosedJaxpr | Jaxpr)
    ]
    fits = [
        body
        for body in bodies
        if (len(body.invars), len(body.outvars)) == (len(eqn.invars), len(eqn.outvars))
    ]
    return fits[0] if len(bodies) == len(fits) == 1 else None


def _is_zero(atom: Any) -> bool:
    return isinstance(atom, Literal) and np.shape(atom.val) == () and bool(atom.val == 0)


def _alike(pair: tuple[Any, Any]) -> bool:
    """Whether two variables have the same shape."""
    return pair[0].aval.shape == pair[1].aval.shape


def _elements(eqn: Any, inputs: list[Sources]) -> Sequence[Sources] | None:
    """Return the sources of an operation that moves single elements or acts on each; or None."""
    sizes = [math.prod(atom.aval.shape) for atom in [*eqn.invars, *eqn.outvars]]
    if max(sizes) > MOST_ELEMENTS or all(isinstance(sources, int) for sources in inputs):
        return None
    given: list[np.ndarray] = []
    for atom, sources in zip(eqn.invars, inputs, strict=True):
        if isinstance(sources, int) and sources:
            return None
        given.append(np.full(atom.aval.shape, -1) if isinstance(sources, int) else sources)
    name, shapes = eqn.primitive.name, [var.aval.shape for var in eqn.outvars]
    if name in _ELEMENTWISE:
        spread = [np.broadcast_to(sources, shapes[0]) for sources in given]
        highest = functools.reduce(np.maximum, spread)
        single = all(((s == highest) | (s < 0)).all() for s in spread)
        return [highest] if single else None
    if name == "concatenate":
        return [np.concatenate(given, eqn.params["dimension"])]
    move = _MOVES.get(name)
    return move(given[0], shapes[0], eqn.params) if move and len(given) == 1 else None


def _slice(x: np.ndarray, shape: tuple[int, ...], params: dict[str, Any]) -> list[np.ndarray]:
    del shape
    ends = zip(params["start_indices"], params["limit_indices"], strict=True)
    strides = params["strides"] or [1] * x.ndim
    return [x[tuple(slice(*pair, step) for pair, step in zip(ends, strides, strict=True))]]


def _broadcast(x: np.ndarray, shape: tuple[int, ...], params: dict[str, Any]) -> list[np.ndarray]:
    kept = dict(zip(params["broadcast_dimensions"], x.shape, strict=True))
    return [np.broadcast_to(x.reshape([kept.get(i, 1) for i in range(len(shape))]), shape)]


_MOVES: dict[str, Callable[[np.ndarray, tuple[int, ...], dict[str, Any]], list[np.ndarray]]] = {
    "broadcast_in_dim": _broadcast,
    "reshape": lambda x, shape, _: [x.reshape(shape)],
    "rev": lambda x, _, params: [np.flip(x, params["dimensions"])],
    "slice": _slice,
    "split": lambda x, _, params: np.split(x, np.cumsum(params["sizes"])[:-1], params["axis"]),
    "squeeze": lambda x, shape, _: [x.reshape(shape)],
    "transpose": lambda x, _, params: [x.transpose(params["permutation"])],
    "unstack": lambda x, _, params: list(np.moveaxis(x, params["axis"], 0)),
}
