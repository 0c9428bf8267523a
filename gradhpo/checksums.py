"""Checksums of jaxprs, by which two programs are told apart, in any process.

Of its operations, shapes and numbers, the arrays that it closes over included, and of no name or
address.
"""

from __future__ import annotations

import hashlib
import re
import weakref
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from gradhpo.state import PyTree, is_key

NAMES = ("name", "debug_info", "ctx_mesh")
"""Parameters of operations that do not change what is computed."""


def checksum(closed: ClosedJaxpr) -> str:
    """Return what tells a program from others: equal for equal ones, in every process.

    Of a function that is called back the name counts, and not what it does.
    """
    if closed not in _KNOWN:
        made = _Checksums()
        _KNOWN[closed] = made.of_closed(closed)
    return _KNOWN[closed]


_KNOWN: weakref.WeakKeyDictionary[ClosedJaxpr, str] = weakref.WeakKeyDictionary()
"""JAX remembers a trace; so what it closes over is read from a device once."""


def of_arrays(tree: PyTree) -> str:
    """Return the SHA-256 of arrays: of their paths, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        array = np.ascontiguousarray(jax.random.key_data(leaf) if is_key(leaf) else leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        plain = not array.dtype.hasobject
        digest.update(array.reshape(-1).view(np.uint8).data if plain else array.tobytes())
    return digest.hexdigest()


def same_program(a: ClosedJaxpr, b: ClosedJaxpr) -> bool:
    """Whether two programs have equal checksums; an array that both close over is not read."""
    made = _Checksums()
    shared = zip(a.consts, b.consts, strict=False)
    return made.of_jaxpr(a.jaxpr) == made.of_jaxpr(b.jaxpr) and all(
        x is y or made.of_array(x) == made.of_array(y) for x, y in shared
    )


class _Checksums:
    """Checksums of the programs inside of one, each made once."""

    def __init__(self) -> None:
        self._jaxprs: dict[int, str] = {}
        self._arrays: dict[int, str] = {}

    def of_closed(self, closed: ClosedJaxpr) -> str:
        consts = [self.of_array(value) for value in closed.consts]
        return _digest([self.of_jaxpr(closed.jaxpr), *consts])

    def of_jaxpr(self, jaxpr: Jaxpr) -> str:
        if id(jaxpr) not in self._jaxprs:
            numbers: dict[Any, int] = {}
            lines = [" ".join(_new(var, numbers) for var in (*jaxpr.constvars, *jaxpr.invars))]
            for eqn in jaxpr.eqns:
                read = [self._read(atom, numbers) for atom in eqn.invars]
                made = [_new(var, numbers) for var in eqn.outvars]
                params = self._value({n: x for n, x in eqn.params.items() if n not in NAMES})
                lines.append(f"{eqn.primitive.name} {read} {made} {params}")
            lines.append(" ".join(self._read(atom, numbers) for atom in jaxpr.outvars))
            self._jaxprs[id(jaxpr)] = _digest(lines)
        return self._jaxprs[id(jaxpr)]

    def _read(self, atom: Any, numbers: dict[Any, int]) -> str:
        if isinstance(atom, Literal):
            return f"{_aval(atom)}={self.of_array(atom.val)}"
        return str(numbers[atom])

    def _value(self, value: Any) -> str:
        """Return a parameter of an operation as text."""
        match value:
            case ClosedJaxpr():
                text = self.of_closed(value)
            case Jaxpr():
                text = self.of_jaxpr(value)
            case Mapping():
                parts = {str(name): self._value(part) for name, part in value.items()}
                text = str(sorted(parts.items()))
            case tuple() | list():
                text = str([self._value(part) for part in value])
            case set() | frozenset():
                text = str(sorted(self._value(part) for part in value))
            case np.ndarray() | np.generic() | jax.Array():
                text = self.of_array(value)
            case _ if callable(value) and not isinstance(value, type):
                text = str(getattr(value, "__qualname__", type(value).__name__))
            case _:
                text = re.sub(r"\b0x[0-9a-f]+", "", str(value))
        return text

    def of_array(self, value: Any) -> str:
        if isinstance(value, bool | int | float | complex):
            return repr(value)
        if id(value) not in self._arrays:
            self._arrays[id(value)] = _of_array(value)
        return self._arrays[id(value)]


def _of_array(value: Any) -> str:
    if isinstance(value, jax.Array):
        if not (value.is_fully_addressable or value.is_fully_replicated):
            return f"{value.dtype}{value.shape}"
        if is_key(value):
            return f"{value.dtype} {_of_array(jax.random.key_data(value))}"
    array = np.asarray(value)
    content = hashlib.sha256(np.ascontiguousarray(array).view(np.uint8).data).hexdigest()
    return f"{array.dtype}{array.shape} {content}"


def _new(var: Any, numbers: dict[Any, int]) -> str:
    numbers[var] = len(numbers)
    return _aval(var)


def _aval(atom: Any) -> str:
    return f"{atom.aval.str_short()}{'*' if getattr(atom.aval, 'weak_type', False) else ''}"


def _digest(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
