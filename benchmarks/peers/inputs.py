"""What all peers read: data, batches and first weights, made by NumPy once and kept in one file."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np

ROWS, STEPS, UNROLL = 1000, 64, 20
"""Training rows, each with a weight σ(λ_i); steps with batches of their own; inner steps of one."""
BATCH = {"mlp": 256, "cnn": 64, "transformer": 64}


def write(path: Path) -> None:
    """Write the file."""
    rng = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {}
    teacher = rng.normal(size=(64, 10))
    for part in ("train", "val"):
        x = rng.normal(size=(ROWS, 64)) / 4
        logits = x @ teacher + rng.gumbel(size=(ROWS, 10))
        arrays[f"{part}.x"] = x.astype(np.float32)
        arrays[f"{part}.y"] = logits.argmax(1).astype(np.int32)
    for model, size in BATCH.items():
        drawn = rng.integers(0, ROWS, size=(2, STEPS, UNROLL, size), dtype=np.int32)
        arrays[f"{model}.index"], arrays[f"{model}.val_index"] = drawn[0], drawn[1, :, 0]
        for name, shape in _shapes(model).items():
            fan_in = math.prod(shape[:-1])
            first = rng.normal(size=shape) / math.sqrt(fan_in)  # 0 for biases
            arrays[f"{model}/{name}"] = (first * (len(shape) > 1)).astype(np.float32)
    with path.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def _shapes(model: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a model's weights by name, inputs first, outputs last."""
    if model == "mlp":
        sizes = (64, 256, 256, 10)
        shapes: dict[str, tuple[int, ...]] = {}
        for i, (n, m) in enumerate(itertools.pairwise(sizes)):
            shapes |= {f"w{i}": (n, m), f"b{i}": (m,)}
        return shapes
    if model == "cnn":
        return {"conv0": (3, 3, 1, 16), "conv1": (3, 3, 16, 32), "out": (32, 10)}
    shapes = {"embed": (8, 64), "position": (8, 64), "head": (64, 10)}
    for i in range(2):
        shapes |= {f"qkv{i}": (64, 192), f"out{i}": (64, 64)}
        shapes |= {f"up{i}": (64, 256), f"down{i}": (256, 64)}
    return shapes
