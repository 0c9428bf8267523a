"""Randomness of NumPy in `Problem.batch`: drawn once, while it is traced, for all steps."""

from __future__ import annotations

import inspect
import weakref
from typing import Any

import jax

from gradhpo.checksums import same_program
from gradhpo.errors import FrozenWarning, warn_user
from gradhpo.problem import Problem
from gradhpo.state import PyTree

_ASKED: weakref.WeakSet[Any] = weakref.WeakSet()
"""The functions that were tried; each is tried once."""


def check_frozen(problem: Problem, key: jax.Array, data: PyTree) -> None:
    """Warn if two traces of `Problem.batch` differ: nothing compiles, and nothing is computed.

    Args:
      problem: with a `batch`.
      key: one key, traced or not.
      data: from `Problem.start_data`, traced or not.
    """
    function = inspect.unwrap(problem.batch) if problem.batch is not None else None
    try:
        if function is None or function in _ASKED:
            return
        _ASKED.add(function)
    except TypeError:  # no weak references to it
        return
    first, second = (_trace(problem, key, data) for _ in range(2))
    if same_program(first, second):
        return
    warn_user(
        "Problem.batch is not the same each time it is traced, as with np.random, random or a "
        "counter of Python. It is traced once for a run: every step would get the same numbers. "
        "Draw with jax.random and the key it is given, or give host data by Problem.batches",
        FrozenWarning,
    )


def _trace(problem: Problem, key: jax.Array, data: PyTree) -> Any:
    # A function of its own each time, since JAX remembers traces.
    return jax.make_jaxpr(lambda key, data: problem.draw(key, data))(key, data)  # noqa: PLW0108
