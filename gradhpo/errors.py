"""Checks of what a user hands in, made before anything compiles; each error names its argument."""

from __future__ import annotations

import contextlib
import inspect
import math
import numbers
import warnings
from collections.abc import Generator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_flatten_with_path

from gradhpo.state import BilevelState, PyTree


class DivergenceWarning(RuntimeWarning):
    """A loss or a norm became NaN or infinite; the last finite state was kept."""


def advice(metric: str, step: int, state: BilevelState) -> str:
    """Return what to try where this metric is the first of a step that is not finite.

    Args:
      metric: its name.
      step: of the run or episode, counted from 1.
      state: any of the run: its dtypes are looked at.
    """
    moved = (state.params, state.hyperparams)
    if any(getattr(leaf, "dtype", None) == jnp.float16 for leaf in jax.tree.leaves(moved)):
        return (
            "float16 ends at 65504 and 6e-8, where Adam's eps is 0: keep weights and λ in float32, "
            "and cast within the losses; or take bfloat16"
        )
    if metric == "hypergrad_norm":
        return (
            "Both losses are finite and a derivative is not: put a small number under a square "
            "root, a norm or a power that is taken of 0, as optax's eps_root does; or the unroll "
            "explodes, or the learning rates are too high"
        )
    if step > 1:
        return "Lower the learning rates, or clip"
    return (
        "At a first step look at the batch, at logarithms, roots and divisions in the losses, and "
        "at their derivatives, before the learning rates: "
        'jax.config.update("jax_debug_nans", True) stops where it begins'
    )


class UnreachedWarning(UserWarning):
    """A hyperparameter gets no hypergradient, whatever the numbers: nothing leads from it on."""


class RecompileWarning(UserWarning):
    """A step is compiled over and over, because its loss is a new function every time."""


class FrozenWarning(UserWarning):
    """`Problem.batch` draws by Python or NumPy, and would give the same numbers at every step."""


def warn_user(message: str, category: type[Warning]) -> None:
    """Issue a warning at the innermost line that is neither this library's nor JAX's."""
    frame, level = inspect.currentframe(), 1
    while frame is not None and frame.f_globals.get("__name__", "").split(".")[0] in _NOT_USERS:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


_NOT_USERS = {"gradhpo", "jax", "contextlib", "functools", "dataclasses"}


def check_number(
    name: str, value: Any, low: float, high: float, *, open_low: bool = False
) -> float:
    """Return `value` as a float in `[low, high]`, or `(low, high]` with `open_low`."""
    accepted = f"a number in {'(' if open_low else '['}{low:g}, {high:g}]"
    if low == -math.inf and high == math.inf:
        accepted = "a number"
    array = isinstance(value, np.ndarray | jax.Array) and value.shape == ()
    if isinstance(value, bool) or not (array or isinstance(value, numbers.Real)):
        raise TypeError(f"{name} must be {accepted}, got {shown(value)}")
    number = float(value)
    if not (low < number if open_low else low <= number) or not number <= high:
        raise ValueError(f"{name} must be {accepted}, got {number!r}")
    return number


def check_finite(name: str, value: Any) -> float:
    """Return `value` as a float that is finite."""
    number = check_number(name, value, -math.inf, math.inf)
    if math.isinf(number):
        raise ValueError(f"{name} must be finite, got {number}")
    return number


