"""`OptunaSampler`: the samplers of Optuna, asked and told generation by generation."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Generator
from typing import Any

import numpy as np

from gradhpo.cluster import importing
from gradhpo.cluster.discrete import Integer
from gradhpo.cluster.optuna_kinds import kind_of
from gradhpo.cluster.samplers.drawn import Drawn
from gradhpo.cluster.space import SearchSpace
from gradhpo.observers.packages import load, require

ENDS = ("GridSampler", "BruteForceSampler")
"""What ends a study when it is through, and so is none for a sweep."""

REHEARSED = 12
"""Trials of a rehearsal: most samplers draw at random for ten before they do what they are."""


class OptunaSampler:
    """Draws new trials by a sampler of Optuna (`pip install optuna`, or the extra `trackers`).

    Each population has a study in memory. A new trial of the sweep is asked of it; when another
    takes the trial's slot, it is told the trial's last scores, minimized (and that it was pruned,
    without any, where it had diverged). Several objectives make a study of several directions.

    The study is no part of a storage: it is made again by asking and telling the same in the same
    order, and what is asked again must be what was drawn, or that is an error. So a sampler with a
    state of its own (CMA-ES, a Sobol sequence) goes on where it was, and the promise holds, as long
    as the versions of Optuna and of what it computes with stay.

    Args:
      kind: the name of a class in `optuna.samplers`, or a reference to one,
        "package.module:name".
      **settings: its arguments, of numbers, strings, booleans and lists; `seed` is the sweep's,
        unless it is given.

    Raises:
      TypeError, ValueError: naming the argument.
    """

    def __init__(self, kind: str = "TPESampler", **settings: Any) -> None:
        if not isinstance(kind, str):
            accepted = 'the name of one of optuna.samplers, such as "TPESampler"'
            raise TypeError(f"OptunaSampler: kind must be {accepted}, got {kind!r}")
        if ":" in kind:
            importing.check_reference("OptunaSampler: kind", kind)
        if kind in ENDS:
            raise ValueError(
                f"OptunaSampler: {kind} ends when it is through, and a sweep goes on; "
                'take "QMCSampler" or "RandomSampler"'
            )
        try:
            json.dumps(settings)
        except TypeError as error:
            what = f"settings must be of numbers, strings, booleans and lists, got {settings!r}"
            raise TypeError(f"OptunaSampler: {what}: {error}") from None
        self.kind, self.settings = kind, settings
        self._studies: dict[int, _Study] = {}
        """By seed, which each population has its own of: so that not all is replayed every time."""

    def __repr__(self) -> str:
        """Return it as it is made."""
        settings = [f"{name}={value!r}" for name, value in self.settings.items()]
        return f"OptunaSampler({', '.join([repr(self.kind), *settings])})"

    def describe(self) -> dict[str, Any]:
        """Return it as it is written in TOML."""
        return {"name": "OptunaSampler", "kind": self.kind, **self.settings}

    def make(self, seed: int) -> Any:
        """Return the sampler of Optuna.

        Raises:
          ImportError: without optuna.
          ValueError: if it has no such sampler, or that does not take the settings.
        """
        require("OptunaSampler", "optuna", "optuna")
        samplers = load("optuna").samplers
        made = importing.load(self.kind) if ":" in self.kind else getattr(samplers, self.kind, None)
        if made is None:
            known = ", ".join(n for n in samplers.__all__ if n.endswith("Sampler"))
            raise ValueError(f"OptunaSampler: kind must be one of {known}, got {self.kind!r}")
        try:
            with _quiet():
                return made(**{"seed": seed, **self.settings})
        except TypeError as error:
            raise ValueError(f"OptunaSampler: {self.kind}: {error}") from None

    def rehearse(self, space: SearchSpace, objectives: int) -> None:
        """Ask and tell as a sweep of this space will, so that what fails does before it begins.

        Raises:
          ImportError: without a package that the sampler takes, such as cmaes.
          ValueError: if it does not draw from this space, or for so many objectives.
        """
        with _quiet():
            for combination in space.variants():
                study = _Study(self.make(0), space.of(combination), objectives)
                try:
                    study.rehearse(REHEARSED, [0.0] * objectives)
                except ImportError as error:
                    raise ImportError(f"OptunaSampler: {self.kind}: {error}") from error
                except Exception as error:
                    raise ValueError(f"OptunaSampler: {self.kind}: {error}") from error

    def ask(
        self, space: SearchSpace, history: Drawn, rng: np.random.Generator, n: int
    ) -> dict[str, np.ndarray]:
        """Return what Optuna draws."""
        del rng  # the sampler has its own, that goes on
        with _quiet():
            study = self._studies.get(history.seed)
            if study is None or not study.is_before(history):
                study = _Study(self.make(history.seed), space, history.scores.shape[1])
                self._studies[history.seed] = study
            study.follow(history)
            return study.ask(len(history), n)


class _Study:
    """A study of Optuna, and what it was asked and told, in order."""

    def __init__(self, sampler: Any, space: SearchSpace, objectives: int) -> None:
        optuna = load("optuna")
        self._study = optuna.create_study(directions=["minimize"] * objectives, sampler=sampler)
        self._pruned = optuna.trial.TrialState.PRUNED
        self._kinds = {name: kind_of(optuna, about) for name, about in space.searched().items()}
        self._whole = {n for n, about in space.searched().items() if isinstance(about, Integer)}
        self._done: list[_Step] = []
        self._pending: list[int] = []
        """Rows that were asked for, and that no history has told of yet."""
        self._trials: list[Any] = []

    def rehearse(self, trials: int, scores: list[float]) -> None:
        """Ask for trials and tell them, one after the other."""
        for row in range(trials):
            self._ask()
            self._tell(row, scores)

    def is_before(self, history: Drawn) -> bool:
        """Whether all that was asked and told here is the beginning of what the history says."""
        steps, done = _steps(history), len(self._done)
        asked = [row for _, told, row, _ in steps[done : done + len(self._pending)] if not told]
        return steps[:done] == self._done and asked == self._pending

    def follow(self, history: Drawn) -> None:
        """Ask and tell what has not been yet."""
        for step in _steps(history)[len(self._done) :]:
            _, told, row, _ = step
            if told:
                self._tell(row, history.scores[row].tolist())
            else:
                self._have(row, history)
            self._done.append(step)
        self._pending = []

    def ask(self, first: int, n: int) -> dict[str, np.ndarray]:
        """Ask for n new trials, whose rows begin with `first`."""
        drawn = [self._ask() for _ in range(n)]
        self._pending = list(range(first, first + n))
        return {name: np.array([params[name] for params in drawn], float) for name in self._kinds}

    def _ask(self, **given: float) -> dict[str, float]:
        if given:
            whole = self._whole
            self._study.enqueue_trial({n: int(x) if n in whole else x for n, x in given.items()})
        self._trials.append(self._study.ask(self._kinds))
        return self._trials[-1].params

    def _have(self, row: int, history: Drawn) -> None:
        """See that a trial of the sweep was asked for: from its points, or as it drew before."""
        known = {name: float(column[row]) for name, column in history.values.items()}
        if row == len(self._trials):
            self._ask(**(known if history.given[row] else {}))
        drawn = self._trials[row].params
        for name, value in known.items():
            if not np.isclose(drawn[name], value, rtol=1e-6, atol=0):
                raise ValueError(
                    f"OptunaSampler drew {name} = {drawn[name]:.9g} again where it had drawn "
                    f"{value:.9g}: another version of Optuna, or of what it computes with? Go on "
                    "with those that the sweep began with"
                )

    def _tell(self, row: int, scores: list[float]) -> None:
        if np.isfinite(scores).all():
            self._study.tell(self._trials[row], scores)
        else:
            self._study.tell(self._trials[row], state=self._pruned)


_Step = tuple[int, bool, int, tuple[float, ...]]
"""A generation, whether something is told or asked before it, of which row, and which numbers."""


def _steps(history: Drawn) -> list[_Step]:
    """Return what is told and asked, in order: before a generation first what has ended is told."""
    steps: list[_Step] = []
    for row, (born, age, ended, given) in enumerate(
        zip(history.born, history.age, history.ended, history.given, strict=True)
    ):
        values = tuple(float(column[row]) for column in history.values.values()) if given else ()
        steps.append((int(born), False, row, values))
        if ended:
            scores = np.nan_to_num(history.scores[row], nan=np.inf)  # NaN is not equal to itself
            steps.append((int(born + age), True, row, tuple(scores.tolist())))
    return sorted(steps, key=lambda step: (step[0], not step[1], step[2]))


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """Let Optuna not say that a study was made, nor that a setting is an experiment of theirs."""
    optuna = load("optuna")
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(max(before, optuna.logging.WARNING))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)
