"""Schedulers: what happens between two generations, as pure functions of the gathered table.

A scheduler is called as `scheduler(table, space, rng) -> Decision`, for each population on its
own, with a generator seeded by (seed, generation, population). It sees one row for each slot.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np

from gradhpo.cluster import importing
from gradhpo.cluster.space import Change, Changes, Distribution, SearchSpace
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
        quantile = check_number("PBT: quantile", self.quantile, 0, 0.5, open_low=True)
        resample = check_number("PBT: resample", self.resample, 0, 1)
        factors = tuple(float(f) for f in self.factors)
        if not factors or not all(0 < f < float("inf") for f in factors):
            raise ValueError(f"PBT: factors must be numbers above 0, got {self.factors}")
        for name, value in (("quantile", quantile), ("resample", resample), ("factors", factors)):
            object.__setattr__(self, name, value)

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
        object.__setattr__(self, "reduction", check_count("reduction", self.reduction, 2))
        object.__setattr__(self, "grace", check_count("grace", self.grace))
        if self.longest is not None:
            object.__setattr__(self, "longest", check_count("longest", self.longest, self.grace))

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
        if (given := self.trial_generations) is not None:
            object.__setattr__(self, "trial_generations", check_count("trial_generations", given))

    def __call__(self, table: Table, space: SearchSpace, rng: np.random.Generator) -> Decision:
        """Decide."""
        del space, rng
        stopped = table.diverged()
        if self.trial_generations is not None:
            stopped |= table.age >= self.trial_generations
        return Decision(np.where(stopped, NEW, np.arange(len(table.score))))


BUILT_IN: dict[str, Any] = {c.__name__: c for c in (PBT, SuccessiveHalving, RandomSearch)}


@dataclasses.dataclass(frozen=True)
class Named:
    """A scheduler of a program, by its name; imported when it is first asked, or by `loaded`."""

    function: str
    settings: Mapping[str, Any]

    def __call__(self, table: Table, space: SearchSpace, rng: np.random.Generator) -> Decision:
        """Import it, and let it decide."""
        return self.load()(table, space, rng)

    def load(self) -> Scheduler:
        """Import it."""
        made = importing.load(self.function)
        return made(**self.settings) if isinstance(made, type) or self.settings else made


def loaded(scheduler: Scheduler) -> Scheduler:
    """Return a scheduler itself, imported where it is given by name."""
    return scheduler.load() if isinstance(scheduler, Named) else scheduler


def describe(scheduler: Any) -> dict[str, Any]:
    """Return a scheduler as it is written in TOML and in a sweep's manifest."""
    if isinstance(scheduler, Named):
        return {"function": scheduler.function, **_plain(scheduler.settings)}
    fields: Any = dataclasses.asdict(scheduler) if dataclasses.is_dataclass(scheduler) else {}  # pyright: ignore
    name = type(scheduler).__name__
    if BUILT_IN.get(name) is type(scheduler):
        return {"name": name, **{k: v for k, v in _plain(fields).items() if v is not None}}
    named: Any = scheduler if hasattr(scheduler, "__qualname__") else type(scheduler)
    return {"function": f"{named.__module__}:{named.__qualname__}", **_plain(fields)}


def parse(description: Any) -> Scheduler:
    """Return the scheduler that `describe` wrote, or a TOML table with the same keys.

    Nothing is imported.

    Raises:
      ValueError: for an unknown name or setting.
    """
    if not isinstance(description, Mapping):
        raise ValueError(f'scheduler must be a table, {{name = "PBT"}}, got {description!r}')
    given: Mapping[str, Any] = description  # pyright: ignore[reportUnknownVariableType]
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    if "function" in settings:
        return Named(str(settings.pop("function")), settings)
    name = settings.pop("name", None)
    if name not in BUILT_IN:
        raise ValueError(f"scheduler: name must be one of {', '.join(BUILT_IN)}, got {name!r}")
    accepted = [field.name for field in dataclasses.fields(BUILT_IN[name])]
    if unknown := set(settings) - set(accepted):
        raise ValueError(f"scheduler {name} takes {accepted}, got {sorted(unknown)[0]!r}")
    return BUILT_IN[name](**settings)


def _plain(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as JSON has them: NumPy's numbers and arrays as Python's."""
    arrays = (np.generic, np.ndarray)
    plain = {k: v.tolist() if isinstance(v, arrays) else v for k, v in fields.items()}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in plain.items()}


def check(decision: Any, slots: int, settings: Mapping[str, Distribution]) -> Decision:
    """Return a scheduler's decision, checked.

    Raises:
      TypeError: if it is not a `Decision`.
      ValueError: if parents or changes do not fit the slots, or a change is no number or sets a
        value outside of its distribution's bounds.
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
        if name not in settings:
            raise ValueError(f"Decision.changes has {name!r}; the space has {list(settings)}")
        _check_change(f"Decision.changes[{name!r}]", change, slots, settings[name].bounds)
    return Decision(parents.astype(np.int64), dict(decision.changes))


def _check_change(name: str, change: Change, slots: int, bounds: tuple[float, float]) -> None:
    if len(change) != 3 or any(np.shape(part) != (slots,) for part in change):
        raise ValueError(f"{name} must have {slots} entries in each part")
    mask = np.asarray(change[0], bool)
    for field, part in zip(Change._fields[1:], change[1:], strict=True):
        numbers = np.asarray(part, float)
        with np.errstate(over="ignore"):
            wrong = mask & ~np.isfinite(numbers.astype(np.float32))
        if wrong.any():
            slot = int(np.flatnonzero(wrong)[0])
            raise ValueError(f"{name}.{field} must be finite, got {numbers[slot]} for slot {slot}")
    multiply, add = (np.asarray(part, float) for part in change[1:])
    low, high = bounds
    # What is set, and not perturbed; a number that came through a logarithm is off by its rounding.
    slack = 1e-9 * max(abs(low), abs(high))
    outside = mask & (multiply == 0) & ((add < low - slack) | (add > high + slack))
    if outside.any():
        slot = int(np.flatnonzero(outside)[0])
        raise ValueError(
            f"{name} must be in the space, from {low:g} to {high:g}, got {add[slot]:g} for slot "
            f"{slot}"
        )
