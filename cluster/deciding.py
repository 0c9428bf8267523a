"""What is decided after a generation, by its table: who goes on, with which settings, and where.

Pure functions of the tables and the seed.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from gradhpo.cluster.columns import Columns
from gradhpo.cluster.drawing import stored_in
from gradhpo.cluster.failures import SweepError
from gradhpo.cluster.plan import Layout, Next, Plan, Rules, unchanged
from gradhpo.cluster.race import rung
from gradhpo.cluster.samplers import Drawn
from gradhpo.cluster.samplers.past import Past
from gradhpo.cluster.schedulers import NEW, Decision, Table
from gradhpo.cluster.schedulers.decision import check as check_decision
from gradhpo.cluster.space import Change, Changes, SearchSpace


def decide(
    tables: Mapping[int, Table], plan: Plan, layout: Layout, rules: Rules, past: Past | None = None
) -> Decision:
    """Ask the scheduler about each variant's population, and draw the settings of new trials.

    Args:
      tables: of each variant that is left, after the generation.
      plan: of the generation.
      layout: the slots.
      rules: what decides.
      past: what a sampler is told of, up to the generation before.

    Raises:
      SweepError: if the scheduler or the sampler fails, or returns something that does not fit.
    """
    parents, changes = np.arange(layout.population), _no_changes(layout.population, rules.space)
    for variant, table in tables.items():
        part, space = np.flatnonzero(plan.variant == variant), _space_of(variant, rules)
        settings = space.settings()
        rng = np.random.default_rng([rules.seed, plan.generation + 1, variant])
        try:
            made = check_decision(rules.scheduler(table, space, rng), len(part), settings)
        except SweepError:
            raise
        except Exception as error:
            what = f"the scheduler failed after generation {plan.generation}"
            raise SweepError(f"{what}: {type(error).__name__}: {error}") from error
        fresh = made.parents == NEW
        parents[part] = np.where(fresh, NEW, part[made.parents])
        history = past and past.history(variant, table, parents)
        drawn = _drawn(rules, plan, space, rng, fresh, history) if fresh.any() else {}
        for name in settings:
            for change in (made.changes.get(name), drawn.get(name)):
                if change is not None:
                    _merge(changes[name], change, part)
    return Decision(parents, changes)


def _drawn(
    rules: Rules,
    plan: Plan,
    space: SearchSpace,
    rng: np.random.Generator,
    fresh: np.ndarray,
    history: Drawn | None,
) -> Changes:
    try:
        return rules.drawing.changes(space, rng, fresh, history)
    except Exception as error:
        what = f"the sampler failed after generation {plan.generation}"
        raise SweepError(f"{what}: {type(error).__name__}: {error}") from error


def race(
    columns: Columns,
    plan: Plan,
    decision: Decision,
    layout: Layout,
    rules: Rules,
    past: Past | None = None,
) -> Next:
    """Let combinations of choices end where that is due, and others have their slots.

    The slots that change hands get new trials, whatever the scheduler decided for them.

    Args:
      columns: of the generation.
      plan: of the generation.
      decision: the schedulers'.
      layout: the slots.
      rules: what decides.
      past: what a sampler is told of, up to the generation before.

    Raises:
      SweepError: if the sampler fails.
    """
    if rules.space.race is None:
        return Next(decision, plan.variant)
    score = rules.objectives.score(columns).reshape(layout.shards, layout.slots)
    held = plan.variant[:: layout.slots]
    found = rung(rules.space.race, plan.generation + 1, layout.variants, held, score)
    variant = np.repeat(found.variant, layout.slots)
    left = Next(_left(decision, variant != plan.variant), variant, found.ended)
    if past is not None:
        past = past.copied()
        _end(past, plan, columns, left)
    return left._replace(decision=_handed_over(left, plan, layout, rules, past))


def _left(decision: Decision, taken: np.ndarray) -> Decision:
    """Return what is left of a decision where slots change hands."""
    changes = {
        name: Change(change.mask & ~taken, change.multiply.copy(), change.add.copy())
        for name, change in decision.changes.items()
    }
    return Decision(np.where(taken, NEW, decision.parents), changes)


def _handed_over(
    left: Next, plan: Plan, layout: Layout, rules: Rules, past: Past | None
) -> Decision:
    """Return a decision with what the trials begin with in slots that change hands."""
    taken = left.variant != plan.variant
    for number in np.unique(left.variant[taken]).tolist():
        part, space = np.flatnonzero(taken & (left.variant == number)), _space_of(number, rules)
        rng = np.random.default_rng([rules.seed, plan.generation + 1, layout.variants + number])
        history = past and past.history(number)
        drawn = _drawn(rules, plan, space, rng, np.ones(len(part), bool), history)
        for name, change in drawn.items():
            _merge(left.decision.changes[name], change, part)
    return left.decision


def follow(past: Past, plan: Plan, table: Columns, decided: Next) -> None:
    """Take in what became of a generation's trials, and those that begin after it."""
    _end(past, plan, table, decided)
    _begin(past, plan, decided, decided.variant != plan.variant)


def _end(past: Past, plan: Plan, table: Columns, decided: Next) -> None:
    """Take in all but the trials that begin in slots that change hands, which are drawn last."""
    past.end(table, plan.generation, decided.decision.parents)
    _begin(past, plan, decided, decided.variant == plan.variant)


def _begin(past: Past, plan: Plan, decided: Next, where: np.ndarray) -> None:
    fresh = (decided.decision.parents == NEW) & where
    stored, none = stored_in(decided.decision.changes), np.zeros(len(fresh), bool)
    past.begin(plan.generation + 1, fresh, stored, none, decided.variant)


def _space_of(variant: int, rules: Rules) -> SearchSpace:
    return rules.space.of(rules.space.variants()[variant])


def _no_changes(n: int, space: SearchSpace) -> dict[str, Change]:
    return {name: unchanged(n) for name in space.names()}


def _merge(into: Change, change: Change, part: np.ndarray) -> None:
    mask, multiply, add = change
    mask = np.asarray(mask, bool)
    into.mask[part] |= mask
    into.multiply[part] = np.where(mask, multiply, into.multiply[part])
    into.add[part] = np.where(mask, add, into.add[part])
