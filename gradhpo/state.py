"""`BilevelState`: everything an optimizer remembers between two steps, as one immutable pytree."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["METRICS", "BilevelState", "DataBatch", "LossFn", "PyTree", "prepare"]

PyTree: TypeAlias = Any
"""A nested structure of arrays."""

LossFn: TypeAlias = Callable[..., Any]
"""`(params, hyperparams, batch) -> scalar`, differentiable in its first two arguments.

It may take `model_state` and `key` too, and return `(scalar, Aux)`: see `Problem`.
"""


METRICS = ("train_loss", "val_loss", "hypergrad_norm", "param_norm", "hyperparam_norm")
"""The metrics that every step leaves in `metadata`: scalars, infinite before the first step.

Not NaN: a state goes through compiled programs as it is, and `jax_debug_nans` would stop them.
"""


class DataBatch(NamedTuple):
    """A batch of supervised data. Any other pytree of arrays serves as a batch too."""

    inputs: Any
    """Array of shape `(batch, ...)`."""
    targets: Any
    """Array of shape `(batch, ...)`."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BilevelState:
    """The state of a bilevel optimization, unchanged in structure from `init` to the last step.

    A pytree whose every field is data, so it goes through `jax.jit`, `jax.vmap`, `jax.lax.scan`
    and `jax.shard_map`; `step` is a leaf, and a new step count never compiles anything again.
    """

    params: PyTree
    """Weights `w`, the inner level: a pytree of floating arrays."""
    hyperparams: PyTree
    """Hyperparameters `λ`, the outer level: a pytree of floating arrays."""
    inner_opt_state: PyTree
    """State of the inner optimizer; None with an `update_fn`."""
    outer_opt_state: PyTree
    """State of the outer optimizer; None when λ moves by plain gradient descent."""
    step: Any
    """Steps taken in the current episode: an int32 scalar."""
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    """Metrics of the last step and what the algorithm itself remembers, by name."""
    model_state: PyTree = None
    """What the losses remember from step to step, such as running statistics: a pytree of arrays
    that the training loss updates and no gradient moves; None where they remember nothing."""

    @classmethod
    def create(
        cls,
        params: PyTree,
        hyperparams: PyTree,
        inner_opt_state: PyTree = None,
        outer_opt_state: PyTree = None,
        metadata: dict[str, Any] | None = None,
        model_state: PyTree = None,
    ) -> BilevelState:
        """Return a state at step 0, its leaves strongly typed arrays."""
        optimizers = (inner_opt_state, outer_opt_state)
        state = cls(params, hyperparams, *optimizers, 0, dict(metadata or {}), model_state)
        return canonical(state)

    def update(
        self,
        params: PyTree = None,
        hyperparams: PyTree = None,
        inner_opt_state: PyTree = None,
        outer_opt_state: PyTree = None,
        step: Any = None,
        metadata: dict[str, Any] | None = None,
        model_state: PyTree = None,
    ) -> BilevelState:
        """Return a copy with the given fields replaced.

        `metadata` is merged into the present metadata; a field given as None keeps its value.
        """
        given = {
            "params": params,
            "hyperparams": hyperparams,
            "inner_opt_state": inner_opt_state,
            "outer_opt_state": outer_opt_state,
            "step": step,
            "model_state": model_state,
        }
        changes = {name: value for name, value in given.items() if value is not None}
        return dataclasses.replace(self, metadata={**self.metadata, **(metadata or {})}, **changes)

    def get_metric(self, key: str, default: Any = None) -> Any:
        """Return `metadata[key]`, or `default` where there is none."""
        return self.metadata.get(key, default)

    def finite(self) -> jax.Array:
        """Return whether the last step's losses and norms are all finite: a bool, on the device.

        A loop of one's own that asks now and then sees a divergence; False before the first step.
        """
        return ~faults(self.metadata).any()


def faults(metadata: dict[str, Any]) -> jax.Array:
    """Return which of `METRICS` are not finite, as booleans of shape `(5,)`."""
    return ~jnp.isfinite(jnp.stack([metadata[name] for name in METRICS]))


def canonical(state: BilevelState) -> BilevelState:
    """Return `state` with every leaf a strongly typed array and `step` an int32.

    A Python number or a weakly typed scalar would make `jax.jit` see a new type at the second
    step, and compile it again.
    """
    state = dataclasses.replace(state, step=as_array(state.step, jnp.int32))
    return jax.tree.map(as_array, state)


def prepare(state: BilevelState) -> BilevelState:
    """Return `state` ready for a compiled step: typed leaves, and every metric present.

    A state that a step returned is ready, and costs only a look at its leaves.

    Raises:
      TypeError: if it is no state.
    """
    if not isinstance(state, BilevelState):
        accepted = "a gradhpo.BilevelState, as an optimizer's init or step returns it"
        got = "an array" if hasattr(state, "dtype") else type(state).__name__
        raise TypeError(f"state must be {accepted}; got {got}")
    if all(name in state.metadata for name in METRICS) and all(map(_typed, jax.tree.leaves(state))):
        return state
    missing = [name for name in METRICS if name not in state.metadata]
    if missing:
        state = state.update(metadata=dict.fromkeys(missing, float("inf")))
    return canonical(state)


def remembered(state: BilevelState, name: str) -> Any:
    """Return what an algorithm keeps in the state under this name.

    Raises:
      ValueError: if it is not there.
    """
    if name not in state.metadata:
        raise ValueError(
            f"state.metadata lacks {name!r}, which this optimizer keeps: pass as `state` what its "
            "own init or step returned"
        )
    return state.metadata[name]


def _typed(leaf: Any) -> bool:
    # Arrays of PRNG keys have no weak type.
    return isinstance(leaf, jax.Array) and not getattr(leaf, "weak_type", False)


def is_key(leaf: Any) -> bool:
    """Whether a leaf is an array of typed PRNG keys, or the shape and dtype of one."""
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def as_array(leaf: Any, dtype: Any = None) -> Any:
    """Return `leaf` as a strongly typed array, a Python number in JAX's default precision."""
    if isinstance(leaf, jax.Array):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
            return leaf  # PRNG keys
        dtype = leaf.dtype if dtype is None else dtype
        if not leaf.weak_type and leaf.dtype == dtype:
            return leaf
        return jax.lax.convert_element_type(leaf, dtype)
    if isinstance(leaf, np.ndarray | np.generic | bool | int | float | complex):
        kind = np.asarray(leaf).dtype if dtype is None else dtype
        return jnp.asarray(leaf, dtype=jax.dtypes.canonicalize_dtype(kind))
    return leaf
