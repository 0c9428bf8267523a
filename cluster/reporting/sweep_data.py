"""All that a page shows of a sweep."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from gradhpo import saved_diagnosis
from gradhpo._version import __version__
from gradhpo.cluster.discrete import Categorical, Choice, Integer
from gradhpo.cluster.distributions import Distribution, Uniform
from gradhpo.cluster.reporting import descent, kept_trial
from gradhpo.cluster.reporting.ends import Ends, ends
from gradhpo.cluster.reporting.followed import Followed
from gradhpo.cluster.reporting.importance import importance, places
from gradhpo.cluster.reporting.kept_rows import MOST_NUMBERS, rows_of
from gradhpo.cluster.storage import Storage
from gradhpo.files import Where
from gradhpo.page import packed, plain

MOST_TRIALS = 3000
"""Lines of the parallel coordinates: the best, and an even sample of all others."""
MOST_DIVERGED = 300
"""Trials that are listed, the last ones."""


class SweepData:
    """What a page shows of a sweep, as JSON; each file of its storage is read once.

    Args:
      storage: the sweep's folder, or its address.

    Raises:
      SweepError: if there is no sweep, or its manifest is damaged.
    """

    def __init__(self, storage: Where) -> None:
        self._followed = Followed(storage)
        self._leaves: tuple[Any, dict[str, Any]] = (None, {})
        """λ of the trial that was the best when somebody looked last."""
        self._made: tuple[Any, dict[str, Any]] = (None, {})
        """What follows from the generations of an epoch, which are the first part."""

    def whole(self) -> dict[str, Any]:
        """Return all of it, thinned where it is too much for a file."""
        self._followed.look()
        return plain(self._about() | {"rows": rows_of(self._followed, 0, MOST_NUMBERS)})

    def since(self, generations: int, epoch: int) -> dict[str, Any]:
        """Return what is new to a page with so many generations of an epoch; all to any other."""
        self._followed.look()
        known = generations if epoch == self._followed.epoch else 0
        first = min(max(0, known), len(self._followed.generations))
        return plain(self._about() | {"rows": rows_of(self._followed, first)})

    def _about(self) -> dict[str, Any]:
        followed = self._followed
        known, done = followed.known, len(followed.generations)
        who = followed.storage.files.holder()
        return {
            "kind": "sweep",
            "title": followed.storage.files.address.rstrip("/").rsplit("/", 1)[-1],
            "where": followed.storage.files.address,
            "made": time.time(),
            "version": __version__,
            "epoch": followed.epoch,
            "done": done,
            "total": known["generations"],
            "running": who,
            "stopped": None if followed.last is None else followed.last.get("stopped"),
            "population": followed.layout.population,
            "steps": known["steps_per_generation"],
            "objectives": [{"name": n, "sign": s} for n, s in followed.objectives.signs.items()],
            "metrics": followed.metrics,
            "space": [_setting(n, kinds) for n, kinds in followed.space.kinds().items()],
            "choices": followed.space.variants(),
            "ended": [[e["generation"], one] for e in followed.told for one in e.get("ended", ())],
            "changes": [[e["generation"], w] for e in followed.told for w in e.get("changes", ())],
            "damaged": followed.damaged,
            "costs": followed.costs.described([x for x in followed.seconds if np.isfinite(x)]),
            "settings": kept_trial.shown_settings(known),
            "diagnosis": saved_diagnosis.shown(followed.storage.files),
            **self._derived(),
        }

    def _derived(self) -> dict[str, Any]:
        """Return what follows from the generations; made when there are others than before."""
        followed = self._followed
        now = followed.epoch, len(followed.generations)
        if self._made[0] != now:
            last, of = ends(followed), followed.generations
            tree = descent.tree([x.trial for x in of], [x.parent for x in of])
            made = {
                "kept": [kept_trial.described(followed, one, tree) for one in followed.found],
                "leaves": self._best_leaves(),
                "path": self._path(),
                "tree": tree.described(),
                "trials": self._trials(last),
                "importance": self._importance(last),
                "diverged": self._diverged(last),
            }
            self._made = now, made
        return self._made[1]

    def _best_leaves(self) -> dict[str, Any]:
        if not self._followed.found:
            return {}
        best = self._followed.found[0]
        if self._leaves[0] != best.checkpoint:
            self._leaves = best.checkpoint, kept_trial.leaves(self._followed, best)
        return self._leaves[1]

    def _path(self) -> dict[str, Any] | None:
        found = self._followed.found
        return kept_trial.path(self._followed, found[0]) if found else None

    def _trials(self, last: Ends) -> dict[str, Any]:
        """Return the ends of trials, those with the best first objective before all others."""
        name, sign = next(iter(self._followed.objectives.signs.items()))
        score = self._measured(last, name) * sign
        order = np.argsort(np.where(np.isfinite(score), score, np.inf), kind="stable")
        best, others = order[: MOST_TRIALS // 3], order[MOST_TRIALS // 3 :]
        most = MOST_TRIALS - len(best)
        if len(others) > most:
            others = others[np.linspace(0, len(others) - 1, most).astype(int)]
        shown = last.some(np.concatenate([best, others]))
        numbers = {n: self._measured(shown, n) for n in self._followed.objectives.names}
        settings = {n: self._set(shown, n) for n in self._followed.space.kinds()}
        return {
            "of": len(last.trial),
            "trial": packed(shown.trial, "<i4"),
            "generation": packed(shown.generation, "<i4"),
            "slot": packed(shown.slot, "<i4"),
            "variant": packed(shown.variant, "<u2"),
            "scores": {n: packed(x) for n, x in numbers.items()},
            "settings": {n: packed(x) for n, x in settings.items()},
        }

    def _importance(self, last: Ends) -> dict[str, Any]:
        """Return by objective the importance of settings and choices."""
        followed = self._followed
        settings = {n: self._set(last, n) for n in followed.space.kinds()}
        choices = {n: self._chosen(last, n) for n in followed.space.choices}
        made: dict[str, Any] = {}
        for name, sign in followed.objectives.signs.items():
            place = places(self._measured(last, name) * sign, last.generation)
            found = importance(settings | choices, place, tuple(choices))
            made[name] = {n: one._asdict() for n, one in found.items()}
        return made

    def _chosen(self, last: Ends, name: str) -> np.ndarray:
        values = list(self._followed.space.choices[name])
        of = np.array([values.index(one[name]) for one in self._followed.space.variants()], float)
        return of[last.variant]

    def _diverged(self, last: Ends) -> dict[str, Any]:
        which = np.flatnonzero(last.diverged > 0)
        shown = last.some(which[-MOST_DIVERGED:])
        settings = {n: packed(self._set(shown, n)) for n in self._followed.space.kinds()}
        return {
            "of": len(which),
            "trial": packed(shown.trial, "<i4"),
            "generation": packed(shown.generation, "<i4"),
            "step": packed(shown.diverged, "<i4"),
            "settings": settings,
        }

    def _measured(self, last: Ends, name: str) -> np.ndarray:
        return self._of(last, lambda g: self._followed.column(name, g))

    def _set(self, last: Ends, name: str) -> np.ndarray:
        return self._of(last, lambda g: self._followed.setting(name, g))

    def _of(self, last: Ends, rows: Any) -> np.ndarray:
        made = np.full(len(last.trial), np.nan)
        for generation in np.unique(last.generation).tolist():
            here = last.generation == generation
            made[here] = rows(generation)[last.slot[here]]
        return made


def _setting(name: str, kinds: Mapping[int, Distribution]) -> dict[str, Any]:
    """Return a setting's name, in words what it may be, and whether its axis is logarithmic."""
    log = all(isinstance(about, Uniform | Integer) and about.log for about in kinds.values())
    whole = all(isinstance(about, Integer | Choice | Categorical) for about in kinds.values())
    words = dict.fromkeys(json.dumps(about.describe()) for about in kinds.values())
    return {"name": name, "label": name or "λ", "log": log, "whole": whole, "drawn": [*words]}


def is_sweep(storage: Where) -> bool:
    """Whether a sweep's manifest is there."""
    return Storage(storage).manifest.exists()
