"""A sweep as a study of Optuna: its trials, what they drew, and their metric by generation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from gradhpo.cluster.columns import TRIAL, VARIANT, setting
from gradhpo.cluster.distributions import Distribution
from gradhpo.cluster.numbers_of import number_of
from gradhpo.cluster.optuna_kinds import kind_of, spanning
from gradhpo.cluster.result import SweepResult
from gradhpo.files import Where
from gradhpo.observers.packages import load, require

__all__ = ["export_study"]

MADE = "gradhpo"
"""The attribute of a study that says which storage it was exported from."""


def export_study(storage: Where, url: str, name: str | None = None) -> Any:
    """Write a sweep, finished or running, as an Optuna study, in place of what was exported before.

    A trial that the scheduler replaced is "pruned", one that diverged "failed", and those of the
    last generation are "complete", or "running" while the sweep is. What PBT perturbs makes a new
    trial, so that a trial's parameters are those of its first generation.

    Args:
      storage: the sweep's folder.
      url: of Optuna's storage, such as `sqlite:///study.db`.
      name: of the study; by default the folder's.

    Returns:
      The `optuna.Study`.

    Raises:
      ImportError: without optuna.
      SweepError: if no generation is done.
      ValueError: if there is a study of this name that was not exported from this sweep.
    """
    require("export to Optuna", "optuna", "optuna")
    optuna = load("optuna")
    result = SweepResult.from_storage(storage)
    name = name or result.where.rstrip("/").rsplit("/", 1)[-1]
    trials = _Trials(optuna, result).frozen()
    if name in optuna.get_all_study_names(url):
        old = optuna.load_study(study_name=name, storage=url)
        if old.user_attrs.get(MADE) != result.where:
            raise ValueError(
                f"the study {name!r} in {url} was not exported from {result.where}: give another "
                "name"
            )
        optuna.delete_study(study_name=name, storage=url)
    directions = ["minimize" if s > 0 else "maximize" for s in result.objectives.signs.values()]
    study = optuna.create_study(study_name=name, storage=url, directions=directions)
    study.set_user_attr(MADE, result.where)
    study.set_user_attr("generations", result.generations)
    study.set_user_attr("metric", ", ".join(result.objectives.names))
    study.add_trials(trials)
    return study


class _Setting:
    """A number that is searched, over the whole study.

    Args:
      optuna: the package.
      about: by number of a combination of choices, its distribution, where it has one.
      first: of each trial, the number as it is stored; NaN where there is none.
      variant: of each trial, its combination.
    """

    def __init__(
        self, optuna: Any, about: Mapping[int, Distribution], first: np.ndarray, variant: np.ndarray
    ) -> None:
        self._about = about
        found = zip(first.tolist(), variant.tolist(), strict=True)
        values = [x for x in (self.value(*one) for one in found) if x is not None]
        one, *others = dict.fromkeys(about.values())
        # One parameter of a study has one kind.
        several = [one, *others]
        self.kind = spanning(optuna, several, values) if others else kind_of(optuna, one, values)

    def value(self, stored: float, variant: int) -> float | None:
        """Return what was drawn; None for what is no number any more, or never was there."""
        about = self._about.get(variant)
        return None if about is None or not np.isfinite(stored) else number_of(about, stored)


class _Trials:
    """All trials of a sweep, as Optuna has them."""

    def __init__(self, optuna: Any, result: SweepResult) -> None:
        self._optuna, self._space, self._objectives = optuna, result.space, result.objectives
        self._table = result.table
        self._sources = {copy.trial: copy.source for copy in result.copies}
        self._last = set(result.final[TRIAL].tolist())
        self._living = "COMPLETE" if result.complete else "RUNNING"
        order = np.argsort(self._table[TRIAL], kind="stable")
        starts = np.flatnonzero(np.diff(self._table[TRIAL][order], prepend=-1))
        self._rows = np.split(order, starts[1:])
        """Of each trial, by its number, its rows from the first generation on."""
        first = np.array([rows[0] for rows in self._rows])
        variant = self._table[VARIANT][first]
        self._settings = {
            name: _Setting(optuna, about, self._table[setting(name)][first].astype(float), variant)
            for name, about in self._space.kinds().items()
        }

    def frozen(self) -> list[Any]:
        """Return them in the order of their numbers."""
        return [self._frozen(rows) for rows in self._rows]

    def _frozen(self, rows: np.ndarray) -> Any:
        scores = np.stack([self._table[n][rows] for n in self._objectives.names], 1).astype(float)
        generations = self._table["generation"][rows]
        number = int(self._table[TRIAL][rows[0]])
        state = self._living if number in self._last else "PRUNED"
        if not np.isfinite(scores[-1]).all():
            state = "FAIL"
        about = {"trial": number, "slot": int(self._table["slot"][rows[-1]])}
        if number in self._sources:
            about["copied"] = self._sources[number]
        params, kinds = self._params(rows[0])
        # Optuna has values on the way of one metric alone.
        column = scores[:, 0] if not self._objectives.several else scores[:0, 0]
        pairs = zip(generations[: len(column)].tolist(), column.tolist(), strict=True)
        return self._optuna.trial.create_trial(
            state=self._optuna.trial.TrialState[state],
            values=scores[-1].tolist() if state in ("COMPLETE", "PRUNED") else None,
            params=params,
            distributions=kinds,
            intermediate_values={step: score for step, score in pairs if np.isfinite(score)},
            user_attrs=about,
        )

    def _params(self, row: int) -> tuple[dict[str, Any], dict[str, Any]]:
        params: dict[str, Any] = {}
        kinds: dict[str, Any] = {}
        variant = int(self._table[VARIANT][row])
        for name, about in self._settings.items():
            value = about.value(float(self._table[setting(name)][row]), variant)
            if value is not None:
                params[name or "hyperparams"], kinds[name or "hyperparams"] = value, about.kind
        for name, value in self._space.variants()[variant].items():
            params[name] = value
            kinds[name] = self._optuna.distributions.CategoricalDistribution(
                self._space.choices[name]
            )
        return params, kinds
