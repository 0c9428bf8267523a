"""`Solution`: what `solve` returns, and the best state that it saw."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from gradhpo.state import BilevelState, PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Best:
    """The best evaluation of a run; with a batch of n keys of each run, a leading axis of n.

    Attributes:
      state: the `BilevelState` at that evaluation.
      score: `()`: the metric there; NaN if it never was a number.
      step: int `()`: how many steps had been taken.
      metric: what was compared.
      mode: "min" or "max".
    """

    state: BilevelState
    score: np.ndarray
    step: np.ndarray
    metric: str = dataclasses.field(default="val_loss", metadata={"static": True})
    mode: str = dataclasses.field(default="min", metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Solution:
    """What `solve` returns, and what it goes on from with `resume=`. A pytree.

    With a batch of n keys, `state`, `phi`, `best` and `diverged_at` have a leading axis of length
    n, and `metrics`, `evals` and `record` have it after the axis of steps.

    Attributes:
      state: the `BilevelState` after the last step: `state.hyperparams` is the λ that was found,
        `state.params` are its weights.
      metrics: `{name: array}`, each `(steps,)`: "train_loss", "val_loss", "hypergrad_norm",
        "param_norm", "hyperparam_norm" and what the method adds ("theta" of HyperDistill), of
        every step; NaN from a divergence on, and so with a row more than `steps` in a run of one
        key that has diverged.
      evals: `{name: array}`: what `Problem.metrics` returned at each evaluation,
        `(evaluations, …)`, or a tree of such arrays; empty without.
      eval_steps: int `(evaluations,)`: how many steps had been taken at each evaluation.
      steps: int: steps taken in all, those before a `resume` included.
      phi: with episodes, the initialization of the current episode, shaped like the weights; None
        without.
      diverged_at: int `()`: the step, counted from 1, at which a metric first was not finite; 0 for
        never.
      key_data: uint32: the numbers of the run's key or keys (`jax.random.key_data`), by which
        `resume=` sees that it is the same run; None lets any key go on.
      best: the `Best` of all evaluations, by `solve(metric=…, mode=…)`: its `state`, `score` and
        `step`.
      record: `{name: array}`, each `(steps, …)`: what `solve(record=…)` kept of λ after every step;
        by default its scalar leaves, by their path.
    """

    state: BilevelState
    metrics: dict[str, np.ndarray]
    evals: dict[str, Any]
    eval_steps: np.ndarray
    steps: int
    phi: PyTree
    diverged_at: np.ndarray
    key_data: np.ndarray | None = None
    best: Best | None = None
    record: dict[str, Any] = dataclasses.field(default_factory=dict[str, Any])


def check_resume(resume: Any, key: jax.Array, episode_length: int | None) -> None:
    """Raise if the solution is not one of a run with these keys and episodes."""
    if not isinstance(resume, Solution):
        raise TypeError(f"resume must be a Solution, got {type(resume).__name__}")
    shape = np.shape(resume.diverged_at)
    if shape != key.shape:
        raise ValueError(f"resume must be of a run with keys of shape {key.shape}, got {shape}")
    if resume.key_data is not None:
        had, has = np.asarray(resume.key_data), np.asarray(jax.random.key_data(key))
        if not np.array_equal(had, has):
            raise ValueError(
                f"resume must be of a run with this key: its key has the numbers {had.tolist()}, "
                f"and key has {has.tolist()}"
            )
    if (resume.phi is None) != (episode_length is None):
        had, has = ("no", "has one") if resume.phi is None else ("an", "has none")
        raise ValueError(f"resume is of a run with {had} episode_length, and this one {has}")


def check_same_names(what: str, now: dict[str, Any], before: dict[str, Any]) -> None:
    """Raise if rows of other names would be put after those that a resumed run has."""
    if sorted(now) != sorted(before):
        raise ValueError(
            f"{what} must be as in the run that is resumed, which has {sorted(before)}, "
            f"got {sorted(now)}"
        )
