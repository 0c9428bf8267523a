"""What a sweep found, read from its storage: the best trial, the table, who copied whom."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from gradhpo import notebook
from gradhpo.checkpoints import DamagedFile
from gradhpo.cluster import columns as names
from gradhpo.cluster import front, importing, manifest, plots, programs, settings
from gradhpo.cluster.columns import TRIAL, VARIANT, Columns
from gradhpo.cluster.division import divide
from gradhpo.cluster.failures import SweepError
from gradhpo.cluster.front import Found
from gradhpo.cluster.hypervolume import hypervolume
from gradhpo.cluster.journal import Journal
from gradhpo.cluster.lineage import Copy, Lineage, Turn
from gradhpo.cluster.numbers_of import column_of, number_of
from gradhpo.cluster.objectives import Objectives
from gradhpo.cluster.orders import Spec
from gradhpo.cluster.plan import Layout, Rules
from gradhpo.cluster.replay import Replay
from gradhpo.cluster.report import Report
from gradhpo.cluster.schedulers import RandomSearch
from gradhpo.cluster.settings import Identity
from gradhpo.cluster.shard import ShardHost
from gradhpo.cluster.space import LR_HYPER, SearchSpace
from gradhpo.cluster.storage import Storage
from gradhpo.cluster.tables import Tables, named
from gradhpo.cluster.variant import build, data_key
from gradhpo.errors import check_finite
from gradhpo.files import Where
from gradhpo.state import BilevelState, PyTree

__all__ = ["Allowed", "Copy", "EndedCombination", "Report", "SweepResult", "Trial", "Turn"]


class EndedCombination(NamedTuple):
    """A combination of choices that lost the race, see `Race`."""

    generation: int
    """The last that it ran."""
    choices: dict[str, Any]
    score: float | None
    """The metric of its best trial in that generation, or of several objectives that trial's place
    among all, from 0; None where all had diverged."""
    place: int
    """Among the combinations that were left, from 1."""
    of: int
    """How many were left."""


SHOWN = 10
"""Trials of a front that a notebook shows."""
SEARCHERS = ("scheduler", "sampler")
"""What a storage names even where a program gave an object; a result does not ask them."""


class Allowed(NamedTuple):
    """Code, data or a mesh that changed on purpose, see `Sweep.run`'s `allow_changed`."""

    generation: int
    """The first with the change."""
    what: str
    """ "code", "data" or "mesh"."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """A trial, as it was after a generation."""

    number: int
    generation: int
    slot: int
    scores: dict[str, float]
    """Of what the sweep compares, by name."""
    metrics: dict[str, float]
    settings: dict[str, float]
    """What it has of the space's numbers, by name, as `Sweep(points=…)` takes them."""
    lr_hyper: float | None
    choices: dict[str, Any]
    """What it has of `SearchSpace.choices`."""
    lineage: list[int]
    """The trials whose weights it goes on from, the first one first, itself last."""
    load: Any = dataclasses.field(repr=False)
    restore: Any = dataclasses.field(repr=False)

    @property
    def score(self) -> float:
        """Of the sweep's metric.

        Raises:
          SweepError: if there are several objectives.
        """
        if len(self.scores) > 1:
            raise SweepError(f"a trial has no score but scores: of {', '.join(self.scores)}")
        return next(iter(self.scores.values()))

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """Its whole state by path, such as `.params['w']`; read when it is asked for first.

        Raises:
          DamagedFile: if its checkpoint is damaged; `replay` computes it again.
        """
        return self._arrays

    @functools.cached_property
    def _arrays(self) -> dict[str, np.ndarray]:
        return self.load()

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


