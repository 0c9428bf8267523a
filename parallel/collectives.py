"""The two linear collectives of data parallelism, and a check of what differs between devices.

`spread` copies a value to all devices, `gather` sums over them, and each is the other's transpose;
JAX's own `psum` under `pmap`, and under `shard_map` without checked axes, transposes to `psum`,
which counts each device once too often where the loss is the same on all. Checked axes have such a
pair, but give each value a type that says whether it varies. A user's loop or branch that starts
from a constant has two types then, and no recurrent network works; here what varies is found after
the program is traced, where it asks nothing of the one who wrote it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr, Literal, Primitive, jaxpr_as_fun, primitives
from jax.interpreters import ad, batching, mlir
from jax.tree_util import keystr, tree_flatten_with_path

from gradhpo.state import PyTree


def spread(tree: PyTree, axis: str) -> PyTree:
    """Return arrays that are the same on all devices, as each device's own."""
    return _as_vectors(functools.partial(_spread_p.bind, axes=axis), tree)


def gather(tree: PyTree, axis: str) -> PyTree:
    """Return the sum of the devices' own arrays, the same on all."""
    return _as_vectors(functools.partial(_gather_p.bind, axes=axis), tree)


def same_on_all(
    function: Callable[..., PyTree], axis: str, own: Sequence[bool]
) -> Callable[..., PyTree]:
    """Return `function`, refused while it is traced if what it returns differs between devices.

    Args:
      function: of arrays, inside a `shard_map` or a `pmap` over `axis`.
      axis: the mesh axis.
      own: for each argument, whether it differs between the devices.

    Raises:
      ValueError: names the first output that comes from a device's own values otherwise than
        through `gather`, or a collective of `jax.lax` with the same result everywhere.
    """

    def checked(*args: PyTree) -> PyTree:
        closed, shape = jax.make_jaxpr(function, return_shape=True)(*args)
        sizes = [len(jax.tree.leaves(arg)) for arg in args]
        flags = [differs for differs, n in zip(own, sizes, strict=True) for _ in range(n)]
        differ = _differ(closed.jaxpr, flags, axis)
        outputs, structure = tree_flatten_with_path(shape)
        for (path, _), differs in zip(outputs, differ, strict=True):
            if differs:
                raise ValueError(
                    f"leaf {keystr(path) or 'root'} that the optimizer returns differs between the "
                    f"devices of axis {axis!r}: it comes from a device's part of the batch, not "
                    f"through a loss or the update_fn. Average it with jax.lax.pmean(…, {axis!r}), "
                    'or use backend="auto"'
                )
        return structure.unflatten(jaxpr_as_fun(closed)(*jax.tree.leaves(args)))

    return checked


def _differ(jaxpr: Jaxpr, own: Sequence[bool], axis: str) -> list[bool]:
    """Return which outputs differ between devices, given which inputs do."""
    differing = {var for var, differs in zip(jaxpr.invars, own, strict=True) if differs}

    def reads(atom: Any) -> bool:
        return not isinstance(atom, Literal) and atom in differing

    for eqn in jaxpr.eqns:
        rule = _RULES.get(eqn.primitive, _in_other)
        outputs = rule(eqn, [reads(atom) for atom in eqn.invars], axis)
        differing |= {var for var, differs in zip(eqn.outvars, outputs, strict=True) if differs}
    return [reads(atom) for atom in jaxpr.outvars]


def _in_reduction(eqn: Any, own: list[bool], axis: str) -> list[bool]:
    return [any(own) and not _is_over(axis, eqn.params)] * len(eqn.outvars)


def _in_axis_index(eqn: Any, own: list[bool], axis: str) -> list[bool]:
    del own
    return [_is_over(axis, eqn.params)]


def _in_scan(eqn: Any, own: list[bool], axis: str) -> list[bool]:
    # Only what a scan goes along has one axis more outside than in its body; this does not change
    # between versions of JAX, as the names of a scan's parameters do.
    body = eqn.params["jaxpr"].jaxpr
    n = _as_many_axes(eqn.outvars, body.outvars)
    return _in_loop(body, own, axis, _as_many_axes(eqn.invars, body.invars) - n, n)


