"""Sweeps that are not computed: what recorded tables say that settings do to a score."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from gradhpo.cluster.deciding import decide
from gradhpo.cluster.history import History
from gradhpo.cluster.objectives import Objectives
from gradhpo.cluster.plan import Layout, Next, Rules, first_plan, following
from gradhpo.cluster.schedulers import NEW
from tests.record_sweeps import FILE, SPACE

NEAREST = 3
"""Recorded generations of which one is taken at random."""
PULL = 0.5
"""How much of a score's distance to the recorded one stays."""


@dataclasses.dataclass(frozen=True)
class Steps:
    """Generations that were recorded: settings, the score's logarithm before and after."""

    settings: np.ndarray
    """`(n, d)`, from 0 to 1."""
    before: np.ndarray
    after: np.ndarray
    """NaN where the trial diverged."""

    def taken(self, settings, before, rng):
        """Return the scores' logarithms after such a generation, by one of the nearest."""
        apart = ((settings[:, None] - self.settings) ** 2).sum(2)
        apart += (before[:, None] - self.before) ** 2
        nearest = np.argsort(apart, axis=1, kind="stable")[:, :NEAREST]
        one = nearest[np.arange(len(nearest)), rng.integers(NEAREST, size=len(nearest))]
        return self.after[one] + PULL * (before - self.before[one])


def unit(values):
    """Return settings from 0 to 1."""
    return np.concatenate([kind.unit(values[n]) for n, kind in SPACE.settings().items()], axis=1)


@functools.cache
def recorded(sweep):
    """Return a recorded sweep's columns, each `(generations, slots)`."""
    with np.load(FILE) as file:
        names = [name for name in file.files if name.startswith(sweep)]
        columns = {name.removeprefix(f"{sweep}."): file[name] for name in names}
    whole = {"trial", "born", "parent"}
    return {n: x.astype(np.int64 if n in whole else float) for n, x in columns.items()}


@functools.cache
def steps():
    """Return the first generations of trials, and the later ones, of both sweeps."""
    parts = {True: [], False: []}
    for sweep in ("pbt", "random"):
        columns = recorded(sweep)
        score = np.log(columns["val_loss"])
        for generation, parents in enumerate(columns["parent"]):
            values = {n: columns[f"hyperparams.{n}"][generation] for n in SPACE.settings()}
            before = score[generation - 1][parents] if generation else np.zeros(len(parents))
            for fresh in (True, False):
                some = ((parents == NEW) == fresh) & np.isfinite(np.where(fresh, 0, before))
                parts[fresh].append((unit(values)[some], before[some], score[generation][some]))
    made = {f: [np.concatenate(x) for x in zip(*p, strict=True)] for f, p in parts.items()}
    first = made[True][0], np.zeros(len(made[True][1])), made[True][2]
    return Steps(*first), Steps(*made[False])


def replay(scheduler, seed, slots=16, generations=16):
    """Return the best score so far after each generation of a sweep that is not computed."""
    layout, rules = Layout(1, 1, slots), Rules(scheduler, SPACE, seed, Objectives({"val_loss": 1}))
    tables, best = [], []
    about = (layout.beginning(), SPACE, rules.objectives)
    history = History(*about, tables.__getitem__)
    plan, first, later = first_plan(layout, rules), *steps()
    values, score = {n: np.zeros(slots) for n in SPACE.settings()}, np.zeros(slots)
    for generation in range(generations):
        source = np.maximum(plan.parents, 0)
        for name, kind in SPACE.settings().items():
            mask, multiply, add = plan.changes[name]
            moved = np.clip(values[name][source] * multiply + add, *kind.bounds)
            values[name] = np.where(mask, moved, values[name][source])
        rng = np.random.default_rng([seed, generation, 1])
        fresh, at = plan.parents == NEW, unit(values)
        gone_on = later.taken(at, np.nan_to_num(score[source]), rng)
        score = np.where(fresh, first.taken(at, np.zeros(slots), rng), gone_on)
        columns = {"trial": plan.trial, "born": plan.born, "parent": plan.parents}
        columns |= {"val_loss": np.exp(score)}
        columns |= {f"hyperparams.{name}": column for name, column in values.items()}
        tables.append(columns)
        decision = decide(history.tables(generation, columns), plan, layout, rules)
        best.append(np.nanmin(columns["val_loss"]))
        plan = following(plan, Next(decision, plan.variant), rules)
    return np.minimum.accumulate(best)