class SweepResult:
    """The result of a sweep, complete or not.

    Args:
      storage: the sweep's folder, or its address.
      spec: what its workers were told.
      layout: its shards.
      objectives: what trials are compared by.
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
        objectives: Objectives,
        load_data: Callable[[], Any] = lambda: None,
        report: Report | None = None,
    ) -> None:
        self._where, self._storage = storage, Storage(storage)
        self._spec, self._layout = spec, layout
        self._objectives, self._load_data = objectives, load_data
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
        objects = [name for name in manifest.objects(known) if name not in SEARCHERS]
        unknown = {name: _Unknown(str(storage), name) for name in objects}
        described = manifest.settings(known) | unknown | {"storage": str(storage)}
        given = settings.read(described, str(storage))
        identity = Identity(**{name: value for name, value in given.items() if name in names})
        layout = divide(identity, 1)
        spec = spec_of(identity, storage, layout, tuple(known["sys_path"]), known["x64"])

        def load_data() -> Any:
            made = identity.arrays(spec.sys_path)
            return made() if isinstance(made, _Unknown) else made

        return cls(storage, spec, layout, identity.objectives, load_data)

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

    @functools.cached_property
    def complete(self) -> bool:
        """Whether all generations are done that the sweep was last to have."""
        return self.generations >= manifest.read(self.where)["generations"]

    @property
    def metric(self) -> str:
        """The name of the sweep's metric.

        Raises:
          SweepError: if there are several objectives, see `objectives`.
        """
        return self._objectives.only("there is no one metric", "Take objectives")[0]

    @property
    def sign(self) -> int:
        """1 if the metric is minimized, -1 if maximized.

        Raises:
          SweepError: if there are several objectives, see `objectives`.
        """
        return self._objectives.only("there is no one sign", "Take objectives")[1]

    @property
    def objectives(self) -> Objectives:
        """What trials are compared by: the metric, or several."""
        return self._objectives

    @property
    def space(self) -> SearchSpace:
        """What was searched."""
        return self._spec.space

    @functools.cached_property
    def table(self) -> Columns:
        """All generations' tables, one below the other: each column `(generations·population,)`.

        `generation`, `slot`, `variant` (the number of the combination of choices), `trial`, `born`,
        `parent` (the slot it came from; -1 for a new trial), `lr_hyper` where it is searched, the
        five metrics of the last step, the problem's own, and `hyperparams.…` for searched
        hyperparameters after the generation; NaN in combinations that have none.
        """
        tables = [self._tables.at(g) for g in range(self.generations)]
        n = self._layout.population
        first = names.shown(tables[0])
        # A setting that only combinations have that ended is in earlier tables alone.
        none = {n: np.full_like(x, np.nan if x.dtype.kind == "f" else 0) for n, x in first.items()}
        whole = {n: np.concatenate([t[n] if n in t else none[n] for t in tables]) for n in first}
        return {
            "generation": np.repeat(np.arange(len(tables)), n),
            "slot": np.tile(np.arange(n), len(tables)),
            VARIANT: np.tile(self._layout.beginning(), len(tables)),
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
            table = self._tables.at(generation)
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
        return names.shown(self._tables.at(self.generations - 1))

    @property
    def changes(self) -> list[Allowed]:
        """What was allowed to be other than when the sweep began, and from which generation on."""
        return [
            Allowed(entry["generation"], what)
            for entry in self._entries
            for what in entry.get("changes", [])
        ]

    @property
    def ended(self) -> list[EndedCombination]:
        """Which combinations of choices ended, and why; see `SearchSpace`'s `race`."""
        combinations = self._spec.space.variants()
        told = ((e["generation"], one) for e in self._entries for one in e.get("ended", []))
        made: list[EndedCombination] = []
        for generation, one in told:
            score = None if one["score"] is None else one["score"] * self._objectives.compared[1]
            about = (combinations[one["variant"]], score, one["place"], one["of"])
            made.append(EndedCombination(generation, *about))
        return made

    @property
    def copies(self) -> list[Copy]:
        """Which trial copied which, and when."""
        return self._lines.copies(self.generations)

    @functools.cached_property
    def best(self) -> Trial:
        """The trial with the best metric at the end of any generation.

        Raises:
          SweepError: if every trial has diverged, or there are several objectives: see `front`.
          DamagedFile: if its checkpoint is damaged; `replay` computes it again.
        """
        made = self._trial(self._winner())
        _ = made.arrays  # whether it can be read is said now
        return made

    @functools.cached_property
    def front(self) -> list[Trial]:
        """The trials that no other dominates, as they were after a generation: the best first.

        By the first objective, that is. Of any generation, as many as `gradhpo.cluster.front.MOST`,
        those with most room around them; each with its state on the disk. One metric has a front
        of one trial, the best.

        Raises:
          SweepError: if every trial has diverged.
        """
        return [self._trial(found) for found in sorted(self._found())]

    def hypervolume(self, reference: Mapping[str, float]) -> float:
        """Return how much the front dominates, up to a reference point, in the objectives' units.

        Args:
          reference: by objective; worse than what counts.

        Raises:
          SweepError: if every trial has diverged.
          TypeError, ValueError: unless it has a finite number for each objective.
        """
        signs = self._objectives.signs
        if not isinstance(reference, Mapping) or set(reference) != set(signs):  # pyright: ignore
            raise ValueError(f"reference must name {', '.join(signs)}, got {reference!r}")
        corner = {n: check_finite(f"reference[{n!r}]", reference[n]) for n in signs}
        scores = np.array([found.scores for found in self._found()])
        return hypervolume(scores, np.array([corner[n] * sign for n, sign in signs.items()]))

    @functools.cached_property
    def schedule(self) -> list[Turn]:
        """The winner's life, see `schedule_of`."""
        return self.schedule_of(self._winner())

    def schedule_of(self, trial: Trial | Found) -> list[Turn]:
        """Return a trial's life, generation by generation, through those that it came from.

        Raises:
          DamagedFile: if a table that says how a setting changed is damaged.
          TypeError: for what is no trial, such as its number.
        """
        _check_trial(trial)
        return self._lines.turns(trial.slot, trial.generation)

    def __repr__(self) -> str:
        """Say where it is, how far, and what is the best."""
        try:
            kept = self.front
        except SweepError as error:
            return f"SweepResult of {self.where}: {error}"
        lines = [f"SweepResult of {self.where}: {self.generations} generations"]
        for trial in kept:
            scores = ", ".join(f"{name} {score:.6g}" for name, score in trial.scores.items())
            which = f"trial {trial.number} after generation {trial.generation + 1}"
            lines.append(f"{'front' if self.objectives.several else 'best'}: {scores}, {which}")
        return "\n  ".join(lines)

    def _repr_html_(self) -> str:
        """Show the best trial, or the front, in a notebook."""
        try:
            kept = self.front
        except SweepError as error:
            return notebook.table((), (), title=self.where, below=[error])
        scores, named = self.objectives.names, {n for trial in kept for n in trial.settings}
        settings, choices = [n for n in self.space.names() if n in named], list(self.space.choices)
        head = ["trial", *scores, "generation", *(n or "λ" for n in settings), *choices]
        rows = [
            [
                trial.number,
                *(f"{trial.scores[name]:.6g}" for name in scores),
                trial.generation + 1,
                *(f"{trial.settings.get(name, float('nan')):.6g}" for name in settings),
                *(trial.choices[name] for name in choices),
            ]
            for trial in kept[:SHOWN]
        ]
        state = "complete" if self.complete else self.stopped or "not complete"
        title = f"{self.where}: {self.generations} generations, {state}"
        more = [f"and {len(kept) - SHOWN} trials more"] if len(kept) > SHOWN else []
        return notebook.table(head, rows, title=title, below=more)

    def replay(self, trial: Trial | None = None) -> BilevelState:
        """Compute a trial again from scratch, alone, and return its state.

        It runs in every slot of one shard, with the sweep's own program: the same bits. On another
        kind of hardware the last bits may differ.

        Args:
          trial: of `front`; by default the best.

        Raises:
          TypeError: for what is no trial, such as its number.
        """
        return self._replay(trial).state()

    def trajectory(self, trial: Trial | None = None) -> dict[str, np.ndarray]:
        """Compute a trial again, step by step, and return the λ that each was taken with.

        Args:
          trial: of `front`; by default the best.

        Returns:
          By the dotted name of a leaf of λ (`"hyperparams"` where λ is a single array), an array
          `(steps + 1, …)`: before each step, perturbations included, and after the last.
          `gradhpo.export.write_script` makes a script of it.
        """
        return self._replay(trial).trajectory()

    def _replay(self, trial: Trial | None) -> Replay:
        found = self._winner() if trial is None else trial
        _check_trial(found)
        number = self._lines.variant(found.slot, found.generation)
        spec = dataclasses.replace(self._spec, batching=self._layouts[number])
        return Replay(spec, number, self.schedule_of(found), self._load_data)

    @functools.cached_property
    def data(self) -> PyTree:
        """What `Problem.data` made for all trials (of the first variant), computed here again."""
        importing.extend_path(self._spec.sys_path)
        problem, _ = build(self._spec, self._spec.space.variants()[0], self._load_data())
        return problem.start_data(data_key(self._spec.seed))

    def history(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield each generation with the metric of every slot."""
        for generation in range(self.generations):
            yield generation, self._tables.at(generation)[self.metric]

    def plot(self, target: Any) -> Any:
        """Draw the metric over generations; needs matplotlib.

        All trials, their median and middle half, the best so far, and the winner; of several
        objectives the first two, of all trials, and the front.

        Args:
          target: a path to write a figure to, or matplotlib axes to draw on.

        Returns:
          The axes.

        Raises:
          ImportError: if matplotlib is not installed.
        """
        if self._objectives.several:
            compared = {name: self.table[name] for name in self._objectives.names}
            return plots.draw_front(target, compared, [trial.scores for trial in self.front])
        rows = np.stack([row for _, row in self.history()]).astype(float)
        return plots.draw_metric(target, rows, self.schedule, self.metric, self.sign)

    def plot_settings(self, target: Any) -> list[Any]:
        """Draw what each searched setting was in all trials, and in the winner.

        Of several objectives there is no winner: of them the trials alone.

        Args:
          target: a path to write a figure to, or matplotlib axes to draw on, one for each setting.

        Returns:
          The axes, in the order of the settings.

        Raises:
          ImportError: if matplotlib is not installed.
          ValueError: if nothing is searched that is a number.
        """
        shape, kinds = (self.generations, self._layout.population), self.space.kinds()
        columns = {name: self._numbers(name).reshape(shape) for name in kinds}
        turns = [] if self._objectives.several else self.schedule
        of = {name: list(known.values()) for name, known in kinds.items()}
        return plots.draw_settings(target, columns, of, turns)

    def _numbers(self, name: str) -> np.ndarray:
        """Return a setting's column of the table, as numbers that a person gives."""
        stored = self.table[names.setting(name)]
        return column_of(self.space.kinds()[name], self.table[VARIANT], stored)

    def _winner(self) -> Found:
        self._objectives.only("there is no best trial", "Take one of result.front")
        return self._found()[0]

    def _found(self) -> tuple[Found, ...]:
        found = front.of_journal(self._entries)
        if not found:
            raise SweepError("every trial of the sweep has diverged")
        return found

    def _trial(self, found: Found) -> Trial:
        slot, generation, saved = found.slot, found.generation, found.checkpoint
        local, variant = slot % self._layout.slots, self._lines.variant(slot, generation)
        choices, rate = self._spec.space.variants()[variant], self._lines.rate(slot, generation)
        host, measured = ShardHost, self._metrics(found)
        there = measured if rate is None else {**measured, LR_HYPER: rate}

        def load() -> dict[str, np.ndarray]:
            with named(self._storage):
                return self._storage.load_slot(saved, local)

        return Trial(
            number=found.trial,
            generation=generation,
            slot=slot,
            scores=self._objectives.shown(found.scores),
            metrics=measured,
            settings={
                name: number_of(about, there[names.setting(name)])
                for name, about in self._spec.space.of(choices).settings().items()
                if names.setting(name) in there
            },
            lr_hyper=rate,
            choices=choices,
            lineage=self._lines.trials(slot, generation),
            load=load,
            restore=lambda: host(self._spec, self._load_data()).restore(variant, saved, local),
        )

    def _metrics(self, found: Found) -> dict[str, float]:
        """Return a trial's row of its table; where that is damaged, what the journal says."""
        try:
            table = self._tables.at(found.generation)
        except DamagedFile:
            return self._objectives.shown(found.scores)
        return {name: float(table[name][found.slot]) for name in names.measured(table)}

    @functools.cached_property
    def _tables(self) -> Tables:
        return Tables(self._storage, self._entries)

    @functools.cached_property
    def _lines(self) -> Lineage:
        rules = Rules(RandomSearch(), self._spec.space, self._spec.seed, self._objectives)
        known = manifest.read(self.where)
        told = any(known[name] is not None for name in manifest.FIRST)
        return Lineage(self._tables, self._layout, rules, told)

    @functools.cached_property
    def _layouts(self) -> list[Any]:
        entries = programs.read(self._where)
        if entries is None:
            return [self._spec.batching] * self._layout.variants
        return [entry["batching"] for entry in entries]


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
        compared=identity.objectives.names,
    )


def _check_trial(trial: Any) -> None:
    """Raise for what is no trial."""
    if not isinstance(trial, Trial | Found):
        raise TypeError(
            f"trial must be a trial, one of result.front or result.best, got {trial!r}: that of a "
            "number is the one of result.front that has it as `number`"
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
