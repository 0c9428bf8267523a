"""The loop of a sweep: let every shard run a generation, gather one table, decide, write, repeat.

Decisions are pure functions of the table; no JAX runs here. A generation is done when its line is
in the journal; whatever happens before that, it is computed again and gives the same.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence

import numpy as np

from gradhpo.checkpoints import DamagedFile, Saved
from gradhpo.cluster import columns as names
from gradhpo.cluster import schedulers
from gradhpo.cluster.columns import BORN, PARENT, TRIAL, Columns, decision_of
from gradhpo.cluster.executors import Executor
from gradhpo.cluster.failures import SweepError
from gradhpo.cluster.journal import Best, Entry, Journal
from gradhpo.cluster.orders import Import, Order, Result
from gradhpo.cluster.schedulers import NEW, Decision, Scheduler, Table
from gradhpo.cluster.space import LR_HYPER, Change, Changes, SearchSpace
from gradhpo.cluster.storage import Storage


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which slots belong to which shard and variant: shard by shard, variant by variant."""

    variants: int
    shards: int
    """Of all variants together."""
    slots: int
    """Of a shard."""

    @property
    def population(self) -> int:
        """All slots."""
        return self.shards * self.slots

    def variant_of(self, shard: int) -> int:
        """Return a shard's variant."""
        return shard // (self.shards // self.variants)

    def part(self, shard: int) -> slice:
        """Return a shard's slots."""
        return slice(shard * self.slots, (shard + 1) * self.slots)

    def population_of(self, variant: int) -> slice:
        """Return a variant's slots."""
        size = self.population // self.variants
        return slice(variant * size, (variant + 1) * size)


@dataclasses.dataclass(frozen=True)
class Rules:
    """What decides, beside the seed."""

    scheduler: Scheduler
    space: SearchSpace
    seed: int
    metric: str
    sign: int
    """1 to minimize the metric, -1 to maximize it."""


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
    """float64."""


