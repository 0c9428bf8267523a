"""λ(t) as a script of optax schedules, which trains without gradhpo."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from gradhpo.commit import commit

ALONE = "hyperparams"
"""The name of a λ that is a single array."""

TEMPLATE = '''\
"""The hyperparameters that gradhpo found, as optax has schedules.

    from {module} import STEPS, hyperparams, schedule, train

`schedule("{example}")` serves wherever optax takes a schedule. `train` takes the steps that the run
took, given its weights at the beginning, its training loss, its optimizer and its batches. gradhpo
is not needed.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

with np.load(Path(__file__).with_suffix(".npz"), allow_pickle=False) as file:
    VALUES = {{name: file[name] for name in file.files}}  # each (STEPS + 1, …)
STEPS = {steps}


def schedule(name):
    """Return a hyperparameter over steps, counted from 0; after the last step it stays."""
    values = VALUES[name]

    def at(count):
        return jnp.asarray(values)[jnp.clip(count, 0, STEPS)]

    return at


def hyperparams(count):
    """Return the hyperparameters that a step is taken with."""
    return {tree}


def train(params, loss, optimizer, batch, steps=STEPS):
    """Train, and return the weights.

    Args:
      params: the weights at the beginning.
      loss: `(params, hyperparams, batch) -> scalar`, the training loss.
      optimizer: a function of the hyperparameters that returns an optax optimizer.
      batch: a function of the step that returns its training batch.
      steps: how many.
    """

    @jax.jit
    def step(params, opt_state, count, batch):
        now = hyperparams(count)
        gradient = jax.grad(loss)(params, now, batch)
        updates, opt_state = optimizer(now).update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    opt_state = optimizer(hyperparams(0)).init(params)
    for count in range(steps):
        params, opt_state = step(params, opt_state, count, batch(count))
    return params


if __name__ == "__main__":
    for name, values in VALUES.items():
        print(f"{{name}}: {{STEPS}} steps, from {{values[0]}} to {{values[-1]}}")
'''


def write_script(path: str | os.PathLike[str], trajectory: Mapping[str, np.ndarray]) -> None:
    """Write λ(t) as a Python script, and its numbers beside it as `.npz`.

    Args:
      path: the script, a `.py` whose name can be imported; it is replaced.
      trajectory: by the dotted name of a leaf of λ, `(steps + 1, …)`: its value before each step,
        and after the last: `solution.trajectory()`, or a sweep's `result.trajectory()`.

    Raises:
      ValueError: for a path that is no module, for nothing, or arrays of differing lengths.
    """
    path = Path(path)
    if path.suffix != ".py" or not path.stem.isidentifier():
        raise ValueError(f"path must be a Python file such as retrain.py, got {str(path)!r}")
    lengths = {len(values) for values in trajectory.values()}
    if len(lengths) != 1:
        got = sorted(lengths) or "nothing"
        raise ValueError(f"trajectory must have arrays of one length, got {got}")
    text = TEMPLATE.format(
        module=path.stem,
        example=next(iter(trajectory)),
        steps=lengths.pop() - 1,
        tree=_source(trajectory),
    )

    def numbers(file: BinaryIO) -> None:
        arrays: dict[str, Any] = {name: _plain(x) for name, x in trajectory.items()}
        np.savez(file, allow_pickle=False, **arrays)

    def source(file: BinaryIO) -> None:
        file.write(text.encode())

    commit(path.with_suffix(".npz"), numbers)
    commit(path, source)


def _plain(values: np.ndarray) -> np.ndarray:
    """Return an array as NumPy can save it, which bfloat16 and its like are not."""
    array = np.asarray(values)
    return array.astype(np.float32) if array.dtype.kind == "V" else array


def _source(names: Mapping[str, Any]) -> str:
    """Return the expression of λ at a count, in nested tables."""
    if list(names) == [ALONE]:
        return f"schedule({ALONE!r})(count)"
    tree: dict[str, Any] = {}
    for name in names:
        *above, last = name.split(".")
        table = tree
        for part in above:
            table = table.setdefault(part, {})
        table[last] = name

    def written(node: Any) -> str:
        if isinstance(node, str):
            return f"schedule({node!r})(count)"
        return "{" + ", ".join(f"{key!r}: {written(value)}" for key, value in node.items()) + "}"

    return written(tree)
