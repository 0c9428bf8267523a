"""What every slot does in a generation: made by the decision before it, or read from its table."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gradhpo.checkpoints import Saved
from gradhpo.cluster import columns as names
from gradhpo.cluster.columns import BORN, PARENT, TRIAL, VARIANT, Columns, decision_of
from gradhpo.cluster.drawing import Drawing, stored_in
from gradhpo.cluster.failures import SweepError
from gradhpo.cluster.objectives import Objectives
from gradhpo.cluster.orders import Import, Order, Result
from gradhpo.cluster.race import Ended
from gradhpo.cluster.schedulers import NEW, Decision, Scheduler
from gradhpo.cluster.space import LR_HYPER, Change, Changes, SearchSpace


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which slots belong to which shard, and at first to which variant: variant by variant."""

    variants: int
    shards: int
    """Of all variants together."""
    slots: int
    """Of a shard."""
    races: bool = False
    """Whether variants end, and hand their shards over."""

    @property
    def population(self) -> int:
        """All slots."""
        return self.shards * self.slots

    def beginning(self) -> np.ndarray:
        """Return each slot's variant when a sweep begins."""
        return np.repeat(np.arange(self.variants), self.population // self.variants)

    def part(self, shard: int) -> slice:
        """Return a shard's slots."""
        return slice(shard * self.slots, (shard + 1) * self.slots)


@dataclasses.dataclass(frozen=True)
class Rules:
    """What decides, beside the seed."""

    scheduler: Scheduler
    space: SearchSpace
    seed: int
    objectives: Objectives
    drawing: Drawing = dataclasses.field(default_factory=Drawing)
    """Where the settings of new trials come from."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What every slot does in the next generation."""

    generation: int
    trial: np.ndarray
    """int64: the number of the trial in each slot."""
    born: np.ndarray
    """int64: the generation in which that trial began."""
    parents: np.ndarray
    """int64: from which slot it comes; `NEW` starts anew."""
    changes: Changes
    lr_hyper: np.ndarray | None
    """float64; NaN where a combination has none."""
    variant: np.ndarray
    """int64: which combination of choices is in each slot."""
    before: np.ndarray
    """int64: and which one was before."""


class Next(NamedTuple):
    """What was decided after a generation."""

    decision: Decision
    variant: np.ndarray
    """Which combination of choices has each slot from now on."""
    ended: tuple[Ended, ...] = ()


def first_plan(layout: Layout, rules: Rules) -> Plan:
    """Return the first generation's plan: every trial is new."""
    n, variant = layout.population, layout.beginning()
    empty = Plan(
        generation=-1,
        trial=np.full(n, -1, np.int64),
        born=np.zeros(n, np.int64),
        parents=np.full(n, NEW, np.int64),
        changes={},
        lr_hyper=None if rules.space.lr_hyper is None else np.zeros(n),
        variant=variant,
        before=variant,
    )
    try:
        changes = rules.drawing.first(rules.space, rules.objectives, rules.seed, variant)
    except Exception as error:
        what = "the sampler failed before the first generation"
        raise SweepError(f"{what}: {type(error).__name__}: {error}") from error
    return following(empty, Next(Decision(np.full(n, NEW, np.int64), changes), variant), rules)


def began(plan: Plan) -> dict[str, np.ndarray]:
    """Return what the trials of the first plan begin with, by name of a setting."""
    rate = {} if plan.lr_hyper is None else {LR_HYPER: plan.lr_hyper}
    return {**stored_in(plan.changes), **rate}


def following(plan: Plan, decided: Next, rules: Rules) -> Plan:
    """Return the next generation's plan; trials that are new or copies get new numbers."""
    decision, slots = decided.decision, np.arange(len(plan.trial))
    replaced = decision.parents != slots
    numbers = plan.trial.max() + np.cumsum(replaced)  # the highest ever: a slot only goes up
    generation = plan.generation + 1
    return Plan(
        generation=generation,
        trial=np.where(replaced, numbers, plan.trial),
        born=np.where(replaced, generation, plan.born),
        parents=decision.parents,
        changes={n: change for n, change in decision.changes.items() if n != LR_HYPER},
        lr_hyper=_next_rates(plan, decided, rules.space),
        variant=decided.variant,
        before=plan.variant,
    )


def _next_rates(plan: Plan, decided: Next, space: SearchSpace) -> np.ndarray | None:
    """Return the outer rates after a decision; NaN in combinations that have none."""
    if plan.lr_hyper is None:
        return None
    parents, n = decided.decision.parents, len(plan.trial)
    rates = plan.lr_hyper[np.where(parents < 0, np.arange(n), parents)]
    mask, multiply, add = decided.decision.changes.get(LR_HYPER) or unchanged(n)
    low, high = np.full((2, n), np.nan)
    for number, combination in enumerate(space.variants()):
        if (one := space.of(combination).settings().get(LR_HYPER)) is not None:
            low[decided.variant == number], high[decided.variant == number] = one.bounds
    # What is set, and not perturbed, may come after none.
    moved = np.where(multiply == 0, add, rates * multiply + add)
    rates = np.where(mask, np.clip(moved, low, high), rates)
    return np.where(np.isnan(low), np.nan, rates)


def gather(plan: Plan, results: list[Result], layout: Layout) -> Columns:
    """Return one table of all shards' results: every column has an entry for each slot.

    Columns that only some variants have are NaN in the others.
    """
    assert [result.shard for result in results] == list(range(layout.shards))
    table: Columns = {
        TRIAL: plan.trial,
        BORN: plan.born,
        PARENT: plan.parents,
        **({} if plan.lr_hyper is None else {LR_HYPER: plan.lr_hyper}),
        **({VARIANT: plan.variant} if layout.races else {}),
    }
    dtypes = {name: column.dtype for result in results for name, column in result.columns.items()}
    shapes = {name: x.shape[1:] for result in results for name, x in result.columns.items()}
    for name, dtype in dtypes.items():
        missing = np.full((layout.slots, *shapes[name]), np.nan if dtype.kind == "f" else 0, dtype)
        table[name] = np.concatenate([result.columns.get(name, missing) for result in results])
    return table


def orders(
    plan: Plan,
    saved: Sequence[Saved | None],
    layout: Layout,
    space: SearchSpace,
    save: bool = True,
) -> list[Order]:
    """Return each shard's part of a plan."""
    made: list[Order] = []
    slots = np.arange(layout.slots, dtype=np.int32)
    for shard in range(layout.shards):
        part = layout.part(shard)
        parents = plan.parents[part]
        before, variant = int(plan.before[part.start]), int(plan.variant[part.start])
        fresh = parents == NEW
        inside = (parents >= part.start) & (parents < part.stop)
        outside = np.flatnonzero(~fresh & ~inside)
        sources = (part.tolist() for part in np.divmod(parents[outside], layout.slots))
        imports: list[Import] = []
        for slot, source, source_slot in zip(outside.tolist(), *sources, strict=True):
            imports.append(Import(slot, source, source_slot, saved[source]))
        made.append(
            Order(
                shard=shard,
                variant=variant,
                generation=plan.generation,
                trials=plan.trial[part].astype(np.uint32),
                parents=np.where(inside, parents - part.start, slots).astype(np.int32),
                fresh=fresh,
                lr_hyper=None if plan.lr_hyper is None else plan.lr_hyper[part],
                changes={
                    name: Change(*(x[part] for x in plan.changes[name]))
                    for name in space.hyperparams
                    if name in plan.changes and plan.changes[name].mask[part].any()
                },
                start=saved[shard],
                before=None if before == variant else before,
                imports=tuple(imports),
                save=save,
            )
        )
    return made


def plan_of(generation: int, columns: Columns, layout: Layout) -> Plan:
    """Return the plan that a table came from, but for the changes that it began with."""
    trial, born, parents = columns[TRIAL], columns[BORN], columns[PARENT]
    variant = columns.get(VARIANT, layout.beginning())
    return Plan(generation, trial, born, parents, {}, columns.get(LR_HYPER), variant, variant)


def after(generation: int, columns: Columns, layout: Layout, rules: Rules) -> Plan:
    """Return the plan that follows a generation, by its table and the decision in it."""
    plan = plan_of(generation, columns, layout)
    return following(plan, next_of(plan, columns), rules)


def next_of(plan: Plan, columns: Columns) -> Next:
    """Return what was decided after a generation, as its table says."""
    return Next(decision_of(columns), columns.get(names.NEXT_VARIANT, plan.variant))


def unchanged(n: int) -> Change:
    """Return a change of `n` slots that changes nothing."""
    return Change(np.zeros(n, bool), np.ones(n), np.zeros(n))
