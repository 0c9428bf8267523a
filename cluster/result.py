"""What a sweep found, read from its storage: the best trial, the table, who copied whom."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gradhpo.checkpoints import DamagedFile
from gradhpo.cluster import columns as names
from gradhpo.cluster import importing, manifest, programs, settings
from gradhpo.cluster.columns import PARENT, TRIAL, Columns, decision_of
from gradhpo.cluster.controller import Layout, Plan, Rules, first_plan, following, plan_of
from gradhpo.cluster.division import divide
from gradhpo.cluster.events import Event, Prepared, WorkerLost
from gradhpo.cluster.failures import SweepError
from gradhpo.cluster.journal import Journal
from gradhpo.cluster.orders import Order, Spec
from gradhpo.cluster.schedulers import NEW, RandomSearch
from gradhpo.cluster.settings import Identity
from gradhpo.cluster.shard import ShardHost
from gradhpo.cluster.space import LR_HYPER, Change, SearchSpace
from gradhpo.cluster.storage import Storage
from gradhpo.cluster.variant import Variant, build, by_name, data_key
from gradhpo.files import Where
from gradhpo.state import BilevelState, PyTree


class Copy(NamedTuple):
    """A trial that took another's weights."""

    generation: int
    """The first in which it ran."""
    trial: int
    source: int
    """The trial that it copied."""


class Allowed(NamedTuple):
    """Code, data or a mesh that changed on purpose, see `Sweep.run`'s `allow_changed`."""

    generation: int
    """The first with the change."""
    what: str
    """ "code", "data" or "mesh"."""


class Turn(NamedTuple):
    """One generation of a trial's life."""

    generation: int
    trial: int
    slot: int
    lr_hyper: float | None
    changes: dict[str, tuple[float, float]]
    """By name of a hyperparameter, `(multiply, add)`: how it changed before the generation."""

    def order(self, slots: int, fresh: bool) -> Order:
        """Return what lets a shard take this generation in all of its slots."""
        changes = {
            name: Change(np.ones(slots, bool), np.full(slots, multiply), np.full(slots, add))
            for name, (multiply, add) in self.changes.items()
        }
        return Order(
            shard=0,
            variant=0,
            generation=self.generation,
            trials=np.full(slots, self.trial, np.uint32),
            parents=np.arange(slots, dtype=np.int32),
            fresh=np.full(slots, fresh),
            lr_hyper=None if self.lr_hyper is None else np.full(slots, self.lr_hyper),
            changes=changes,
            start=None,
        )


@dataclasses.dataclass(frozen=True)
class Trial:
    """A trial, as it was after a generation."""

    number: int
    generation: int
    score: float
    """Of the sweep's metric."""
    metrics: dict[str, float]
    lr_hyper: float | None
    choices: dict[str, Any]
    """What it has of `SearchSpace.choices`."""
    lineage: list[int]
    """The trials whose weights it goes on from, the first one first, itself last."""
    arrays: dict[str, np.ndarray]
    """Its whole state by path, such as `.params['w']`."""
    restore: Any = dataclasses.field(repr=False)

    @functools.cached_property
    def state(self) -> BilevelState:
        """The state with the problem's own structure; imports the problem in this process."""
        return self.restore()

    @property
    def params(self) -> PyTree:
        """The weights, NumPy arrays in the problem's own structure."""
        return self.state.params

    @property
    def hyperparams(self) -> PyTree:
        """The hyperparameters, NumPy arrays in the problem's own structure."""
        return self.state.hyperparams


