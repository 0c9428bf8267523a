"""Trackers by a word, as the command line has them."""

from __future__ import annotations

from collections.abc import Callable

from gradhpo.observers.csv_file import CSV
from gradhpo.observers.json_lines import JSONLines
from gradhpo.observers.mlflow import MLflow
from gradhpo.observers.tensorboard import TensorBoard
from gradhpo.observers.tracker import Tracker
from gradhpo.observers.wandb import WandB

KINDS: dict[str, Callable[[str], Tracker]] = {
    "csv": CSV,
    "json": JSONLines,
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "mlflow": MLflow,
}


def named(text: str) -> Tracker:
    """Return a tracker: `csv=FILE`, `wandb=PROJECT` and so on, by `KINDS`.

    Raises:
      ValueError: for another word, or nothing after it.
      ImportError: if its package is not installed.
    """
    kind, _, where = text.partition("=")
    if kind not in KINDS or not where:
        accepted = ", ".join(f"{name}=…" for name in KINDS)
        raise ValueError(f"track must be one of {accepted}, got {text!r}")
    return KINDS[kind](where)
