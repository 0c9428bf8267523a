"""`Solution`: what `solve` returns, and the best state that it saw."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradhpo import checkpoints, notebook
from gradhpo.errors import check_instance
from gradhpo.fingerprint import Fingerprint, settings
from gradhpo.optimizer import BilevelOptimizer
from gradhpo.problem import Problem
from gradhpo.program import Program
from gradhpo.saved import Packer, Unpacker
from gradhpo.state import BilevelState, PyTree
from gradhpo.timetable import Timetable
from gradhpo.trial import PHI, Trial

SHOWN = 10
"""Runs that a notebook shows."""


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
      data_state: where the host's batches stand, after those that the steps used: with `resume=`,
        an iterator with `get_state` and `set_state` goes on from there; None without host data, or
        where nothing is to be known. No leaf of the pytree.
      record_start: `{name: array}`, each `(…)`: the same of the λ before the first step.
      fingerprint: what tells the run's problem and optimizer from others, by which `resume=` sees
        that they are the same; None lets any go on.
      stopped: why the run ended before its last step: a condition of `stop`, the callback, who
        asked, a signal, the end of the data, a divergence; None where it did not. No leaf of the
        pytree.
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
    data_state: bytes | None = dataclasses.field(default=None, metadata={"static": True})
    record_start: dict[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    fingerprint: Fingerprint | None = dataclasses.field(default=None, metadata={"static": True})
    stopped: str | None = dataclasses.field(default=None, metadata={"static": True})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the solution to a file, whole or not at all; nothing in it is pickled.

        Args:
          path: the file, of the kind that `container` describes whatever its name; one of that name
            is replaced.

        Raises:
          OSError: if it cannot be written, a full disk included.
        """
        arrays, about = packed(self)
        checkpoints.write(Path(path), arrays, about)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], problem: Problem, optimizer: BilevelOptimizer
    ) -> Solution:
        """Return a solution that was saved, to the bit; `solve(resume=…)` goes on from it.

        Its trees of weights and optimizer states are built from the problem and the optimizer,
        whose functions are traced for that; nothing is compiled or computed.

        Args:
          path: what `save` was given.
          problem: the run's problem.
          optimizer: the run's optimizer.

        Raises:
          DamagedFile: if the file is missing, cut short or changed.
          ValueError: if it is of another problem or optimizer; what differs is named.
        """
        check_instance("problem", problem, Problem)
        check_instance("optimizer", optimizer, BilevelOptimizer)
        arrays, about = checkpoints.read(Path(path))
        runs, episodes = tuple(about["runs"]), about["episodes"]
        # Of the timetable, only whether there are episodes changes what a state holds.
        trial = Trial(problem.described(), optimizer, Timetable(1 if episodes else None, 0, 0))
        key = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), runs or 1))
        key = key if runs else jax.ShapeDtypeStruct((), key.dtype)
        needed = problem.reopens or optimizer.remembers_batch
        pair = problem.first_pair() if needed else None
        program = Program(trial, bool(runs))
        found = unpacked(arrays, about, templates(program, key, pair), str(path))
        if found.fingerprint is not None:
            found.fingerprint.check_optimizer(str(path), settings(optimizer))
        return found

    def __repr__(self) -> str:
        """Say in a few lines how the run ended; all of it would be thousands of numbers."""
        try:
            return self._ended()
        except (AttributeError, IndexError, TypeError, ValueError):  # a tree of shapes, or traced
            return f"Solution(steps={self.steps!r}), whose arrays have no values here"

    def _ended(self) -> str:
        runs = np.shape(self.diverged_at)
        why = "" if self.stopped is None else f", stopped: {self.stopped}"
        lines = [f"Solution: {self.steps} steps{f' of {runs[0]} runs' if runs else ''}{why}"]
        if self.best is not None:
            lines.append(f"best {self.best.metric} {_spread(self.best.score)}")
        lines += [f"{name} {_spread(x[-1])}" for name, x in self.metrics.items() if len(x)]
        if np.any(self.diverged_at):
            gone = np.count_nonzero(self.diverged_at)
            lines.append(
                f"diverged: {gone} of {runs[0]}" if runs else f"diverged at {self.diverged_at}"
            )
        return "\n  ".join(lines)

    def _repr_html_(self) -> str:
        """Show where the run ended, in a notebook; of several runs the first ones."""
        scores = {} if self.best is None else {f"best {self.best.metric}": self.best.score}
        scores |= {} if self.best is None else {"at step": self.best.step}
        ends = {name: row[-1] for name, row in self.metrics.items() if len(row)}
        columns = {**scores, **ends, "diverged at": self.diverged_at}
        runs = np.shape(self.diverged_at)
        head = ["run", *columns] if runs else list(columns)
        rows = [
            [*([run] if runs else []), *(f"{np.ravel(x)[run]:.6g}" for x in columns.values())]
            for run in range(min(runs[0], SHOWN) if runs else 1)
        ]
        why = "" if self.stopped is None else f", stopped: {self.stopped}"
        more = [f"and {runs[0] - SHOWN} runs more"] if runs and runs[0] > SHOWN else []
        return notebook.table(head, rows, title=f"{self.steps} steps{why}", below=more)

    def schedule(
        self, name: str, function: Callable[[Any], Any] | None = None, *, run: int | None = None
    ) -> Callable[[Any], jax.Array]:
        """Return λ(t) as an optax schedule, to train with what was found and without gradhpo.

        At count t it gives what was recorded of the λ that step t was taken with: before the first
        step, `record_start`. After the last step it stays at the last value.

        Args:
          name: of `record`.
          function: of a recorded value, traceable: `jnp.exp` where the logarithm was tuned.
          run: which run, with a batch of keys.

        Returns:
          A traceable function of the count, an integer `()`; it gives an array of the shape of
          one recorded value.

        Raises:
          ValueError: for a name that was not recorded, a run that there is not, or no step.
        """
        if name not in self.record or name not in self.record_start:
            there = (
                ", ".join(map(repr, self.record)) or "and nothing was (solve(record=…) says what)"
            )
            raise ValueError(f"name must be one of what was recorded, {there}; got {name!r}")
        values = self.trajectory(run=run)[name]

        def at(count: Any) -> jax.Array:
            value = jnp.asarray(values)[jnp.clip(count, 0, len(values) - 1)]
            return value if function is None else function(value)

        return at

    def trajectory(self, *, run: int | None = None) -> dict[str, np.ndarray]:
        """Return what was recorded of λ before each step, and after the last.

        Args:
          run: which run, with a batch of keys.

        Returns:
          `{name: array}`, each `(steps + 1, …)`; `export.write_script` makes a script of it.

        Raises:
          ValueError: for a run that there is not.
        """
        runs = np.shape(self.diverged_at)
        if (run is None) != (runs == ()) or (run is not None and run not in range(runs[0])):
            accepted = f"one of {runs[0]} runs" if runs else "None: there is one run"
            raise ValueError(f"run must be {accepted}, got {run}")
        which = () if run is None else (run,)
        diverged = int(np.asarray(self.diverged_at)[which])
        steps = diverged - 1 if diverged else self.steps
        found: dict[str, np.ndarray] = {}
        for name, start in self.record_start.items():
            rows = np.asarray(self.record[name])[:steps][(slice(None), *which)]
            found[name] = np.concatenate([np.asarray(start)[which][None], rows])
        return found


