"""A safetensors file: weights and hyperparameters under dotted names."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

import numpy as np

from gradhpo.commit import commit
from gradhpo.export.found import Trial, flat
from gradhpo.observers.packages import load, require
from gradhpo.state import BilevelState


def save_safetensors(path: str | os.PathLike[str], found: BilevelState | Trial) -> list[str]:
    """Write weights and λ to a safetensors file, whole or not at all.

    Args:
      path: the file; one of that name is replaced.
      found: a state of `solve`, such as `solution.best.state`, or a sweep's `result.best`.

    Returns:
      The names of the tensors: `params.…`, `hyperparams.…`, `model_state.…`.

    Raises:
      ImportError: without safetensors.
    """
    require("save_safetensors", "safetensors", "safetensors", "export")
    arrays = {name: np.array(array, order="C") for name, array in flat(found).items()}
    content: bytes = load("safetensors.numpy").save(arrays, metadata={"format": "np"})

    def write(file: BinaryIO) -> None:
        file.write(content)

    commit(Path(path), write)
    return list(arrays)
