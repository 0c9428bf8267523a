"""What a sweep found, read from its storage: the best trial, the table, who copied whom."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gradhpo import checkpoints
from gradhpo.checkpoints import DamagedFile
from gradhpo.cluster.controller import PARENT, Columns, Layout, decision_of
from gradhpo.cluster.failures import SweepError
from gradhpo.cluster.journal import Journal
from gradhpo.cluster.orders import Order, Spec
from gradhpo.cluster.schedulers import NEW
from gradhpo.cluster.shard import ShardHost
from gradhpo.cluster.space import LR_HYPER, Change, SearchSpace
from gradhpo.cluster.variant import Variant, build, data_key
from gradhpo.state import BilevelState, PyTree


class Copy(NamedTuple):
    """A trial that took another's weights."""

    generation: int
    """The first in which it ran."""
    trial: int
    source: int
    """The trial that it copied."""


class Turn(NamedTuple):
    """One generation of a trial's life."""

    generation: int
    trial: int
    slot: int
    lr_hyper: float | None
    changes: dict[str, tuple[float, float]]
    """By name of a hyperparameter, `(multiply, add)`: how it changed before the generation."""


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


class SweepResult:
    """The result of a sweep, complete or not.

    Args:
      storage: the sweep's folder.
      spec: what its workers were told.
      layout: its shards.
      layouts: each variant's `batching`.
      sign: 1 if its metric is minimized, -1 if maximized.
      metric: its name.
      data: what the problem's function gets as `data`.
      report: of the run that made it.

    Raises:
      SweepError: if no generation is done.
    """

    def __init__(
        self,
        storage: Path,
        spec: Spec,
        layout: Layout,
        layouts: list[Any],
        metric: str,
        sign: int,
        data: Any = None,
        report: Report | None = None,
    ) -> None:
        self._storage, self._spec = storage, spec
        self._layout, self._layouts = layout, layouts
        self._metric, self._sign, self._data = metric, sign, data
        self.report = report
        self._entries = list(Journal(storage).entries())
        if not self._entries:
            raise SweepError(f"no generation is done in {storage}")

    @property
    def generations(self) -> int:
        """Generations that are done."""
        return self._entries[-1]["generation"] + 1

    @functools.cached_property
    def table(self) -> Columns:
        """All generations' tables, one below the other: each column `(generations·population,)`.

        `generation`, `slot`, `variant`, `trial`, `born`, `parent` (the slot it came from; -1 for a
        new trial), `lr_hyper` where it is searched, the five metrics of the last step, the
        problem's own, and `hyperparams.…` for searched hyperparameters after the generation.
        """
        tables = [self._table(g) for g in range(self.generations)]
        n = self._layout.population
        names = [name for name in tables[0] if name != "next_parent" and "|" not in name]
        whole = {name: np.concatenate([table[name] for table in tables]) for name in names}
        variants = [self._layout.variant_of(shard) for shard in range(self._layout.shards)]
        return {
            "generation": np.repeat(np.arange(len(tables)), n),
            "slot": np.tile(np.arange(n), len(tables)),
            "variant": np.tile(np.repeat(variants, self._layout.slots), len(tables)),
            **whole,
        }

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
        table = self._table(self.generations - 1)
        return {k: v for k, v in table.items() if k != "next_parent" and "|" not in k}

    @property
    def copies(self) -> list[Copy]:
        """Which trial copied which, and when."""
        made: list[Copy] = []
        for generation in range(1, self.generations):
            table, before = self._table(generation), self._table(generation - 1)
            parents = table[PARENT]
            copied = (parents != NEW) & (parents != np.arange(len(parents)))
            made += [
                Copy(generation, int(table["trial"][s]), int(before["trial"][parents[s]]))
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
        arrays = checkpoints.load(self._storage, found["checkpoint"])[0]
        local = slot % self._layout.slots
        table = self._table(generation)
        variant = self._variant_of_slot(slot)
        own = {"trial", "born", PARENT, LR_HYPER, "next_parent"}
        host = ShardHost
        return Trial(
            number=found["trial"],
            generation=generation,
            score=found["score"] * self._sign,
            metrics={
                name: float(column[slot])
                for name, column in table.items()
                if name not in own and "|" not in name
            },
            lr_hyper=float(table[LR_HYPER][slot]) if LR_HYPER in table else None,
            choices=self._spec.space.variants()[variant],
            lineage=list(dict.fromkeys(turn.trial for turn in self.schedule)),
            arrays={name: array[local] for name, array in arrays.items()},
            restore=lambda: host(self._spec, self._data).restore(
                variant, found["checkpoint"], local
            ),
        )

    @functools.cached_property
    def schedule(self) -> list[Turn]:
        """The winner's life, generation by generation, through the trials that it came from."""
        found = self._best()
        slot, turns = found["slot"], list[Turn]()
        for generation in range(found["generation"], -1, -1):
            table = self._table(generation)
            before = decision_of(self._table(generation - 1)).changes if generation else None
            if before is None:
                before = self._first_changes()
            changes = {
                name: (float(change.multiply[slot]), float(change.add[slot]))
                for name, change in before.items()
                if change.mask[slot] and name != LR_HYPER
            }
            rate = float(table[LR_HYPER][slot]) if LR_HYPER in table else None
            turns.append(Turn(generation, int(table["trial"][slot]), slot, rate, changes))
            parent = int(table[PARENT][slot])
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

        number = self._variant_of_slot(self._best()["slot"])
        spec = dataclasses.replace(self._spec, batching=self._layouts[number])
        variant = Variant(spec, spec.space.variants()[number], self._data)
        variant.prepare(None)
        n, state = self._spec.slots, variant.zeros()
        everywhere = np.ones(n, bool)
        for index, turn in enumerate(self.schedule):
            order = Order(
                shard=0,
                variant=0,
                generation=turn.generation,
                trials=np.full(n, turn.trial, np.uint32),
                parents=np.arange(n, dtype=np.int32),
                fresh=np.full(n, index == 0),
                lr_hyper=None if turn.lr_hyper is None else np.full(n, turn.lr_hyper),
                changes={
                    name: Change(everywhere, np.full(n, multiply), np.full(n, add))
                    for name, (multiply, add) in turn.changes.items()
                },
                start=None,
            )
            state, _ = variant.turn(state, order)
        row = {name: leaf[0] for name, leaf in variant.take(state, [0]).items()}
        return jax.tree.map(np.asarray, variant.unflatten(row))

    @functools.cached_property
    def data(self) -> PyTree:
        """What `Problem.data` made for all trials (of the first variant), computed here again."""
        problem, _ = build(self._spec, self._spec.space.variants()[0], self._data)
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

    def _table(self, generation: int) -> Columns:
        """Return a generation's table; where its line is damaged, by what its name proves."""
        saved = self._saved.get(generation)
        if saved is None:
            saved = checkpoints.find(self._storage, f"tables/{generation:06d}")
        if saved is None:
            raise DamagedFile(f"tables/{generation:06d}", "is missing, and its line is damaged")
        return checkpoints.load(self._storage, saved)[0]

    @functools.cached_property
    def _saved(self) -> dict[int, Any]:
        return {entry["generation"]: entry["table"] for entry in self._entries}
