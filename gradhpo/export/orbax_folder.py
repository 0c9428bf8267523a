"""An Orbax checkpoint: weights and hyperparameters as a tree."""

from __future__ import annotations

import os
from pathlib import Path

from gradhpo.export.found import Trial, tree_of
from gradhpo.observers.packages import load, require
from gradhpo.state import BilevelState


def save_orbax(folder: str | os.PathLike[str], found: BilevelState | Trial) -> None:
    """Write weights and λ as a checkpoint of Orbax.

    `orbax.checkpoint.StandardCheckpointer().restore(folder)` gives a table with "params",
    "hyperparams" and, where there is one, "model_state".

    Args:
      folder: of the checkpoint; it must not be there.
      found: a state of `solve`, such as `solution.best.state`, or a sweep's `result.best`, whose
        trees are nested tables.

    Raises:
      ImportError: without orbax-checkpoint.
      FileExistsError: if the folder is there.
    """
    require("save_orbax", "orbax", "orbax-checkpoint", "export")
    path = Path(folder).absolute()
    if path.exists():
        raise FileExistsError(f"folder must be new, and {path} is there already")
    with load("orbax.checkpoint").StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree_of(found))
