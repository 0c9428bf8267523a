"""A sweep's decisions without its programs: real schedulers and samplers on a known function."""

import numpy as np

from gradhpo.cluster import RandomSearch
from gradhpo.cluster.deciding import decide, follow, race
from gradhpo.cluster.drawing import Drawing, stored_in
from gradhpo.cluster.history import History
from gradhpo.cluster.objectives import Objectives
from gradhpo.cluster.plan import Layout, Rules, first_plan, following
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

    def __init__(self, space, metrics, drawing=None, scheduler=EVERY, slots=6, seed=0, shards=1):
        self.space, self.metrics = space, metrics
        objectives, variants = Objectives(dict.fromkeys(metrics, 1)), len(space.variants())
        self.rules = Rules(scheduler, space, seed, objectives, drawing or Drawing())
        shards *= variants
        self.layout = Layout(variants, shards, slots // shards, space.race is not None)
        self.plan = first_plan(self.layout, self.rules)
        self.seen = []
        about = (self.layout.beginning(), space, objectives)
        self.history = History(*about, self.seen.__getitem__)
        self.past = self.rules.drawing.past(space, objectives, seed, slots)
        given = self.rules.drawing.given(space, slots)
        self.past.begin_first(stored_in(self.plan.changes), given, self.plan.variant)
        self.now = stored_in(self.plan.changes)
        self.drawn, self.scores, self.tables, self.decided = [self.now], [], [], []

    def columns(self):
        found = {name: function(**self.now) for name, function in self.metrics.items()}
        settings = {f"hyperparams.{name}": column for name, column in self.now.items()}
        plan = self.plan
        about = {"trial": plan.trial, "born": plan.born, "parent": plan.parents}
        return {**about, "variant": plan.variant, **found, **settings}

    def generation(self):
        """Run one, and let it be decided."""
        plan, columns = self.plan, self.columns()
        self.seen.append(columns)
        self.scores.append(np.stack([columns[name] for name in self.metrics], axis=1))
        self.tables.append(self.history.tables(plan.generation, columns))
        decision = decide(self.tables[-1], plan, self.layout, self.rules, self.past)
        decided = race(columns, plan, decision, self.layout, self.rules, self.past)
        follow(self.past, plan, columns, decided)
        self.decided.append(decided)
        self.plan = following(plan, decided, self.rules)
        source = np.maximum(decided.decision.parents, 0)
        for name, (mask, multiply, add) in decided.decision.changes.items():
            before = np.where(decided.decision.parents == NEW, np.nan, self.now[name][source])
            moved = np.where(multiply == 0, add, before * multiply + add)
            self.now = {**self.now, name: np.where(mask, moved, before)}
        self.drawn.append(self.now)

    def run(self, generations):
        """Run some; return all scores, `(generations, slots, objectives)`."""
        for _ in range(generations):
            self.generation()
        return np.stack(self.scores)
