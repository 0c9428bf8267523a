"""What a scheduler answers, and what is checked before it is obeyed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np

from gradhpo.cluster.distributions import Distribution
from gradhpo.cluster.schedulers.table import NEW, Table
from gradhpo.cluster.space import Change, Changes, SearchSpace


@dataclasses.dataclass(frozen=True)
class Decision:
    """What the slots do next."""

    parents: np.ndarray
    """For each slot the slot that it copies: its own goes on, `NEW` starts a new trial."""
    changes: Changes = dataclasses.field(default_factory=dict)
    """Of the settings of slots that copy, by name; see `SearchSpace.explore`."""


Scheduler: TypeAlias = Callable[[Table, SearchSpace, np.random.Generator], Decision]
"""`(table, space, rng) -> Decision`: a pure function, asked after every generation."""


def check(decision: Any, slots: int, settings: Mapping[str, Distribution]) -> Decision:
    """Return a scheduler's decision, checked.

    Raises:
      TypeError: if it is not a `Decision`.
      ValueError: if parents or changes do not fit the slots, or a change is no number or sets a
        value outside of its distribution's bounds.
    """
    if not isinstance(decision, Decision):
        raise TypeError(f"a scheduler must return a Decision, got {type(decision).__name__}")
    parents = np.asarray(decision.parents)
    if parents.shape != (slots,) or not np.issubdtype(parents.dtype, np.integer):
        raise ValueError(
            f"Decision.parents must be {slots} integers, got {parents.dtype} of {parents.shape}"
        )
    if ((parents < NEW) | (parents >= slots)).any():
        raise ValueError(f"Decision.parents must be from {NEW} to {slots - 1}, got {parents!r}")
    for name, change in decision.changes.items():
        if name not in settings:
            raise ValueError(f"Decision.changes has {name!r}; the space has {list(settings)}")
        _check_change(f"Decision.changes[{name!r}]", change, slots, settings[name])
    return Decision(parents.astype(np.int64), dict(decision.changes))


def _check_change(name: str, change: Change, slots: int, kind: Distribution) -> None:
    if len(change) != 3 or any(np.shape(part) != (slots,) for part in change):
        raise ValueError(f"{name} must have {slots} entries in each part")
    mask = np.asarray(change[0], bool)
    for field, part in zip(Change._fields[1:], change[1:], strict=True):
        numbers = np.asarray(part, float)
        with np.errstate(over="ignore"):
            wrong = mask & ~np.isfinite(numbers.astype(np.float32))
        if wrong.any():
            slot = int(np.flatnonzero(wrong)[0])
            raise ValueError(f"{name}.{field} must be finite, got {numbers[slot]} for slot {slot}")
    multiply, add = (np.asarray(part, float) for part in change[1:])
    outside = mask & ~kind.accepts(multiply, add)
    if outside.any():
        slot = int(np.flatnonzero(outside)[0])
        perturbed = f"{multiply[slot]:g} times, and " if multiply[slot] else ""
        raise ValueError(
            f"{name} must be in the space, {kind.range}, got {perturbed}{add[slot]:g} for slot "
            f"{slot}"
        )
