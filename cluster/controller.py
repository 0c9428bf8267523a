"""The loop of a sweep: let every shard run a generation, gather one table, decide, write, repeat.

Decisions are pure functions of the table; no JAX runs here. A generation is done when its line is
in the journal, after its checkpoints and its table; whatever happens before that, it is computed
again, from the last checkpoints, and gives the same.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

from gradhpo.checkpoints import DamagedFile, Saved
from gradhpo.cluster import columns as names
from gradhpo.cluster import front
from gradhpo.cluster.columns import Columns
from gradhpo.cluster.deciding import decide, follow, race
from gradhpo.cluster.events import CombinationEnded, Damaged, GenerationDone, Note, Tell
from gradhpo.cluster.executor import Executor
from gradhpo.cluster.failures import StateGone, SweepError
from gradhpo.cluster.front import Found
from gradhpo.cluster.history import History
from gradhpo.cluster.journal import Entry, Journal
from gradhpo.cluster.orders import Order, Result
from gradhpo.cluster.plan import (
    Layout,
    Next,
    Plan,
    Rules,
    after,
    began,
    first_plan,
    following,
    gather,
    next_of,
    orders,
    plan_of,
)
from gradhpo.cluster.samplers.past import Past
from gradhpo.cluster.stopping import Stopping
from gradhpo.cluster.storage import CHECKPOINTS, Storage

MOST_LOSSES = 10
"""How often in a row states may be lost before another checkpoint is durable."""


@dataclasses.dataclass
class Computed:
    """A generation that was computed, and is not in the journal yet."""

    orders: list[Order]
    plan: Plan
    columns: Columns
    next: Next
    found: tuple[Found, ...]
    """What is kept of all generations so far; of this one's trials the checkpoints are to come."""
    seconds: float
    alone: dict[int, Saved] = dataclasses.field(default_factory=dict)
    """By shard, the states of the kept trials of this generation, apart from all others."""

    @property
    def save(self) -> bool:
        """Whether its states are being written."""
        return self.orders[0].save

    @property
    def slots(self) -> list[int]:
        """The slots whose trials are kept as they are after this generation."""
        return sorted(f.slot for f in self.found if f.generation == self.plan.generation)