@dataclasses.dataclass(frozen=True)
class Report:
    """What a run of the driver did, beside the result."""

    compiles: int
    """How often the step was compiled: once for each variant."""
    loads: int
    """How often a worker loaded it."""
    restores: int
    """How often a worker got it from JAX's persistent compilation cache."""
    small_compiles: int
    """Of programs that copy slots and make data."""
    calibration_compiles: int
    """Layouts that `batching="auto"` compared, and what that needed."""
    worker_compiles: list[int]
    """For each worker at the end, all programs that XLA compiled in it; 0 where all were loaded."""
    workers_lost: int
    startup_seconds: float
    """Until the first generation."""
    seconds: float
    """Of the generations that this run computed."""
    generations: int
    """That this run computed."""
    startup: dict[str, float]
    """Where the seconds of `startup_seconds` went."""
    loading_seconds: float
    """The longest that another worker took to get the programs, within the first generations."""

    def start(self) -> str:
        """Return where the time of the start went, in words."""
        parts = [f"{name} {seconds:.1f} s" for name, seconds in self.startup.items() if seconds]
        if self.loading_seconds:
            parts.append(f"and in other workers {self.loading_seconds:.1f} s to load")
        return ", ".join(parts)

    @classmethod
    def of(cls, events: Iterable[Event], timings: Mapping[str, float], **known: Any) -> Report:
        """Return the report that events add up to, beside what is known otherwise.

        Args:
          events: of the run.
          timings: where the driver's time went until the first generation.
          **known: the other fields.
        """
        told = list(events)
        prepared = [event for event in told if isinstance(event, Prepared)]
        counts = ("compiles", "loads", "restores", "small_compiles", "calibration_compiles")
        sums = {name: sum(getattr(event, name) for event in prepared) for name in counts}
        lost = sum(isinstance(event, WorkerLost) for event in told)
        # Variants are prepared side by side: the one that took longest is what was waited for.
        made = [dict(event.seconds) for event in prepared if not event.loads]
        slowest = max(made, key=_total, default={})
        startup = {**timings, "workers": max(0.0, timings["workers"] - _total(slowest)), **slowest}
        loading = max((_total(dict(e.seconds)) for e in prepared if e.loads), default=0.0)
        return cls(**sums, workers_lost=lost, startup=startup, loading_seconds=loading, **known)


def _total(seconds: Mapping[str, float]) -> float:
    return sum(seconds.values())