def check_count(name: str, value: Any, minimum: int = 1) -> int:
    """Return `value` as an int of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer of at least {minimum}, got {shown(value)}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
    return int(value)


def check_exactly_one(owner: str, **given: Any) -> None:
    """Raise unless exactly one of two arguments was given."""
    present = [name for name, value in given.items() if value is not None]
    if len(present) != 1:
        both = " and ".join(given)
        what = "got neither" if not present else "got both"
        raise ValueError(f"{owner} takes exactly one of {both}; {what}")


def check_callable(name: str, value: Any) -> None:
    """Raise unless `value` can be called."""
    if not callable(value):
        raise TypeError(f"{name} must be a function, got {type(value).__name__}: {shown(value)}")


def check_instance(name: str, value: Any, kind: type) -> None:
    """Raise unless `value` is of a class of this library."""
    if not isinstance(value, kind):
        got = type(value).__name__
        if isinstance(value, type):
            got = f"the class {value.__name__}: call it"
        raise TypeError(f"{name} must be a {kind.__name__}, got {got}")


def check_hashable(name: str, value: Any) -> None:
    """Raise unless `value` can be a static argument of `jax.jit`."""
    check_callable(name, value)
    try:
        hash(value)
    except TypeError:
        raise TypeError(
            f"{name} must be hashable, because the compiled step is looked up by it; got "
            f"{type(value).__name__}, which is not: pass a plain function, and arrays in the batch"
        ) from None


def check_floating(name: str, tree: PyTree, *, others: bool = False) -> None:
    """Raise unless `tree` has leaves and all of them are real floating-point arrays.

    With `others`, one of them is enough, and the rest may be any arrays.
    """
    leaves = tree_flatten_with_path(tree)[0]
    if not leaves:
        raise ValueError(f"{name} has no arrays: got {tree!r}, a pytree without leaves")
    if name == "params":
        _refuse_statistics(name, tree)
    kinds = [_dtype(leaf) for _, leaf in leaves]
    if others and any(kind is not None and jnp.issubdtype(kind, jnp.floating) for kind in kinds):
        leaves = [leaf for leaf, kind in zip(leaves, kinds, strict=True) if kind is None]
    for path, leaf in leaves:
        dtype = _dtype(leaf)
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            got = type(leaf).__name__ if dtype is None else dtype
            raise TypeError(
                f"{name}{keystr(path)} must be a floating-point array, got {got}: it has no "
                "gradient. Convert it, or keep it out of the tree (nnx.split, eqx.partition; "
                "gradhpo.FlaxModel and EquinoxModel do)"
            )


def _dtype(leaf: Any) -> Any:
    """Return the dtype of an array or a Python float; None for what is no array."""
    return jnp.result_type(leaf) if isinstance(leaf, float) else getattr(leaf, "dtype", None)


_STATISTICS = {"BatchStat", "Cache", "Intermediate"}
"""Flax NNX's variables that a forward pass writes, and no gradient trains."""


def _refuse_statistics(name: str, tree: PyTree) -> None:
    """Raise if what a Flax NNX module remembers stands among the weights, as a gradient's target.

    Training would decay a running variance like a weight, and never update it.
    """

    def kind(node: Any) -> str:
        names = [c.__name__ for c in type(node).__mro__ if c.__module__.startswith("flax.nnx")]
        return next((n for n in names if n in _STATISTICS), "")

    for path, node in tree_flatten_with_path(tree, is_leaf=lambda node: bool(kind(node)))[0]:
        if found := kind(node):
            raise TypeError(
                f"{name}{keystr(path)} is an nnx.{found}, which is not trained: its statistics "
                "would move by gradient and weight decay. gradhpo.FlaxModel makes the weights and "
                "the model state of a module, and its losses"
            )


def check_same_tree(
    name: str, tree: PyTree, like_name: str, like: PyTree, *, dtypes: bool = True
) -> None:
    """Raise unless `tree` has the structure, shapes and (with `dtypes`) dtypes of `like`."""
    got, expected = tree_flatten_with_path(tree)[0], tree_flatten_with_path(like)[0]
    got_paths, expected_paths = [keystr(path) for path, _ in got], [keystr(p) for p, _ in expected]
    if missing := [path for path in expected_paths if path not in got_paths]:
        raise ValueError(f"{name} lacks the leaf {missing[0]} that {like_name} has")
    if extra := [path for path in got_paths if path not in expected_paths]:
        raise ValueError(f"{name} has the leaf {extra[0]} that {like_name} lacks")
    if jax.tree.structure(tree) != jax.tree.structure(like):
        structures = f"{jax.tree.structure(tree)} instead of {jax.tree.structure(like)}"
        raise ValueError(f"{name} differs in tree structure from {like_name}: {structures}")
    for path, (_, leaf), (_, other) in zip(got_paths, got, expected, strict=True):
        if jnp.shape(leaf) != jnp.shape(other):
            shapes = f"{jnp.shape(leaf)}, not {jnp.shape(other)} as in {like_name}"
            raise ValueError(f"{name} has shape {shapes} at leaf {path or 'root'}")
        if dtypes and not _same_dtype(leaf, other):
            kinds = f"{jnp.result_type(leaf)}, not {jnp.result_type(other)} as in {like_name}"
            raise TypeError(f"{name} has dtype {kinds} at leaf {path or 'root'}")


