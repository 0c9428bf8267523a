"""Schedulers: what happens between two generations, as pure functions of the gathered table.

A scheduler is called as `scheduler(table, space, rng) -> Decision`, for each population on its
own, with a generator seeded by (seed, generation, population). It sees one row for each slot.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from gradhpo.cluster.space import Changes, SearchSpace
from gradhpo.errors import check_count, check_number

NEW = -1
"""In `Decision.parents`: the slot gets a new trial, drawn from the search space."""


@dataclasses.dataclass(frozen=True)
class Table:
    """One population after a generation; every array has one entry for each slot."""

    generation: int
    """Counted from 0."""
    score: np.ndarray
    """What is minimized; NaN for a trial that has diverged."""
    trial: np.ndarray
    """The trial in each slot, by its number."""
    age: np.ndarray
    """Generations that each trial has run."""
    values: Mapping[str, np.ndarray]
    """The present settings of the search space, by name."""
    metrics: Mapping[str, np.ndarray]
    """The five metrics of the last step, and the problem's own, by name."""

    def ranking(self) -> np.ndarray:
        """Return the slots from the best to the worst; diverged ones last."""
        return np.argsort(np.where(np.isfinite(self.score), self.score, np.inf), kind="stable")

    def diverged(self) -> np.ndarray:
        """Return which slots' trials have diverged."""
        return ~np.isfinite(self.score)


@dataclasses.dataclass(frozen=True)
class Decision:
    """What the slots do next."""

    parents: np.ndarray
    """For each slot the slot that it copies: its own goes on, `NEW` starts a new trial."""
    changes: Changes = dataclasses.field(default_factory=dict)
    """Of the settings of slots that copy, by name; see `SearchSpace.explore`."""


Scheduler: TypeAlias = Callable[[Table, SearchSpace, np.random.Generator], Decision]


@dataclasses.dataclass(frozen=True)
class PBT:
    """Population-based training (Jaderberg et al. 2017): the worst copy the best, and move on.

    The worst slots take weights, hyperparameters and optimizer states of slots drawn from the
    best, and perturb the settings of the search space. Diverged trials count as worst, however
    many there are; where nothing is left to copy, trials start anew.

    Args:
      quantile: in (0, 0.5], the share that copies, and the share that is copied.
      resample: in [0, 1], the probability that a setting is drawn anew instead of multiplied.
      factors: what settings are multiplied by, one at random.

    Raises:
      ValueError: for an argument out of range.
    """

    quantile: float = 0.25
    resample: float = 0.25
    factors: tuple[float, ...] = (0.8, 1.25)

    def __post_init__(self) -> None:
        check_number("quantile", self.quantile, 0, 0.5, open_low=True)
        check_number("resample", self.resample, 0, 1)
        object.__setattr__(self, "factors", tuple(self.factors))
        if not self.factors or not all(f > 0 for f in self.factors):
            raise ValueError(f"factors must be numbers above 0, got {self.factors}")

    def __call__(self, table: Table, space: SearchSpace, rng: np.random.Generator) -> Decision:
        """Decide."""
        slots = np.arange(len(table.score))
        order, diverged = table.ranking(), table.diverged()
        count = min(max(1, int(self.quantile * len(slots))), len(slots) // 2)
        losers = diverged.copy()
        losers[order[len(slots) - count :]] = True
        best = order[: max(1, count)]
        best = best[~diverged[best]]
        parents = slots.copy()
        parents[losers] = rng.choice(best, losers.sum()) if len(best) else NEW
        changes = space.explore(
            rng, table.values, parents, factors=self.factors, resample=self.resample
        )
        return Decision(parents, changes)


@dataclasses.dataclass(frozen=True)
class SuccessiveHalving:
    """Successive halving (Jamieson & Talwalkar 2016), in slots that are never empty.

    A trial that has run `grace·reduction^k` generations goes on if it is among the best
    1/reduction of the trials that reached that age together (of one left over, at random); the
    others' slots, diverged trials'
    and those of trials that ran `longest` generations get new trials, so shapes never change.

    Args:
      reduction: at least 2, the factor between rungs.
      grace: generations that every trial gets.
      longest: generations after which a trial is complete; by default the highest rung that one
        trial of a full population reaches, `grace·reduction^⌊log(slots)/log(reduction)⌋`.

    Raises:
      ValueError: for an argument out of range.
    """

    reduction: int = 3
    grace: int = 1
    longest: int | None = None

    def __post_init__(self) -> None:
        check_count("reduction", self.reduction, 2)
        check_count("grace", self.grace)
        if self.longest is not None:
            check_count("longest", self.longest, self.grace)

    def __call__(self, table: Table, space: SearchSpace, rng: np.random.Generator) -> Decision:
        """Decide."""
        del space
        parents = np.arange(len(table.score))
        longest, slots = self.longest, len(parents)
        if longest is None:
            rungs = int(np.log(slots) / np.log(self.reduction) + 1e-9)
            longest = self.grace * self.reduction**rungs
        stopped = table.diverged() | (table.age >= longest)
        order = table.ranking()
        rung = self.grace
        while rung <= table.age.max():
            reached = order[table.age[order] == rung]  # from the best to the worst
            share = len(reached) / self.reduction
            # A part of a trial goes on with that probability; rounded up, survivors of ever
            # smaller cohorts would in time hold every slot.
            stopped[reached[int(share + rng.random() * (share % 1 > 0)) :]] = True
            rung *= self.reduction
        parents[stopped] = NEW
        return Decision(parents)


@dataclasses.dataclass(frozen=True)
class RandomSearch:
    """Independent trials from the search space; only diverged ones are replaced.

    Args:
      trial_generations: generations after which a trial is complete and a new one takes its slot;
        None for the whole sweep.

    Raises:
      ValueError: for an argument out of range.
    """

    trial_generations: int | None = None

    def __post_init__(self) -> None:
        if self.trial_generations is not None:
            check_count("trial_generations", self.trial_generations)

    def __call__(self, table: Table, space: SearchSpace, rng: np.random.Generator) -> Decision:
        """Decide."""
        del space, rng
        stopped = table.diverged()
        if self.trial_generations is not None:
            stopped |= table.age >= self.trial_generations
        return Decision(np.where(stopped, NEW, np.arange(len(table.score))))


BUILT_IN: dict[str, Any] = {c.__name__: c for c in (PBT, SuccessiveHalving, RandomSearch)}


def describe(scheduler: Any) -> dict[str, Any]:
    """Return a scheduler as it is written in TOML and in a sweep's manifest."""
    name = type(scheduler).__name__
    if BUILT_IN.get(name) is type(scheduler):
        fields: dict[str, Any] = dataclasses.asdict(scheduler)
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}
        return {"name": name, **{k: v for k, v in plain.items() if v is not None}}
    named = scheduler if hasattr(scheduler, "__qualname__") else type(scheduler)
    settings: Any = dataclasses.asdict(scheduler) if dataclasses.is_dataclass(scheduler) else {}  # pyright: ignore
    return {"function": f"{named.__module__}:{named.__qualname__}", **settings}