class Controller:
    """Runs generations on an executor until all are done, or it is told to stop.

    While a generation is computed, the states after the one before are written; it gets its line
    in the journal when they are durable, which is seen when the next one is computed.

    Args:
      storage: of the sweep.
      journal: of the storage.
      executor: where shards run.
      layout: the shards.
      rules: what decides.
      tell: takes events.
      stopping: says after every generation whether there is a next one.
      changes: returns what was allowed to be other than before, from a generation on that is
        done.
      every: generations from one checkpoint to the next.
    """

    def __init__(
        self,
        storage: Storage,
        journal: Journal,
        executor: Executor,
        layout: Layout,
        rules: Rules,
        tell: Tell,
        stopping: Stopping,
        every: int = 1,
        changes: Callable[[int], list[str]] = lambda generation: [],
    ) -> None:
        self._storage, self._journal, self._executor = storage, journal, executor
        self._layout, self._rules, self._tell, self._every = layout, rules, tell, every
        self._stopping, self._total = stopping, 0
        self._changes = changes
        about = (layout.beginning(), rules.space, rules.objectives)
        self._history = History(*about, self._columns)
        self._tables: dict[int, Saved] = {}
        """By generation, what the journal has named, when a scheduler last asked for one."""
        self._computed: list[Computed] = []
        """The oldest first: at most those since the last checkpoints, and one more."""
        self._written: dict[tuple[int, int], Saved] = {}
        """By shard and generation, the checkpoints that workers told of."""
        self._past: Past | None = None
        """What a sampler is told of, up to the generation that was computed last."""

    def run(self, generations: int) -> None:
        """Run up to this many generations in all.

        Raises:
          SweepError: if it cannot go on.
        """
        lost, self._total = 0, generations
        while self._journal.generation + 1 < generations and not self._stopping.reason:
            self._computed, self._written, self._tables = [], {}, {}
            self._history.forget_after(self._journal.generation)
            durable = len(self._journal.durable) and self._journal.durable[-1]["generation"] + 1
            try:
                self._go_on(generations)
            except StateGone as error:
                there = self._journal.durable
                reached = there[-1]["generation"] + 1 if there else 0
                lost = lost + 1 if reached == durable else 1
                if lost > MOST_LOSSES:
                    raise SweepError(
                        f"{error}, {lost} times in a row before a later checkpoint was durable. "
                        "A smaller checkpoint_every leaves less to lose"
                    ) from error
                self._tell(Note(f"{error}: going on from generation {reached + 1} again"))

    def _go_on(self, generations: int) -> None:
        """Compute generations, until the last or until files are damaged."""
        try:
            plan = self._resumed()
            while plan.generation < generations and not self._stopping.reason:
                plan = self._generation(plan)
            self._flush()
        except DamagedFile as error:
            self._go_back(error)

    def _resumed(self) -> Plan:
        """Return the plan after the journal's last generation.

        Where that has no checkpoints, those after the last that has are computed again: as their
        tables say, which stay as they are.
        """
        if self._journal.durable:
            entry = self._journal.durable[-1]
            plan = self._after(entry["generation"], self._storage.load(entry["table"])[0])
        else:
            plan = first_plan(self._layout, self._rules)
        if self._rules.drawing.sampler is not None:
            self._past = self._remembered(plan)
        tables = {entry["generation"]: entry["table"] for entry in self._journal.last}
        while plan.generation <= self._journal.generation and not self._stopping.reason:
            table = self._storage.load_table(plan.generation, tables.get(plan.generation))
            results = self._executor.run(self._orders(plan, save=False))
            self._compare(gather(plan, results, self._layout), table, plan.generation)
            plan = self._after(plan.generation, table)
        return plan

    def _remembered(self, first: Plan) -> Past:
        """Return what a sampler is told of, from all tables; before there is one, from a plan."""
        rules, n = self._rules, self._layout.population
        past = rules.drawing.past(rules.space, rules.objectives, rules.seed, n)
        given = rules.drawing.given(rules.space, n)
        beginning = self._layout.beginning()
        if self._journal.generation < 0:
            past.begin_first(began(first), given, beginning)
        saved = {entry["generation"]: entry["table"] for entry in self._journal.entries()}
        for generation in range(self._journal.generation + 1):
            try:
                table = self._storage.load_table(generation, saved.get(generation))
            except DamagedFile as error:
                if generation >= self._journal.last[0]["generation"]:
                    raise  # as for a sweep without a sampler
                raise SweepError(f"{error}. The sampler needs to be told of it") from error
            if generation == 0:
                past.begin_first(names.first_of(table), given, beginning)
            plan = plan_of(generation, table, self._layout)
            follow(past, plan, table, next_of(plan, table))
        return past

    def _after(self, generation: int, table: Columns) -> Plan:
        return after(generation, table, self._layout, self._rules)

    def _compare(self, columns: Columns, table: Columns, generation: int) -> None:
        """Tell if a generation that was computed again differs from its table."""
        same = {n for n, x in table.items() if n in columns and x.tobytes() == columns[n].tobytes()}
        differing = sorted(columns.keys() - same)
        if differing:
            self._tell(
                Note(
                    f"generation {generation + 1}, computed again, differs from its table in "
                    f"{', '.join(differing)}: is it another kind of hardware?"
                )
            )

    def _generation(self, plan: Plan) -> Plan:
        """Compute a generation; return the plan of the next."""
        started = time.perf_counter()
        due = (plan.generation + 1) % self._every == 0
        settle = not self._start(plan) and plan.generation > 0 and self._executor.moves()
        made = self._orders(plan, save=due or settle)
        results = self._executor.run(made)
        self._take_in(results)
        columns = gather(plan, results, self._layout)
        tables = self._history.tables(plan.generation, columns)
        decision = decide(tables, plan, self._layout, self._rules, self._past)
        decided = race(columns, plan, decision, self._layout, self._rules, self._past)
        if self._past is not None:
            follow(self._past, plan, columns, decided)
        found = self._found(plan, columns)
        seconds = time.perf_counter() - started
        self._computed.append(Computed(made, plan, columns, decided, found, seconds))
        self._stopping.ask(plan.generation + 1, found)
        if settle:
            self._flush()
        return following(plan, decided, self._rules)

    def _columns(self, generation: int) -> Columns:
        """Return an earlier generation's columns, for a scheduler that asks."""
        for done in self._computed:
            if done.plan.generation == generation:
                return done.columns
        if generation not in self._tables:
            self._tables = {
                entry["generation"]: entry["table"] for entry in self._journal.entries()
            }
        try:
            return self._storage.load_table(generation, self._tables.get(generation))
        except DamagedFile as error:
            raise SweepError(
                f"the scheduler asks for the table of generation {generation + 1}, without which "
                f"it would decide something else: {error}"
            ) from error

    def _start(self, plan: Plan) -> list[Saved]:
        """Return the checkpoints that a plan starts from; none where they are not durable."""
        durable = self._journal.durable
        there = durable and durable[-1]["generation"] == plan.generation - 1
        return durable[-1]["checkpoints"] if there else []

    def _orders(self, plan: Plan, save: bool) -> list[Order]:
        start = self._start(plan) or [None] * self._layout.shards
        made = orders(plan, start, self._layout, self._rules.space, save)
        before = self._computed[-1] if self._computed else None
        # A front would keep whole checkpoints of many generations: its trials are written apart.
        if before is not None and (not before.save or self._rules.objectives.several):
            for slot in before.slots:
                shard, own = divmod(slot, self._layout.slots)
                winners = (*made[shard].winners, own)
                made[shard] = dataclasses.replace(made[shard], winners=winners)
        return made

    def _take_in(self, results: list[Result]) -> None:
        """See what has become durable, and commit the generations that are whole."""
        for result in results:
            for made in result.checkpoints:
                self._written[result.shard, made.generation] = made.saved
            if result.winner is not None:
                self._computed[-1].alone[result.shard] = result.winner
        while self._computed:
            oldest = self._computed[0]
            saved = self._told(oldest) if oldest.save else []
            if None in saved:
                return
            self._commit(self._computed.pop(0), [one for one in saved if one])

    def _told(self, done: Computed) -> list[Saved | None]:
        """Return the checkpoints of a generation, shard by shard; None where one is awaited."""
        shards = range(self._layout.shards)
        return [self._written.get((shard, done.plan.generation)) for shard in shards]

    def _flush(self) -> None:
        """Make the last generation durable, and commit all up to it."""
        while self._computed:
            oldest = self._computed[0]
            if oldest.save or len(self._computed) == 1:
                told = self._told(oldest)
                left = [order for order in oldest.orders if told[order.shard] is None]
                for order, saved in zip(left, self._executor.checkpoints(left), strict=True):
                    told[order.shard] = saved
            else:
                told = []
            self._commit(self._computed.pop(0), [one for one in told if one], self._why())

    def _why(self) -> str | None:
        """Return why the sweep ends with what is committed now; None where it does not."""
        return None if self._computed else self._stopping.reason

    def _commit(self, done: Computed, saved: list[Saved], stopped: str | None = None) -> None:
        """Write a generation's table, and then its line: its states are durable."""
        generation = done.plan.generation
        try:
            content = {**done.columns, **names.of_decision(done.next.decision)}
            if self._layout.races:
                content[names.NEXT_VARIANT] = done.next.variant
            if generation == 0 and self._rules.drawing.own:
                content |= names.of_first(began(done.plan))
            found = self._with_checkpoints(done, saved)
            entry: Entry = {
                "generation": generation,
                "table": self._storage.save_table(generation, content),
                "checkpoints": saved,
                "best": None,
                "seconds": round(done.seconds, 6),
            }
            front.write(entry, found, self._rules.objectives.several)
            if what := self._changes(generation):
                entry["changes"] = what
            if done.next.ended:
                entry["ended"] = [one._asdict() for one in done.next.ended]
            if stopped is not None and generation + 1 < self._total:
                entry["stopped"] = stopped
            self._journal.append(entry)
        except OSError as error:
            where = f"cannot write to the storage {self._storage}"
            raise SweepError(f"{where}: {error}") from error
        self._prune()
        self._written = {name: one for name, one in self._written.items() if name[1] > generation}
        table = names.shown(done.columns)
        told = front.told(found, self._rules.objectives)
        self._tell(GenerationDone(generation + 1, table, seconds=entry["seconds"], **told))
        self._tell_ended(done)

    def _tell_ended(self, done: Computed) -> None:
        """Say which combinations of choices ended after a generation."""
        combinations = self._rules.space.variants()
        for one in done.next.ended:
            name, sign = self._rules.objectives.compared
            score = None if one.score is None else one.score * sign
            about = (combinations[one.variant], name, score, one.place, one.of)
            self._tell(CombinationEnded(done.plan.generation + 1, *about))

    def _found(self, plan: Plan, columns: Columns) -> tuple[Found, ...]:
        """Return what is kept so far; of this generation's trials without their checkpoints."""
        before = front.of_journal(self._journal.last)
        before = self._computed[-1].found if self._computed else before
        scores = self._rules.objectives.scores(columns)
        return front.joined(before, scores, plan.trial, plan.generation)

    def _with_checkpoints(self, done: Computed, saved: list[Saved]) -> tuple[Found, ...]:
        """Return what a generation keeps, with the files that its own trials are in.

        Those of earlier ones have theirs from the journal: when this generation was computed they
        were not durable yet.
        """
        there = {f[1:4]: f for f in front.of_journal(self._journal.last)}
        files: dict[int, Saved] = {}
        for slot in done.slots:
            shard = slot // self._layout.slots
            files[slot] = done.alone[shard] if shard in done.alone else saved[shard]
        kept = [there.get(f[1:4], f) for f in done.found]
        return front.with_checkpoints(kept, done.plan.generation, files)

    def _prune(self) -> None:
        """Remove checkpoints but for those of two generations, and the best trial's."""
        if len(self._journal.durable) > 1:
            keep = {saved.file for e in self._journal.last for saved in e["checkpoints"]}
            keep |= {f.checkpoint.file for e in self._journal.last for f in front.found_in(e)}
            self._storage.prune(self._journal.durable[0]["generation"], keep)

    def _go_back(self, error: DamagedFile) -> None:
        """Give up the generations that a damaged file belongs to, for the checkpoints before."""
        told = [*self._journal.last, *self._journal.durable]
        files = {saved.file for entry in told for saved in _needed(entry)}
        if error.file.startswith(CHECKPOINTS) and error.file not in files:
            raise StateGone(str(error)) from error  # one that was not named yet
        if not self._journal.last:
            raise SweepError(f"storage {str(self._storage)!r}: {error}") from error
        durable = self._journal.durable
        newest = durable[-1] if durable else None
        own = [saved.file for saved in _needed(newest)]
        if newest and newest["generation"] < self._journal.generation and error.file not in own:
            before = newest  # a table after it is damaged, from which no state is read
        else:
            before = durable[0] if len(durable) > 1 else None
            missing = [saved.file for saved in _needed(before) if not self._storage.has(saved)]
            if missing or (before is None and self._journal.last[0]["generation"] > 0):
                raise SweepError(
                    f"{error}. The generation before it is not whole either"
                    f"{f' ({missing[0]})' if missing else ''}. To compute the sweep again from its "
                    f"beginning, move {self._storage} away"
                ) from error
        generation = -1 if before is None else before["generation"]
        self._tell(Damaged(str(error), generation + 1))
        self._journal.drop_after(generation)


def _needed(entry: Entry | None) -> list[Saved]:
    """Return the files that a generation is gone on from."""
    return [] if entry is None else [*entry["checkpoints"], entry["table"]]