class Controller:
    """Runs generations on an executor until all are done, or it is told to stop."""

    def __init__(
        self,
        storage: Storage,
        journal: Journal,
        executor: Executor,
        layout: Layout,
        rules: Rules,
        notify: Callable[..., None],
    ) -> None:
        self._storage, self._journal, self._executor = storage, journal, executor
        self._layout, self._rules, self._notify = layout, rules, notify
        self.stop = False
        """Set to stop after the generation in flight."""

    def run(self, generations: int) -> None:
        """Run up to this many generations in all.

        Raises:
          SweepError: if it cannot go on.
        """
        plan: Plan | None = None
        while self._journal.generation + 1 < generations and not self.stop:
            started = time.perf_counter()
            last = self._journal.last[-1] if self._journal.last else None
            try:
                if plan is None:
                    plan = self._resumed(last)
                results = self._executor.run(self._orders(plan, last))
            except DamagedFile as error:
                self._go_back(error)
                plan = None
                continue
            columns = gather(plan, results, self._layout)
            decision = decide(columns, plan, self._layout, self._rules)
            entry = self._commit(plan, columns, decision, results, time.perf_counter() - started)
            self._prune(entry)
            self._notify("generation", entry=entry, columns=columns)
            plan = following(plan, decision, self._rules)

    def _resumed(self, last: Entry | None) -> Plan:
        if last is None:
            return first_plan(self._layout, self._rules)
        columns = self._storage.load(last["table"])[0]
        return following(plan_of(last["generation"], columns), decision_of(columns), self._rules)

    def _orders(self, plan: Plan, last: Entry | None) -> list[Order]:
        saved = [None] * self._layout.shards if last is None else last["checkpoints"]
        return orders(plan, saved, self._layout, self._rules.space)

    def _commit(
        self,
        plan: Plan,
        columns: Columns,
        decision: Decision,
        results: list[Result],
        seconds: float,
    ) -> Entry:
        try:
            content = {**columns, **names.of_decision(decision)}
            table = self._storage.save_table(plan.generation, content)
            entry: Entry = {
                "generation": plan.generation,
                "table": table,
                "checkpoints": [result.checkpoint for result in results],
                "best": self._best(plan, columns, results),
                "seconds": round(seconds, 6),
            }
            self._journal.append(entry)
        except OSError as error:
            raise SweepError(
                f"cannot write to the storage {self._storage.path}: {error}"
            ) from error
        return entry

    def _best(self, plan: Plan, columns: Columns, results: list[Result]) -> Best | None:
        before = self._journal.last[-1]["best"] if self._journal.last else None
        score = columns[self._rules.metric] * self._rules.sign
        if not np.isfinite(score).any():
            return before
        slot = int(np.nanargmin(np.where(np.isfinite(score), score, np.nan)))
        if before is not None and not score[slot] < before["score"]:
            return before
        return {
            "score": float(score[slot]),
            "trial": int(plan.trial[slot]),
            "slot": slot,
            "generation": plan.generation,
            "checkpoint": results[slot // self._layout.slots].checkpoint,
        }

    def _prune(self, entry: Entry) -> None:
        """Remove checkpoints but for those of two generations, and the best trial's."""
        keep = {saved.file for e in self._journal.last for saved in e["checkpoints"]}
        keep |= {e["best"]["checkpoint"].file for e in self._journal.last if e["best"]}
        self._storage.prune(entry["generation"] - 1, keep)

    def _go_back(self, error: DamagedFile) -> None:
        """Give up the last generation, one of whose files is damaged, for the one before."""
        if not self._journal.last:
            raise SweepError(str(error)) from error
        generation = self._journal.generation
        before = self._journal.last[0] if len(self._journal.last) > 1 else None
        if generation > 0:
            needed = [] if before is None else [*before["checkpoints"], before["table"]]
            missing = [s.file for s in needed if not self._storage.has(s)]
            if missing or before is None or before["generation"] != generation - 1:
                raise SweepError(
                    f"{error}. The generation before it is not whole either"
                    f"{f' ({missing[0]})' if missing else ''}. To compute the sweep again from its "
                    f"beginning, move {self._storage.path} away"
                ) from error
        self._notify("damaged", what=str(error), generation=generation)
        self._journal.drop_last()


def first_plan(layout: Layout, rules: Rules) -> Plan:
    """Return the first generation's plan: every trial is new."""
    n = layout.population
    empty = Plan(
        generation=-1,
        trial=np.full(n, -1, np.int64),
        born=np.zeros(n, np.int64),
        parents=np.full(n, NEW, np.int64),
        changes={},
        lr_hyper=None if rules.space.lr_hyper is None else np.zeros(n),
    )
    rng = np.random.default_rng([rules.seed, 0])
    fresh = np.ones(n, bool)
    return following(
        empty, Decision(np.full(n, NEW, np.int64), rules.space.draw(rng, fresh)), rules
    )


def following(plan: Plan, decision: Decision, rules: Rules) -> Plan:
    """Return the next generation's plan; trials that are new or copies get new numbers."""
    slots = np.arange(len(plan.trial))
    replaced = decision.parents != slots
    numbers = plan.trial.max() + np.cumsum(replaced)  # the highest ever: a slot only goes up
    generation = plan.generation + 1
    changes = dict(decision.changes)
    lr_hyper = plan.lr_hyper
    if lr_hyper is not None:
        source = np.where(decision.parents < 0, slots, decision.parents)
        lr_hyper = lr_hyper[source]
        if LR_HYPER in changes:
            mask, multiply, add = changes.pop(LR_HYPER)
            assert rules.space.lr_hyper is not None
            low, high = rules.space.settings()[LR_HYPER].bounds
            lr_hyper = np.where(mask, np.clip(lr_hyper * multiply + add, low, high), lr_hyper)
    return Plan(
        generation=generation,
        trial=np.where(replaced, numbers, plan.trial),
        born=np.where(replaced, generation, plan.born),
        parents=decision.parents,
        changes=changes,
        lr_hyper=lr_hyper,
    )


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
    }
    dtypes = {name: column.dtype for result in results for name, column in result.columns.items()}
    for name, dtype in dtypes.items():
        missing = np.full(layout.slots, np.nan if dtype.kind == "f" else 0, dtype)
        table[name] = np.concatenate([result.columns.get(name, missing) for result in results])
    return table


