"""Losses that are a new function at every call, as lambdas in a loop are: each compiles again."""

from __future__ import annotations

import functools
import inspect
import weakref
from types import CodeType
from typing import Any

from gradhpo.errors import RecompileWarning, warn_user
from gradhpo.remembered import original
from gradhpo.state import LossFn

MANY = 3
"""Functions made by one piece of code that are compiled before a word is said."""

Functions = dict[tuple[str, CodeType], list[Any]]
"""By argument and code, weak references to the functions for which a step was compiled."""

_COMPILED: dict[int, Functions] = {}
"""By the identity of the optimizer, as long as it lives: an equal one may have another problem."""


def note_compile(optimizer: Any, train_loss_fn: LossFn, val_loss_fn: LossFn) -> None:
    """Warn at the third function that one piece of code made for a step of this optimizer.

    To be called while the step is traced, which happens once for each program.
    """
    compiled = _of(optimizer)
    for name, loss in (("train_loss_fn", train_loss_fn), ("val_loss_fn", val_loss_fn)):
        code = _code(loss)
        seen = [] if code is None else compiled.setdefault((name, code), [])
        function = inspect.unwrap(original(loss))
        if code is None or len(seen) == MANY or any(function == other() for other in seen):
            continue
        seen.append(_reference(function))
        if len(seen) == MANY:
            warn_user(
                f"{type(optimizer).__name__} has compiled its step {MANY} times for {name} "
                f"{code.co_name} ({code.co_filename}:{code.co_firstlineno}), a new function each "
                "time. Define it once, outside of the loop, and pass what changes in the batch",
                RecompileWarning,
            )
            return


def _of(optimizer: Any) -> Functions:
    identity = id(optimizer)
    if identity not in _COMPILED:
        _COMPILED[identity] = {}
        weakref.finalize(optimizer, _COMPILED.pop, identity)
    return _COMPILED[identity]


def _reference(function: Any) -> Any:
    """Return what gives the function as long as it lives."""
    try:
        kind: Any = weakref.WeakMethod if inspect.ismethod(function) else weakref.ref
        return kind(function)
    except TypeError:  # an object without weak references
        return lambda: function


def _code(loss: Any) -> CodeType | None:
    """Return the code of a function, also where it is wrapped or has arguments filled in."""
    function = inspect.unwrap(original(loss))
    while isinstance(function, functools.partial):
        function = inspect.unwrap(function.func)
    return getattr(function, "__code__", None)
