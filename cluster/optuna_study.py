"""A sweep as a study of Optuna: its trials, what they drew, and their metric by generation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from gradhpo.cluster.columns import TRIAL, VARIANT, setting
from gradhpo.cluster.distributions import Choice, Distribution
from gradhpo.cluster.result import SweepResult
from gradhpo.files import Where
from gradhpo.observers.packages import load, require

MADE = "gradhpo"
"""The attribute of a study that says which storage it was exported from."""
CLOSE = 1e-6
"""How far a float32 may be from the choice that it stands for, relatively."""


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
    direction = "minimize" if result.sign > 0 else "maximize"
    study = optuna.create_study(study_name=name, storage=url, direction=direction)
    study.set_user_attr(MADE, result.where)
    study.set_user_attr("generations", result.generations)
    study.set_user_attr("metric", result.metric)
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
        self._about, kinds = about, optuna.distributions
        found = zip(first.tolist(), variant.tolist(), strict=True)
        values = [x for x in (self.value(*one) for one in found) if x is not None]
        several = list(dict.fromkeys(about.values()))
        if (
            len(several) == 1
            and isinstance(one := several[0], Choice)
            and set(values) <= set(one.values)
        ):
            self.kind = kinds.CategoricalDistribution(one.values)
            return
        # One parameter of a study has one kind. Hypergradients may lead out of the bounds.
        bounds = [x for one in several for x in _bounds(one)]
        low, high = min(*bounds, *values), max(*bounds, *values)
        log = low > 0 and all(not isinstance(one, Choice) and one.log for one in several)
        self.kind = kinds.FloatDistribution(low, high, log=log)

    def value(self, stored: float, variant: int) -> float | None:
        """Return what was drawn; None for what is no number any more, or never was there."""
        about = self._about.get(variant)
        if about is None or not np.isfinite(stored):
            return None
        if isinstance(about, Choice):
            near = min(about.values, key=lambda known: abs(known - stored))
            return near if np.isclose(near, stored, rtol=CLOSE, atol=0) else stored
        return float(np.exp(stored)) if about.stored == "log" else stored


def _bounds(about: Distribution) -> tuple[float, float]:
    return about.bounds if isinstance(about, Choice) else (about.low, about.high)


class _Trials:
    """All trials of a sweep, as Optuna has them."""

    def __init__(self, optuna: Any, result: SweepResult) -> None:
        self._optuna, self._space, self._metric = optuna, result.space, result.metric
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
        of = [self._space.of(one).settings() for one in self._space.variants()]
        self._settings = {
            name: _Setting(
                optuna,
                {number: known[name] for number, known in enumerate(of) if name in known},
                self._table[setting(name)][first].astype(float),
                variant,
            )
            for name in self._space.names()
        }

    def frozen(self) -> list[Any]:
        """Return them in the order of their numbers."""
        return [self._frozen(rows) for rows in self._rows]

    def _frozen(self, rows: np.ndarray) -> Any:
        scores = self._table[self._metric][rows].astype(float)
        generations = self._table["generation"][rows]
        number = int(self._table[TRIAL][rows[0]])
        state = self._living if number in self._last else "PRUNED"
        if not np.isfinite(scores[-1]):
            state = "FAIL"
        about = {"trial": number, "slot": int(self._table["slot"][rows[-1]])}
        if number in self._sources:
            about["copied"] = self._sources[number]
        params, kinds = self._params(rows[0])
        pairs = zip(generations.tolist(), scores.tolist(), strict=True)
        return self._optuna.trial.create_trial(
            state=self._optuna.trial.TrialState[state],
            value=scores[-1].item() if state in ("COMPLETE", "PRUNED") else None,
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