class SweepResult:
    """The result of a sweep, complete or not.

    Args:
      storage: the sweep's folder, or its address.
      spec: what its workers were told.
      layout: its shards.
      metric: its name.
      sign: 1 if it is minimized, -1 if maximized.
      load_data: returns what the problem's function gets as `data`.
      report: of the run that made it.

    Raises:
      SweepError: if no generation is done.
    """

    def __init__(
        self,
        storage: Where,
        spec: Spec,
        layout: Layout,
        metric: str,
        sign: int,
        load_data: Callable[[], Any] = lambda: None,
        report: Report | None = None,
    ) -> None:
        self._where, self._storage = storage, Storage(storage)
        self._spec, self._layout = spec, layout
        self._metric, self._sign, self._load_data = metric, sign, load_data
        self.report = report
        self._entries = list(Journal(storage).entries())
        if not self._entries:
            raise SweepError(f"no generation is done in {storage}")

    @classmethod
    def from_storage(cls, storage: Where) -> SweepResult:
        """Return the result in a storage, without its program: no code is run or imported.

        `Trial.state`, `replay` and `data` import what the storage names, when they are asked for.

        Raises:
          SweepError: if no generation is done, or the manifest is damaged.
        """
        storage = settings.folder_of(storage)
        known = manifest.read(storage)
        names = {field.name for field in dataclasses.fields(Identity)}
        objects = [name for name in manifest.objects(known) if name != "scheduler"]
        unknown = {name: _Unknown(str(storage), name) for name in objects}
        described = manifest.settings(known) | unknown | {"storage": str(storage)}
        given = settings.read(described, str(storage))
        identity = Identity(**{name: value for name, value in given.items() if name in names})
        layout = divide(identity, 1)
        spec = spec_of(identity, storage, layout, tuple(known["sys_path"]), known["x64"])

        def load_data() -> Any:
            if identity.data is None:
                return None
            importing.extend_path(spec.sys_path)
            made = identity.data
            return (importing.load(made) if isinstance(made, str) else made)()

        return cls(storage, spec, layout, identity.metric, identity.sign, load_data)

    @property
    def generations(self) -> int:
        """Generations that are done."""
        return self._entries[-1]["generation"] + 1

    @property
    def stopped(self) -> str | None:
        """Why the last run ended before the sweep's end; None where it did not, or was killed."""
        return self._entries[-1].get("stopped")

    @property
    def where(self) -> str:
        """The sweep's folder, or its address."""
        return str(self._storage)

    @property
    def complete(self) -> bool:
        """Whether all generations are done that the sweep was last to have."""
        return self.generations >= manifest.read(self.where)["generations"]

    @property
    def metric(self) -> str:
        """The name of the sweep's metric."""
        return self._metric

    @property
    def sign(self) -> int:
        """1 if the metric is minimized, -1 if maximized."""
        return self._sign

    @property
    def space(self) -> SearchSpace:
        """What was searched."""
        return self._spec.space

    @functools.cached_property
    def table(self) -> Columns:
        """All generations' tables, one below the other: each column `(generations·population,)`.

        `generation`, `slot`, `variant`, `trial`, `born`, `parent` (the slot it came from; -1 for a
        new trial), `lr_hyper` where it is searched, the five metrics of the last step, the
        problem's own, and `hyperparams.…` for searched hyperparameters after the generation.
        """
        tables = [self._table(g) for g in range(self.generations)]
        n = self._layout.population
        first = names.shown(tables[0])
        whole = {name: np.concatenate([table[name] for table in tables]) for name in first}
        variants = [self._layout.variant_of(shard) for shard in range(self._layout.shards)]
        return {
            "generation": np.repeat(np.arange(len(tables)), n),
            "slot": np.tile(np.arange(n), len(tables)),
            "variant": np.tile(np.repeat(variants, self._layout.slots), len(tables)),
            **whole,
        }

    @functools.cached_property
    def curves(self) -> Columns:
        """What `record=n` kept: the metrics of every n-th step of each trial, in the table's form.

        `generation`, `step` (in the generation, from 1), `slot` and `trial`, and the metrics of
        that step, each `(generations·(steps // n)·population,)`; NaN from a divergence on.

        Raises:
          SweepError: if the sweep has no `record`.
        """
        if self._spec.record is None:
            raise SweepError("the sweep keeps no steps: Sweep(record=n) keeps every n-th")
        parts: list[Columns] = []
        for generation in range(self.generations):
            table = self._table(generation)
            kept = names.curves(table)
            n, points = next(iter(kept.values())).shape
            step = self._spec.record * np.arange(1, points + 1)
            parts.append(
                {
                    "generation": np.full(n * points, generation),
                    "step": np.repeat(step, n),
                    "slot": np.tile(np.arange(n), points),
                    "trial": np.tile(table[TRIAL], points),
                    **{name: rows.T.ravel() for name, rows in kept.items()},
                }
            )
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def to_pandas(self) -> Any:
        """Return the table as a `pandas.DataFrame`.

        Raises:
          ImportError: if pandas is not installed.
        """
        import pandas  # pyright: ignore[reportMissingImports]

        return pandas.DataFrame(self.table)

    @functools.cached_property
    def final(self) -> Columns:
        """The table of the last generation."""
        return names.shown(self._table(self.generations - 1))

    @property
    def changes(self) -> list[Allowed]:
        """What was allowed to be other than when the sweep began, and from which generation on."""
        return [
            Allowed(entry["generation"], what)
            for entry in self._entries
            for what in entry.get("changes", [])
        ]

    @property
    def copies(self) -> list[Copy]:
        """Which trial copied which, and when."""
        made: list[Copy] = []
        for generation in range(1, self.generations):
            table, before = self._table(generation), self._table(generation - 1)
            parents = table[PARENT]
            copied = (parents != NEW) & (parents != np.arange(len(parents)))
            made += [
                Copy(generation, int(table[TRIAL][s]), int(before[TRIAL][parents[s]]))
                for s in np.flatnonzero(copied)
            ]
        return made

    @functools.cached_property
    def best(self) -> Trial:
        """The trial with the best metric at the end of any generation.

        Raises:
          SweepError: if every trial has diverged.
          DamagedFile: if its checkpoint is damaged; `replay` computes it again.
        """
        found = self._best()
        slot, generation = found["slot"], found["generation"]
        local = slot % self._layout.slots
        with self._named():
            arrays = self._storage.load_slot(found["checkpoint"], local)
        variant = self._variant_of_slot(slot)
        rates = self._plan(generation).lr_hyper
        host = ShardHost
        return Trial(
            number=found["trial"],
            generation=generation,
            score=found["score"] * self._sign,
            metrics=self._metrics(found),
            lr_hyper=None if rates is None else float(rates[slot]),
            choices=self._spec.space.variants()[variant],
            lineage=self._lineage(slot, generation),
            arrays=arrays,
            restore=lambda: host(self._spec, self._load_data()).restore(
                variant, found["checkpoint"], local
            ),
        )

    @functools.cached_property
    def schedule(self) -> list[Turn]:
        """The winner's life, generation by generation, through the trials that it came from.

        Raises:
          DamagedFile: if a table that says how a setting changed is damaged.
        """
        found = self._best()
        slot, turns = found["slot"], list[Turn]()
        for generation in range(found["generation"], -1, -1):
            plan = self._plan(generation)
            before = decision_of(self._table(generation - 1)).changes if generation else None
            if before is None:
                before = self._first_changes()
            changes = {
                name: (float(change.multiply[slot]), float(change.add[slot]))
                for name, change in before.items()
                if change.mask[slot] and name != LR_HYPER
            }
            rate = None if plan.lr_hyper is None else float(plan.lr_hyper[slot])
            turns.append(Turn(generation, int(plan.trial[slot]), slot, rate, changes))
            parent = int(plan.parents[slot])
            if parent == NEW:
                break
            slot = parent
        return turns[::-1]

    def replay(self) -> BilevelState:
        """Compute the winner again from scratch, alone, and return its state.

        It runs in every slot of one shard, with the sweep's own program: the same bits. On another
        kind of hardware the last bits may differ.
        """
        import jax

        variant = self._winners_variant(self._spec.steps)
        state = variant.zeros()
        for index, turn in enumerate(self.schedule):
            state, _ = variant.turn(state, turn.order(self._spec.slots, fresh=index == 0))
        return jax.tree.map(np.asarray, _row(variant, state))

    def trajectory(self) -> dict[str, np.ndarray]:
        """Compute the winner again, step by step, and return the λ that each was taken with.

        Returns:
          By the dotted name of a leaf of λ (`"hyperparams"` where λ is a single array), an array
          `(steps + 1, …)`: before each step, perturbations included, and after the last.
          `gradhpo.export.write_script` makes a script of it.
        """
        variant = self._winners_variant(1)
        state, values = variant.zeros(), list[PyTree]()
        for index, turn in enumerate(self.schedule):
            order = turn.order(self._spec.slots, fresh=index == 0)
            for _ in range(self._spec.steps):
                values.append(variant.hyperparams_at(state, order))
                state, _ = variant.turn(state, order)
                order = dataclasses.replace(order, fresh=np.zeros_like(order.fresh), changes={})
        values.append(_row(variant, state).hyperparams)
        return by_name(values)

    def _winners_variant(self, steps: int) -> Variant:
        """Return what computes the winner alone, so many steps at a time."""
        number = self._variant_of_slot(self._best()["slot"])
        importing.extend_path(self._spec.sys_path)
        spec = dataclasses.replace(self._spec, batching=self._layouts[number], steps=steps)
        variant = Variant(spec, spec.space.variants()[number], self._load_data())
        variant.prepare(None)
        return variant

    @functools.cached_property
    def data(self) -> PyTree:
        """What `Problem.data` made for all trials (of the first variant), computed here again."""
        importing.extend_path(self._spec.sys_path)
        problem, _ = build(self._spec, self._spec.space.variants()[0], self._load_data())
        return problem.start_data(data_key(self._spec.seed))

    def history(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield each generation with the metric of every slot."""
        for generation in range(self.generations):
            yield generation, self._table(generation)[self._metric]

    def plot(self, path: Path | str) -> None:
        """Draw the metric of all trials over generations, and the winner's line; needs matplotlib.

        Raises:
          ImportError: if matplotlib is not installed.
        """
        from matplotlib.figure import Figure

        rows = np.stack([row for _, row in self.history()]).astype(float)
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        axes.plot(rows, color="C0", alpha=min(0.6, 20 / rows.shape[1]), linewidth=0.8)
        line = [rows[turn.generation, turn.slot] for turn in self.schedule]
        axes.plot([t.generation for t in self.schedule], line, color="black", label="the winner")
        with np.errstate(all="ignore"):
            positive = np.nanmin(rows) > 0
        axes.set(xlabel="generation", ylabel=self._metric, yscale="log" if positive else "linear")
        axes.legend()
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)

    def _best(self) -> Any:
        found = self._entries[-1]["best"]
        if found is None:
            raise SweepError("every trial of the sweep has diverged")
        return found

    def _variant_of_slot(self, slot: int) -> int:
        return self._layout.variant_of(slot // self._layout.slots)

    def _first_changes(self) -> Mapping[str, Change]:
        space: SearchSpace = self._spec.space
        n = self._layout.population
        return space.draw(np.random.default_rng([self._spec.seed, 0]), np.ones(n, bool))

    def _metrics(self, found: Any) -> dict[str, float]:
        """Return the winner's row of its table; where that is damaged, what the journal says."""
        try:
            table = self._table(found["generation"])
        except DamagedFile:
            return {self._metric: found["score"] * self._sign}
        return {name: float(table[name][found["slot"]]) for name in names.measured(table)}

    def _lineage(self, slot: int, generation: int) -> list[int]:
        """Return the trials that a slot's comes from; two damaged tables in a row cut it short."""
        trials: list[int] = []
        for before in range(generation, -1, -1):
            try:
                plan = self._plan(before)
            except DamagedFile:
                break
            trials.append(int(plan.trial[slot]))
            parent = int(plan.parents[slot])
            if parent == NEW:
                break
            slot = parent
        return list(dict.fromkeys(reversed(trials)))

    def _plan(self, generation: int) -> Plan:
        """Return who ran in which slot: as the table says, or the one before it, which decided."""
        try:
            return plan_of(generation, self._table(generation))
        except DamagedFile:
            spec = self._spec
            rules = Rules(RandomSearch(), spec.space, spec.seed, self._metric, self._sign)
            if generation == 0:
                return first_plan(self._layout, rules)
            before = self._table(generation - 1)
            return following(plan_of(generation - 1, before), decision_of(before), rules)

    def _table(self, generation: int) -> Columns:
        """Return a generation's table; where its line is damaged, by what its name proves."""
        with self._named():
            return self._storage.load_table(generation, self._saved.get(generation))

    @contextlib.contextmanager
    def _named(self) -> Generator[None]:
        """Let an error about a file say in which storage."""
        try:
            yield
        except DamagedFile as error:
            raise DamagedFile(f"{self._storage}/{error.file}", error.reason) from None

    @functools.cached_property
    def _layouts(self) -> list[Any]:
        entries = programs.read(self._where)
        if entries is None:
            return [self._spec.batching] * self._layout.variants
        return [entry["batching"] for entry in entries]

    @functools.cached_property
    def _saved(self) -> dict[int, Any]:
        return {entry["generation"]: entry["table"] for entry in self._entries}


def _row(variant: Variant, state: Any) -> BilevelState:
    """Return slot 0 of a state."""
    return variant.unflatten({n: leaf[0] for n, leaf in variant.take(state, [0]).items()})


def spec_of(
    identity: Identity, storage: Where, layout: Layout, folders: tuple[str, ...], x64: bool
) -> Spec:
    """Return what the workers of a sweep are told."""
    given = {field.name: getattr(identity, field.name) for field in dataclasses.fields(Identity)}
    names = {field.name for field in dataclasses.fields(Spec)}
    return Spec(
        **{name: value for name, value in given.items() if name in names},
        slots=layout.slots,
        steps=identity.steps_per_generation,
        storage=str(storage),
        sys_path=folders,
        x64=x64,
    )


class _Unknown:
    """Stands for an object of the program that made a storage."""

    def __init__(self, storage: str, name: str) -> None:
        self._said = f"{storage} was made by a program that gave {name} as an object"

    def __call__(self, *args: Any) -> Any:
        del args
        raise SweepError(f"{self._said}: run that program, and ask its sweep for the result")

    def __hash__(self) -> int:
        return hash(self._said)
