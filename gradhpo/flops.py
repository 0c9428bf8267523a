"""FLOPs of a function as XLA counts them, with the bodies of loops counted as often as they run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, jaxpr_as_fun, primitives


def flops(function: Callable[..., Any], *args: Any) -> float:
    """Return the FLOPs of a call, before XLA's own simplifications.

    XLA counts the body of a loop once, whatever its length; here a `scan`'s counts at every
    iteration. A `while` loop of unknown length still counts once.
    """
    return _count(jax.make_jaxpr(function)(*args))


def _count(closed: ClosedJaxpr) -> float:
    total = _once(closed)
    for body, length in _scans(closed.jaxpr):
        total += length * _count(body) - _once(body)
    return total


def _once(closed: ClosedJaxpr) -> float:
    lowered = jax.jit(jaxpr_as_fun(closed)).lower(*closed.in_avals)
    analysis: Any = lowered.cost_analysis() or {}
    return float(analysis.get("flops", 0.0))


def _scans(jaxpr: Jaxpr) -> Iterator[tuple[ClosedJaxpr, int]]:
    """Yield the outermost scans' bodies and lengths, those inside calls included."""
    for eqn in jaxpr.eqns:
        if eqn.primitive is primitives.scan_p:
            yield eqn.params["jaxpr"], eqn.params["length"]
            continue
        for value in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: isinstance(x, Jaxpr | ClosedJaxpr)
        ):
            if isinstance(value, ClosedJaxpr):
                yield from _scans(value.jaxpr)
            elif isinstance(value, Jaxpr):
                yield from _scans(value)