def _same_dtype(a: Any, b: Any) -> bool:
    there = getattr(a, "dtype", None)  # JAX takes longer to tell equal ones
    if there is not None and there == getattr(b, "dtype", None):
        return True
    return jnp.result_type(a) == jnp.result_type(b)


@contextlib.contextmanager
def tracing(name: str, **arguments: PyTree) -> Generator[None]:
    """Note on an exception which of the user's functions raised it, and on what shapes."""
    try:
        yield
    except Exception as error:
        start = "while tracing "
        if not any(note.startswith(start) for note in getattr(error, "__notes__", ())):
            given = ", ".join(f"{key} {_shapes(tree)}" for key, tree in arguments.items())
            error.add_note(f"{start}{name} with {given}")
            if isinstance(error, jax.errors.TracerArrayConversionError):
                error.add_note(
                    "NumPy cannot take traced values: index jnp arrays, for example what "
                    "Problem.data returns, and call jnp's functions"
                )
        raise


def shown(value: Any, most: int = 80) -> str:
    """Return a value as a message has it: as it is written, or the shapes of arrays in it."""
    arrays = any(hasattr(leaf, "dtype") and leaf.shape for leaf in jax.tree.leaves(value))
    if hasattr(value, "dtype"):
        return described(value) if arrays else repr(value)
    text = _shapes(value) if arrays else repr(value)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _shapes(tree: PyTree, most: int = 8) -> str:
    """Return dtypes and shapes by path: `['w'] float32[3,4], ['b'] float32[4]`."""
    leaves = tree_flatten_with_path(tree)[0]
    parts = [f"{keystr(path)} {described(leaf)}".strip() for path, leaf in leaves[:most]]
    more = [f"and {len(leaves) - most} more leaves"] if len(leaves) > most else []
    return f"({', '.join([*parts, *more])})"


def described(value: Any) -> str:
    """Return an array's dtype and shape, `float32[3,4]`, and of anything else its type."""
    if type(value) in (tuple, list):
        return f"a {type(value).__name__} of {len(value)}"
    if not hasattr(value, "dtype"):
        return type(value).__name__
    return f"{value.dtype}[{','.join(map(str, value.shape))}]"


def stack_length(name: str, stack: PyTree, expected: int | None = None) -> int:
    """Return the length of a batch stack's leading axis, the same in all of its leaves."""
    leaves = tree_flatten_with_path(stack)[0]
    if not leaves:
        raise ValueError(f"{name} has no arrays: got {stack!r}")
    first = jnp.shape(leaves[0][1])
    length = expected if expected is not None else first[0] if first else "at least 1"
    for path, leaf in leaves:
        if jnp.shape(leaf)[:1] != (length,):
            got = f"shape {jnp.shape(leaf)} at leaf {keystr(path) or 'root'}"
            raise ValueError(f"{name} must have a leading axis of length {length}, got {got}")
    return int(jnp.shape(leaves[0][1])[0])


def stack(name: str, batches: list[PyTree]) -> PyTree:
    """Return batches stacked along a new leading axis.

    Raises:
      ValueError: if one differs from the first in tree structure or shapes.
    """
    if not batches:
        raise ValueError(f"{name} gave no batches")
    for index, batch in enumerate(batches):
        check_same_tree(f"{name}: batch {index}", batch, "batch 0", batches[0])
    if all(isinstance(leaf, np.ndarray | np.generic) for leaf in jax.tree.leaves(batches)):
        return jax.tree.map(lambda *leaves: np.stack(leaves), *batches)
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)