def parse(description: Mapping[str, Any], load: Callable[[str], Any]) -> Scheduler:
    """Return the scheduler that `describe` wrote, or a TOML table with the same keys.

    Raises:
      ValueError: for an unknown name or setting.
    """
    settings: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in description.items()
    }
    if "function" in settings:
        made = load(settings.pop("function"))
        return made(**settings) if isinstance(made, type) or settings else made
    name = settings.pop("name", None)
    if name not in BUILT_IN:
        raise ValueError(f"scheduler: name must be one of {', '.join(BUILT_IN)}, got {name!r}")
    accepted = [field.name for field in dataclasses.fields(BUILT_IN[name])]
    if unknown := set(settings) - set(accepted):
        raise ValueError(f"scheduler {name} takes {accepted}, got {sorted(unknown)[0]!r}")
    return BUILT_IN[name](**settings)


def check(decision: Any, slots: int, names: Sequence[str]) -> Decision:
    """Return a scheduler's decision, checked.

    Raises:
      TypeError: if it is not a `Decision`.
      ValueError: if parents or changes do not fit the slots.
    """
    if not isinstance(decision, Decision):
        raise TypeError(f"a scheduler must return a Decision, got {type(decision).__name__}")
    parents = np.asarray(decision.parents)
    if parents.shape != (slots,) or not np.issubdtype(parents.dtype, np.integer):
        raise ValueError(
            f"Decision.parents must be {slots} integers, got {parents.dtype} of {parents.shape}"
        )
    if ((parents < NEW) | (parents >= slots)).any():
        raise ValueError(f"Decision.parents must be from {NEW} to {slots - 1}, got {parents!r}")
    for name, change in decision.changes.items():
        if name not in names:
            raise ValueError(f"Decision.changes has {name!r}; the space has {list(names)}")
        if any(np.shape(part) != (slots,) for part in change):
            raise ValueError(f"Decision.changes[{name!r}] must have {slots} entries in each part")
    return Decision(parents.astype(np.int64), dict(decision.changes))