def _as_many_axes(outside: Sequence[Any], inside: Sequence[Any]) -> int:
    return sum(a.aval.ndim == b.aval.ndim for a, b in zip(outside, inside, strict=True))


def _in_while(eqn: Any, own: list[bool], axis: str) -> list[bool]:
    of_cond, first = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    cond, body = eqn.params["cond_jaxpr"].jaxpr, eqn.params["body_jaxpr"].jaxpr
    carry = _in_loop(body, own[of_cond:], axis, first, len(own) - of_cond - first)
    (ends_apart,) = _differ(cond, own[:of_cond] + carry, axis)
    return [ends_apart or differs for differs in carry]


def _in_loop(body: Jaxpr, own: list[bool], axis: str, first: int, n: int) -> list[bool]:
    """Return which outputs of a loop differ, whose `n` carries are its inputs from `first` on."""
    while True:
        outputs = _differ(body, own, axis)
        carry = [a or b for a, b in zip(own[first : first + n], outputs[:n], strict=True)]
        if carry == own[first : first + n]:
            return carry + outputs[n:]
        own = own[:first] + carry + own[first + n :]


def _in_cond(eqn: Any, own: list[bool], axis: str) -> list[bool]:
    branches = [_differ(branch.jaxpr, own[1:], axis) for branch in eqn.params["branches"]]
    return [own[0] or any(outputs) for outputs in zip(*branches, strict=True)]


def _in_other(eqn: Any, own: list[bool], axis: str) -> list[bool]:
    called = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
    called = getattr(called, "jaxpr", called)
    if called is not None and len(called.invars) == len(own):  # jit, checkpoint, custom_jvp
        return _differ(called, own, axis)
    return [any(own)] * len(eqn.outvars)


def _is_over(axis: str, params: dict[str, Any]) -> bool:
    axes = params["axes"] if "axes" in params else params["axis_name"]
    return axis in (axes if isinstance(axes, tuple) else (axes,))


def _as_vectors(function: Callable[[jax.Array], jax.Array], tree: PyTree) -> PyTree:
    """Apply a linear function to a tree's leaves, joined into one vector for each dtype.

    So a sum over devices is one reduction however many leaves there are. XLA removes the joining
    where nothing happens to the vector.
    """
    leaves, structure = jax.tree.flatten(jax.tree.map(jnp.asarray, tree))
    done: list[Any] = list(leaves)
    for dtype in dict.fromkeys(leaf.dtype for leaf in leaves):
        places = [i for i, leaf in enumerate(leaves) if leaf.dtype == dtype]
        vector = function(jnp.concatenate([leaves[i].ravel() for i in places]))
        ends = np.cumsum([leaves[i].size for i in places]).tolist()
        for i, end in zip(places, ends, strict=True):
            done[i] = vector[end - leaves[i].size : end].reshape(leaves[i].shape)
    return structure.unflatten(done)


_spread_p, _gather_p = Primitive("spread"), Primitive("gather_sum")


def _define(primitive: Primitive, transpose: Primitive, lowering: Any) -> None:
    def pull(cotangent: jax.Array, _: Any, *, axes: str) -> list[jax.Array]:
        return [transpose.bind(cotangent, axes=axes)]

    primitive.def_abstract_eval(lambda x, *, axes: x)
    ad.deflinear2(primitive, pull)
    batching.defvectorized(primitive)
    mlir.register_lowering(primitive, lowering)


def _sum(x: jax.Array, *, axes: str) -> jax.Array:
    return jax.lax.psum(x, axes)


_define(_spread_p, _gather_p, lambda _, x, *, axes: [x])
_define(_gather_p, _spread_p, mlir.lower_fun(_sum, multiple_results=False))


_RULES: dict[Primitive, Callable[[Any, list[bool], str], list[bool]]] = {
    _gather_p: _in_reduction,
    primitives.psum_p: _in_reduction,
    primitives.pmax_p: _in_reduction,
    primitives.pmin_p: _in_reduction,
    primitives.all_gather_p: _in_reduction,
    primitives.axis_index_p: _in_axis_index,
    primitives.scan_p: _in_scan,
    primitives.while_p: _in_while,
    primitives.cond_p: _in_cond,
}
"""How what differs between devices goes through an operation; any other passes on what it gets."""