def _spread(values: Any) -> str:
    """Return a number, or of several runs the least and the greatest."""
    found = np.ravel(np.asarray(values, float))
    low, high = f"{found.min():.6g}", f"{found.max():.6g}"
    return low if found.size == 1 else f"from {low} to {high}"


def packed(solution: Solution) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return a solution as arrays by path, and what they are."""
    packer = Packer(_CLASSES, _TEMPLATED)
    spec = packer.pack(solution)
    if solution.stopped is None:  # older versions know no such field
        del spec[Solution.__name__]["stopped"]
    runs = list(np.shape(solution.diverged_at))
    return packer.arrays, {"solution": spec, "runs": runs, "episodes": solution.phi is not None}


def unpacked(
    arrays: Mapping[str, np.ndarray],
    about: Mapping[str, Any],
    like: Mapping[str, PyTree],
    source: str,
) -> Solution:
    """Return the solution that was packed.

    Args:
      arrays: of `packed`.
      about: of `packed`.
      like: from `templates`.
      source: how an error names the file.

    Raises:
      ValueError: if it is of another problem or optimizer.
    """
    return Unpacker(arrays, like, ("state", "phi"), _CLASSES, source).unpack(about["solution"])


def templates(program: Program, key: Any, pair: PyTree) -> dict[str, PyTree]:
    """Return shapes and dtypes of a run's trees, by field; the key's shape is enough."""
    data = None
    if program.trial.problem.data is not None:
        data = jax.eval_shape(program.data, key)
    state = jax.eval_shape(program.init, key, data, pair)
    evals = jax.eval_shape(program.evaluate, state, data)
    return {"state": state, "phi": state.metadata.get(PHI), "evals": evals}


_CLASSES = (Solution, Best, Fingerprint)
_TEMPLATED = ("state", "phi", "evals")


def check_resume(
    resume: Any, key: jax.Array, episode_length: int | None, name: str = "resume"
) -> None:
    """Raise if the solution is not one of a run with these keys and episodes."""
    if not isinstance(resume, Solution):
        raise TypeError(f"{name} must be a Solution, got {type(resume).__name__}")
    shape = np.shape(resume.diverged_at)
    if shape != key.shape:
        raise ValueError(f"{name} must be of a run with keys of shape {key.shape}, got {shape}")
    if resume.key_data is not None:
        had, has = np.asarray(resume.key_data), np.asarray(jax.random.key_data(key))
        if not np.array_equal(had, has):
            raise ValueError(
                f"{name} must be of a run with this key: its key has the numbers {had.tolist()}, "
                f"and key has {has.tolist()}"
            )
    if (resume.phi is None) != (episode_length is None):
        had, has = ("no", "has one") if resume.phi is None else ("an", "has none")
        raise ValueError(f"{name} is of a run with {had} episode_length, and this one {has}")


def check_same_names(what: str, now: dict[str, Any], before: dict[str, Any]) -> None:
    """Raise if rows of other names would be put after those that a resumed run has."""
    if sorted(now) != sorted(before):
        raise ValueError(
            f"{what} must be as in the run that is resumed, which has {sorted(before)}, "
            f"got {sorted(now)}"
        )
