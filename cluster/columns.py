"""The columns of a sweep's table: their names, which are its own, and a decision among them.

A table has an entry for each slot. What it is made of: the trials (`TRIAL`, `BORN`, `PARENT`,
`LR_HYPER` where it is searched, `VARIANT` where combinations race), the metrics of the last step
and the problem's own, a column `hyperparams.…` for each hyperparameter, and the decision that was
made from it, which is not shown.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from gradhpo.cluster.schedulers import Decision
from gradhpo.cluster.space import LR_HYPER, Change
from gradhpo.state import METRICS

Columns = dict[str, np.ndarray]

TRIAL = "trial"
"""The number of the trial in each slot."""
BORN = "born"
"""The generation in which that trial began."""
PARENT = "parent"
"""From which slot it came before this generation: its own, or `schedulers.NEW`."""
VARIANT = "variant"
"""The number of the combination of choices in each slot; in the files where combinations race, as
it otherwise follows from the slot."""
DIVERGED = "diverged_at"
"""The step at which it diverged; 0 if it did not."""
HYPERPARAMS = "hyperparams."
"""How the columns of hyperparameters begin."""
NEXT_PARENT = "next_parent"
"""Of the decision: from which slot each slot comes next."""
NEXT_VARIANT = "next_variant"
"""Of the decision, where combinations race: which one has each slot next."""
CHANGE = "change"
SEPARATOR = "|"
"""In the columns of a decision's changes: `change|NAME|FIELD`."""

CURVE = "curve"
"""In the columns of metrics inside a generation: `curve|NAME`, `(slots, steps that are kept)`."""

FIRST = "first"
"""In the first table's columns of what its trials began with, where the seed alone does not say it:
`first|NAME`; NaN in combinations of choices that have no such setting."""

OF_TRIALS = (TRIAL, BORN, PARENT, LR_HYPER, VARIANT)
"""What a plan says of the trials before a generation; everything else is measured after it."""
RESERVED = (
    *(*METRICS, DIVERGED, "generation", "slot", VARIANT, TRIAL, BORN, PARENT),
    *(LR_HYPER, NEXT_PARENT, NEXT_VARIANT),
)
"""Names that a problem's own metrics cannot have."""


def is_free(name: str) -> bool:
    """Whether a problem's metric may have this name."""
    return name not in RESERVED and not name.startswith(HYPERPARAMS) and SEPARATOR not in name


def setting(name: str) -> str:
    """Return the column of a searched setting."""
    return name if name == LR_HYPER else HYPERPARAMS + name


def curves_of(rows: Mapping[str, Any], every: int, where: Any) -> dict[str, Any]:
    """Return every n-th step of a generation's rows, as columns; NaN after a divergence.

    Args:
      rows: by name, `(steps, slots)`, and under "stopped" where a slot has diverged.
      every: n.
      where: `jnp.where` or `np.where`.
    """
    kept = {name: row[every - 1 :: every] for name, row in rows.items()}
    stopped = kept.pop("stopped")
    return {
        SEPARATOR.join((CURVE, name)): where(stopped, np.nan, row).astype(row.dtype).T
        for name, row in kept.items()
    }


def curves(table: Mapping[str, np.ndarray]) -> Columns:
    """Return what was kept inside a generation, by metric: `(slots, steps that are kept)`."""
    begins = CURVE + SEPARATOR
    return {n.removeprefix(begins): x for n, x in table.items() if n.startswith(begins)}


def shown(table: Mapping[str, np.ndarray]) -> Columns:
    """Return a table without its decision, and what was kept inside the generation."""
    decided = (NEXT_PARENT, NEXT_VARIANT)
    return {n: x for n, x in table.items() if n not in decided and SEPARATOR not in n}


def measured(table: Mapping[str, np.ndarray]) -> list[str]:
    """Return the names of what was measured after the generation."""
    return [name for name in shown(table) if name not in OF_TRIALS]


def of_decision(decision: Decision) -> Columns:
    """Return a decision as columns."""
    changes = {
        SEPARATOR.join((CHANGE, name, field)): getattr(change, field)
        for name, change in decision.changes.items()
        for field in Change._fields
    }
    return {NEXT_PARENT: decision.parents, **changes}


def of_first(stored: Mapping[str, np.ndarray]) -> Columns:
    """Return what the first trials began with, by name of a setting, as columns."""
    return {SEPARATOR.join((FIRST, name)): column for name, column in stored.items()}


def first_of(table: Mapping[str, np.ndarray]) -> Columns:
    """Return what the first trials began with, by name of a setting, from the first table."""
    begins = FIRST + SEPARATOR
    return {n.removeprefix(begins): x for n, x in table.items() if n.startswith(begins)}


def decision_of(table: Mapping[str, np.ndarray]) -> Decision:
    """Return the decision that was saved with a table."""
    parts = [name.split(SEPARATOR) for name in table if name.startswith(CHANGE + SEPARATOR)]
    changes = {
        name: Change(*(table[SEPARATOR.join((CHANGE, name, field))] for field in Change._fields))
        for name in {name for _, name, _ in parts}
    }
    return Decision(table[NEXT_PARENT], changes)
