"""What a run computes, as a few words and checksums: two runs with equal ones are of one program.

A checksum is of a jaxpr: of its operations, shapes and numbers, the arrays that it closes over
included, and of no name or address, so that it is the same in another process.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import weakref
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from gradhpo._version import __version__
from gradhpo.errors import warn_user
from gradhpo.optimizer import BilevelOptimizer

NAMES = ("name", "debug_info", "ctx_mesh")
"""Parameters of operations that do not change what is computed."""


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """Which problem and optimizer a run has."""

    versions: str
    """Of what makes a program from them: other versions make another one."""
    optimizer: str
    """Its class and settings."""
    init: str
    data: str | None
    step: str

    def check(self, name: str, before: Fingerprint) -> None:
        """Raise if this run is another one than `before`, which is to go on.

        Between versions nothing can be said of the programs, and a warning says that.

        Raises:
          ValueError: if something differs; it is named.
        """
        if before.versions != self.versions:
            warn_user(
                f"{name} was begun with {before.versions}, and this is {self.versions}: whether "
                "problem and optimizer are the same is not checked, and bits may differ",
                UserWarning,
            )
            return
        before.check_optimizer(name, self.optimizer)
        for part, what in _PARTS.items():
            if getattr(before, part) != getattr(self, part):
                raise ValueError(f"{name} is of a run with {what}. {_GO_ON}")

    def check_optimizer(self, name: str, now: str) -> None:
        """Raise if a run's optimizer is another one than `now`, from `settings`."""
        if self.optimizer != now:
            raise ValueError(
                f"{name} is of a run with another optimizer, {self.optimizer}; got {now}"
            )


_GO_ON = "To go on all the same: resume=dataclasses.replace(solution, fingerprint=None)"
_PARTS = {
    "init": "another Problem.init",
    "data": "another Problem.data",
    "step": "another problem or optimizer: a step with its losses, batch, inner_optimizer, "
    "outer_optimizer, update_fn, episodes or devices computes something else",
}


def versions() -> str:
    """Return what decides which program is made from a problem."""
    return (
        f"gradhpo {__version__}, jax {jax.__version__}, optax {optax.__version__} on "
        f"{jax.default_backend()}"
    )


def settings(optimizer: BilevelOptimizer) -> str:
    """Return an optimizer's class and its settings that are numbers or words.

    Of one that runs another in parallel, those of the other.
    """
    inside = getattr(optimizer, "optimizer", None)
    if isinstance(inside, BilevelOptimizer):
        return settings(inside)
    given = sorted(vars(optimizer).items())
    parts = [f"{n}={x!r}" for n, x in given if isinstance(x, bool | int | float | str)]
    return f"{type(optimizer).__name__}({', '.join(parts)})"


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


class _Checksums:
    """Checksums of the programs inside of one, each made once."""

    def __init__(self) -> None:
        self._jaxprs: dict[int, str] = {}
        self._arrays: dict[int, str] = {}

    def of_closed(self, closed: ClosedJaxpr) -> str:
        consts = [self._array(value) for value in closed.consts]
        return _digest([self._jaxpr(closed.jaxpr), *consts])

    def _jaxpr(self, jaxpr: Jaxpr) -> str:
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
            return f"{_aval(atom)}={self._array(atom.val)}"
        return str(numbers[atom])

    def _value(self, value: Any) -> str:
        """Return a parameter of an operation as text."""
        match value:
            case ClosedJaxpr():
                text = self.of_closed(value)
            case Jaxpr():
                text = self._jaxpr(value)
            case Mapping():
                parts = {str(name): self._value(part) for name, part in value.items()}
                text = str(sorted(parts.items()))
            case tuple() | list():
                text = str([self._value(part) for part in value])
            case set() | frozenset():
                text = str(sorted(self._value(part) for part in value))
            case np.ndarray() | np.generic() | jax.Array():
                text = self._array(value)
            case _ if callable(value) and not isinstance(value, type):
                text = str(getattr(value, "__qualname__", type(value).__name__))
            case _:
                text = re.sub(r"\b0x[0-9a-f]+", "", str(value))
        return text

    def _array(self, value: Any) -> str:
        if isinstance(value, bool | int | float | complex):
            return repr(value)
        if id(value) not in self._arrays:
            self._arrays[id(value)] = _of_array(value)
        return self._arrays[id(value)]


def _of_array(value: Any) -> str:
    if isinstance(value, jax.Array):
        if not (value.is_fully_addressable or value.is_fully_replicated):
            return f"{value.dtype}{value.shape}"
        if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
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