def decide(columns: Columns, plan: Plan, layout: Layout, rules: Rules) -> Decision:
    """Ask the scheduler about each variant's population, and draw the settings of new trials.

    Raises:
      SweepError: if the scheduler fails or returns something else than a fitting `Decision`.
    """
    parents, changes = np.arange(layout.population), _no_changes(layout.population, rules.space)
    settings = list(rules.space.settings())
    for variant in range(layout.variants):
        part = layout.population_of(variant)
        size, first = part.stop - part.start, part.start
        rng = np.random.default_rng([rules.seed, plan.generation + 1, variant])
        table = _table(columns, part, plan.generation, rules)
        try:
            made = schedulers.check(rules.scheduler(table, rules.space, rng), size, settings)
        except Exception as error:
            what = f"the scheduler failed after generation {plan.generation}"
            raise SweepError(f"{what}: {type(error).__name__}: {error}") from error
        fresh = made.parents == NEW
        parents[part] = np.where(fresh, NEW, made.parents + first)
        drawn = rules.space.draw(rng, fresh) if fresh.any() else {}
        for name in settings:
            for change in (made.changes.get(name), drawn.get(name)):
                if change is not None:
                    _merge(changes[name], change, part)
    return Decision(parents, changes)


def orders(
    plan: Plan, saved: Sequence[Saved | None], layout: Layout, space: SearchSpace
) -> list[Order]:
    """Return each shard's part of a plan."""
    made: list[Order] = []
    slots = np.arange(layout.slots, dtype=np.int32)
    for shard in range(layout.shards):
        part = layout.part(shard)
        parents = plan.parents[part]
        fresh = parents == NEW
        inside = (parents >= part.start) & (parents < part.stop)
        outside = np.flatnonzero(~fresh & ~inside)
        sources = (part.tolist() for part in np.divmod(parents[outside], layout.slots))
        imports: list[Import] = []
        for slot, source, source_slot in zip(outside.tolist(), *sources, strict=True):
            checkpoint = saved[source]
            assert checkpoint is not None
            imports.append(Import(slot, source, source_slot, checkpoint))
        made.append(
            Order(
                shard=shard,
                variant=layout.variant_of(shard),
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
                imports=tuple(imports),
            )
        )
    return made


def plan_of(generation: int, columns: Columns) -> Plan:
    """Return the plan that a table came from, but for the changes that it began with."""
    trial, born, parents = columns[TRIAL], columns[BORN], columns[PARENT]
    return Plan(generation, trial, born, parents, {}, columns.get(LR_HYPER))


def _table(columns: Columns, part: slice, generation: int, rules: Rules) -> Table:

    def column(name: str) -> np.ndarray:
        """Return a copy that cannot be written: a scheduler must not change the sweep's table."""
        copied = columns[name][part].copy()
        copied.setflags(write=False)
        return copied

    settings = {name: column(names.setting(name)) for name in rules.space.settings()}
    return Table(
        generation=generation,
        score=columns[rules.metric][part] * rules.sign,
        trial=column(TRIAL),
        age=generation - columns[BORN][part] + 1,
        values=settings,
        metrics={name: column(name) for name in names.measured(columns)},
    )


def _no_changes(n: int, space: SearchSpace) -> dict[str, Change]:
    return {name: Change(np.zeros(n, bool), np.ones(n), np.zeros(n)) for name in space.settings()}


def _merge(into: Change, change: Change, part: slice) -> None:
    mask, multiply, add = change
    mask = np.asarray(mask, bool)
    into.mask[part] |= mask
    into.multiply[part] = np.where(mask, multiply, into.multiply[part])
    into.add[part] = np.where(mask, add, into.add[part])
