"""A sweep's decisions without its programs: real schedulers and samplers on a known function."""

import numpy as np

from gradhpo.cluster import RandomSearch
from gradhpo.cluster.controller import Layout, Rules, decide, first_plan, following
from gradhpo.cluster.drawing import Drawing, stored_in
from gradhpo.cluster.history import History
from gradhpo.cluster.objectives import Objectives
from gradhpo.cluster.schedulers import NEW

EVERY = RandomSearch(trial_generations=1)
"""New trials in every slot, after every generation."""


class Decided:
    """Generations of a population whose metrics are functions of what its trials began with.

    Args:
      space: of hyperparameters.
      metrics: by name of an objective to minimize, a function of the numbers as they are stored.
      drawing: where new trials come from.
    """

    def __init__(self, space, metrics, drawing=None, scheduler=EVERY, slots=6, seed=0):
        self.space, self.metrics, self.variants = space, metrics, len(space.variants())
        objectives = Objectives(dict.fromkeys(metrics, 1))
        self.rules = Rules(scheduler, space, seed, objectives, drawing or Drawing())
        self.layout = Layout(self.variants, self.variants, slots // self.variants)
        self.plan = first_plan(self.layout, self.rules)
        self.seen = []
        parts = [self.layout.population_of(variant) for variant in range(self.variants)]
        self.history = History(parts, space, objectives, self.seen.__getitem__)
        self.past = self.rules.drawing.past(space, objectives, seed, slots)
        given = self.rules.drawing.given(space, slots)
        self.past.begin_first(stored_in(self.plan.changes), given)
        self.now = {name: change.add for name, change in self.plan.changes.items()}
        self.drawn, self.scores = [self.now], []

    def columns(self):
        found = {name: function(**self.now) for name, function in self.metrics.items()}
        settings = {f"hyperparams.{name}": column for name, column in self.now.items()}
        plan = self.plan
        return {"trial": plan.trial, "born": plan.born, "parent": plan.parents, **found, **settings}

    def generation(self):
        """Run one, and let it be decided."""
        plan, columns = self.plan, self.columns()
        self.seen.append(columns)
        self.scores.append(np.stack([columns[name] for name in self.metrics], axis=1))
        tables = self.history.tables(plan.generation, columns)
        decision = decide(tables, plan, self.layout, self.rules, self.past)
        self.past.end(columns, plan.generation, decision.parents)
        fresh = decision.parents == NEW
        self.past.begin(
            plan.generation + 1, fresh, stored_in(decision.changes), np.zeros(len(fresh), bool)
        )
        self.plan = following(plan, decision, self.rules)
        source = np.where(fresh, 0, decision.parents)
        for name, (mask, multiply, add) in decision.changes.items():
            before = self.now[name][source]
            self.now = {**self.now, name: np.where(mask, before * multiply + add, before)}
        self.drawn.append(self.now)

    def run(self, generations):
        """Run some; return all scores, `(generations, slots, objectives)`."""
        for _ in range(generations):
            self.generation()
        return np.stack(self.scores)
