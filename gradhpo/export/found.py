"""What is taken out of a state: weights, hyperparameters, and the model's own state."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import numpy as np
from jax.tree_util import keystr, tree_flatten_with_path

from gradhpo.errors import check_instance
from gradhpo.state import BilevelState, PyTree, is_key

PARTS = ("params", "hyperparams", "model_state")


class Trial(Protocol):
    """A trial of a sweep: its arrays by path, such as `.params['w']`."""

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """All arrays."""
        ...


def tree_of(found: BilevelState | Trial) -> dict[str, PyTree]:
    """Return the parts of a state by name, as trees of NumPy arrays; of a trial nested tables."""
    if hasattr(found, "arrays"):
        return _nested(flat(found))
    check_instance("found", found, BilevelState)
    parts = {name: getattr(found, name) for name in PARTS}
    return {name: jax.tree.map(_array, part) for name, part in parts.items() if part is not None}


def flat(found: BilevelState | Trial) -> dict[str, np.ndarray]:
    """Return the arrays of those parts by dotted names, such as `params.layer.w`."""
    if hasattr(found, "arrays"):
        named = {_dotted(path): array for path, array in found.arrays.items()}  # pyright: ignore
    else:
        leaves = tree_flatten_with_path(tree_of(found))[0]
        named = {_dotted(keystr(path)): leaf for path, leaf in leaves}
    return {name: leaf for name, leaf in named.items() if name.split(".")[0] in PARTS}


def _array(leaf: Any) -> np.ndarray:
    return np.asarray(jax.random.key_data(leaf) if is_key(leaf) else leaf)


def _dotted(path: str) -> str:
    """Return `.params['w'][0]` as `params.w.0`."""
    return re.sub(r"\['?(.*?)'?\]", r".\1", path).lstrip(".")


def _nested(named: Mapping[str, np.ndarray]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for name, array in named.items():
        *above, last = name.split(".")
        table = made
        for part in above:
            table = table.setdefault(part, {})
        table[last] = array
    return made
