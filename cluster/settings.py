"""A sweep's settings as data: what decides its numbers, and where and how far it runs.

TOML, a storage's manifest and the adapter of Ray Tune take their names from here.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from gradhpo.cluster import importing, objectives
from gradhpo.cluster import points as points_of
from gradhpo.cluster.drawing import Drawing
from gradhpo.cluster.objectives import Metric, Objectives
from gradhpo.cluster.processes import ProcessSettings
from gradhpo.cluster.samplers import OptunaSampler, Sampler
from gradhpo.cluster.samplers import written as samplers
from gradhpo.cluster.schedulers import PBT, Scheduler
from gradhpo.cluster.schedulers import written as schedulers
from gradhpo.cluster.space import SearchSpace
from gradhpo.errors import check_count, check_hashable, check_number
from gradhpo.files import Where, where_of
from gradhpo.host import check_once
from gradhpo.optimizer import BilevelOptimizer
from gradhpo.parallel import rules as dividing
from gradhpo.problem import Problem
from gradhpo.timetable import EpisodeInit, starts_fresh
from gradhpo.watch import Stop

PLACEMENTS = ("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD")
EXECUTORS = ("auto", "local", "processes", "ray")


class Written(NamedTuple):
    """How a setting stands in a manifest, and what is read from there or from TOML."""

    write: Callable[[Any], Any]
    read: Callable[[Any], Any]


def _written(write: Callable[[Any], Any], read: Callable[[Any], Any]) -> dict[str, Any]:
    return {"written": Written(write, read)}


def _stop(given: Any) -> Stop:
    """Return a `Stop` from a table of TOML, or as it is."""
    if isinstance(given, Stop):
        return given
    known = [field.name for field in dataclasses.fields(Stop)]
    if not isinstance(given, Mapping) or not set(given) <= set(known):  # pyright: ignore
        accepted = f"a table with some of {', '.join(known)}"
        raise ValueError(f"stop must be {accepted}, got {given!r}")
    table: dict[str, Any] = dict(given)  # pyright: ignore
    return Stop(**table)


def _points(given: Any) -> Any:
    """Return the points of a table of TOML, which may say where to find them."""
    from gradhpo.cluster import warm_start  # reads results, which know of settings

    return warm_start.read(given)


_OBJECT = _written(importing.named, importing.reference_of)
_RULES = _written(lambda rules: [[name, how] for name, how in rules.items()], objectives.parsed)
"""In their order, of which a JSON object says nothing."""
_STOP = _written(dataclasses.asdict, _stop)
_SAMPLER = _written(samplers.describe, samplers.parse)
_LOCAL: dict[str, Any] = {"local": True}
"""What a storage does not tell the next run."""


@dataclasses.dataclass(frozen=True)
class Identity:
    """What decides a sweep's numbers: a storage goes on with the same, and no other."""

    problem: Any = dataclasses.field(metadata=_OBJECT)
    optimizer: Any = dataclasses.field(metadata=_OBJECT)
    space: SearchSpace = dataclasses.field(
        metadata=_written(SearchSpace.describe, SearchSpace.parse)
    )
    population: int
    steps_per_generation: int
    scheduler: Scheduler = dataclasses.field(
        default_factory=PBT, metadata=_written(schedulers.describe, schedulers.parse)
    )
    metric: Metric = dataclasses.field(
        default="val_loss", metadata=_written(objectives.written, objectives.parsed)
    )
    mode: Literal["min", "max"] = "min"
    seed: int = 0
    shards: int | None = None
    batching: Any = "auto"
    mesh: Mapping[str, int] | None = None
    data: Any = dataclasses.field(default=None, metadata=_OBJECT)
    episode_length: int | None = None
    lr_reptile: float = 1.0
    episode_init: EpisodeInit = "reptile"
    lr_schedule: Any = dataclasses.field(default=None, metadata=_OBJECT)
    record: int | None = None
    validation: Any = dataclasses.field(default=None, metadata=_OBJECT)
    sampler: Sampler | None = dataclasses.field(default=None, metadata=_SAMPLER)
    points: Sequence[points_of.Point] | None = dataclasses.field(
        default=None, metadata=_written(list, _points)
    )
    first_seed: int | None = None
    rules: Mapping[str, Any] | None = dataclasses.field(default=None, metadata=_RULES)

    def references(self) -> list[str]:
        """Return what is named to be imported, see `gradhpo.cluster.importing`."""
        scheduler = schedulers.describe(self.scheduler).get("function")
        sampler = self.sampler and samplers.describe(self.sampler).get("function")
        given = (self.problem, self.optimizer, scheduler, sampler, self.data)
        named = (*given, self.lr_schedule, self.validation)
        return [name for name in named if isinstance(name, str)]

    def arrays(self, folders: Iterable[str]) -> Any:
        """Return what the problem's function gets as `data`, which is imported where it is named.

        Args:
          folders: where references are looked up.
        """
        if not isinstance(self.data, str):
            return self.data
        importing.extend_path(folders)
        return importing.load(self.data)()

    def loaded(self) -> Identity:
        """Return it with a scheduler and a sampler that are named imported, and seen to work.

        Raises:
          ImportError, TypeError, ValueError: if one of them cannot be used.
        """
        scheduler, sampler = schedulers.loaded(self.scheduler), samplers.loaded(self.sampler)
        if isinstance(sampler, OptunaSampler):
            sampler.rehearse(self.space, len(self.objectives.names))
        return dataclasses.replace(self, scheduler=scheduler, sampler=sampler)

    def __post_init__(self) -> None:
        self._check_objects()
        self._check_numbers()
        if self.rules is not None:
            _set(self, "rules", dividing.check_rules(self.rules))
        _set(self, "mesh", _mesh(self.mesh, self.rules))
        if isinstance(self.batching, np.generic):
            _set(self, "batching", self.batching.item())
        if self.scheduler is None:  # pyright: ignore[reportUnnecessaryComparison]
            _set(self, "scheduler", PBT())
        if not callable(self.scheduler) or isinstance(self.scheduler, type):
            known = ", ".join(f"{name}(…)" for name in schedulers.BUILT_IN)
            accepted = f"{known} or a function"
            raise TypeError(f"scheduler must be {accepted}, got {self.scheduler!r}")
        self._check_first()
        _set(self, "metric", objectives.checked(self.metric, self.mode))
        if not isinstance(self.metric, str):  # which says its own directions now
            _set(self, "mode", "min")
        _check_plain(self)

    @property
    def objectives(self) -> Objectives:
        """What trials are compared by."""
        return Objectives.of(self.metric, self.mode)

    @property
    def drawing(self) -> Drawing:
        """Where the settings of new trials come from."""
        return Drawing(self.sampler, tuple(self.points or ()), self.first_seed)

    def describe(self) -> dict[str, Any]:
        """Return the settings as JSON, but for `data`, which only its arrays identify."""
        return _described(self, lambda field: field.name != "data")

    def _check_objects(self) -> None:
        for name, kind in (("problem", Problem), ("optimizer", BilevelOptimizer)):
            value = getattr(self, name)
            if isinstance(value, str):
                importing.check_reference(name, value)
            elif not isinstance(value, kind) and not callable(value):
                accepted = f"{importing.ACCEPTED}, a {kind.__name__}, or a function that makes one"
                raise TypeError(f"{name} must be {accepted}, got {value!r}")
        if isinstance(self.problem, Problem):
            check_once(self.problem.batches)
        if not isinstance(self.space, SearchSpace):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"space must be a SearchSpace, got {self.space!r}")
        for name in ("data", "lr_schedule", "validation"):
            if isinstance(value := getattr(self, name), str):
                importing.check_reference(name, value)
        if self.validation is not None and not isinstance(self.validation, str):
            check_hashable("validation", self.validation)
        if self.lr_schedule is None:
            return
        if not isinstance(self.lr_schedule, str):
            check_hashable("lr_schedule", self.lr_schedule)
        if self.space.lr_hyper is None:
            raise ValueError("lr_schedule needs SearchSpace(lr_hyper=…), of which it is a factor")

    def _check_first(self) -> None:
        if self.sampler is not None:
            samplers.checked(self.sampler)
        if self.points is not None:
            _set(self, "points", points_of.checked(self.points, self.space))
            points_of.slots_of(self.points, self.space, self.population)

    def _check_numbers(self) -> None:
        for name in ("population", "steps_per_generation"):
            _set(self, name, check_count(name, getattr(self, name)))
        for name in ("shards", "episode_length"):
            if (value := getattr(self, name)) is not None:
                _set(self, name, check_count(name, value))
        if self.record is not None:
            _set(self, "record", check_count("record", self.record))
            if self.record > self.steps_per_generation:
                raise ValueError(
                    f"record must be at most steps_per_generation={self.steps_per_generation}, "
                    f"got {self.record}: it keeps every n-th step"
                )
        for name in ("seed", "first_seed"):
            if (value := getattr(self, name)) is not None:
                _set(self, name, check_count(name, value, 0))
                if value >= 2**32:
                    raise ValueError(f"{name} must be below 2**32, got {value}")
        infinity = float("inf")
        _set(self, "lr_reptile", check_number("lr_reptile", self.lr_reptile, -infinity, infinity))
        starts_fresh(self.episode_init, self.episode_length, self.lr_reptile)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a sweep runs, and how far: nothing here changes a number."""

    storage: Where = dataclasses.field(metadata=_LOCAL)
    generations: int = dataclasses.field(metadata=_LOCAL)
    workers: int = 1
    resources: Mapping[str, float] | None = None
    processes: int = 1
    executor: Literal["auto", "local", "processes", "ray"] = "auto"
    address: str | None = None
    env: Mapping[str, str] | None = None
    runtime_env: Mapping[str, Any] | None = None
    deadline: float | None = None
    start_deadline: float = 600
    heartbeat: float = 60
    wait: float = 0
    placement: str = "PACK"
    checkpoint_every: int = 1
    stop: Stop | None = dataclasses.field(default=None, metadata=_LOCAL | _STOP)
    progress: bool | None = dataclasses.field(default=None, metadata=_LOCAL)

    def __post_init__(self) -> None:
        _set(self, "storage", folder_of(self.storage))
        for name in ("generations", "workers", "processes", "checkpoint_every"):
            _set(self, name, check_count(name, getattr(self, name)))
        for name, accepted in (("executor", EXECUTORS), ("placement", PLACEMENTS)):
            if (value := getattr(self, name)) not in accepted:
                raise ValueError(f"{name} must be one of {accepted}, got {value!r}")
        for name in ("resources", "env", "runtime_env"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, Mapping):
                raise TypeError(f"{name} must be a dictionary, got {value!r}")
            _set(self, name, dict(value or {}))  # pyright: ignore[reportUnknownArgumentType]
        _set(self, "resources", _resources(self.resources or {}))
        _set(self, "env", {str(k): str(v) for k, v in (self.env or {}).items()})
        for name, accepted, kind in (("address", "a string", str), ("progress", "a boolean", bool)):
            value = getattr(self, name)
            if value is not None and not isinstance(value, kind):
                raise TypeError(f"{name} must be None or {accepted}, got {value!r}")
        if self.stop is not None and not isinstance(self.stop, Stop):  # pyright: ignore
            raise TypeError(f"stop must be a gradhpo.Stop, got {self.stop!r}")
        if self.deadline is not None:
            _set(self, "deadline", _seconds("deadline", self.deadline))
        for name in ("start_deadline", "heartbeat"):
            _set(self, name, _seconds(name, getattr(self, name)))
        _set(self, "wait", check_number("wait", self.wait, 0, float("inf")))
        _check_plain(self)

    def for_processes(self, shards: int) -> ProcessSettings:
        """Return what the processes that hold so many shards are started and judged by."""
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        given["workers"] = min(self.workers, shards)
        names = {field.name for field in dataclasses.fields(ProcessSettings)}
        return ProcessSettings(**{name: given[name] for name in names & set(given)})

    def describe(self) -> dict[str, Any]:
        """Return as JSON what a storage tells the next run."""
        return _described(self, lambda field: not field.metadata.get("local"))


def check_together(identity: Identity, place: Place) -> None:
    """Raise for what is wrong with both and with neither alone.

    Raises:
      ValueError: naming the argument.
    """
    if place.processes != 1 and identity.batching == "auto":
        raise ValueError(
            'processes above 1 need a batching other than "auto", which every process would '
            "measure on its own"
        )
    if identity.objectives.several and place.stop is not None and place.stop.target is not None:
        raise ValueError(
            f"stop: target={place.stop.target:g} is of one metric, and the objectives are "
            f"{identity.objectives}: take patience, for generations that bring nothing to the front"
        )


def names() -> list[str]:
    """Return the arguments of a sweep."""
    return [field.name for kind in (Identity, Place) for field in dataclasses.fields(kind)]


def moved(name: str) -> str | None:
    """Return where a setting is that was an attribute of `Sweep`; None for what is none."""
    asked = {"steps": "steps_per_generation"}.get(name, name)
    for part, kind in (("identity", Identity), ("place", Place)):
        if asked in {field.name for field in dataclasses.fields(kind)}:
            return f"Sweep.{name} is Sweep.{part}.{asked} since version 0.3"
    return None


def of_toml(path: str | Path) -> dict[str, Any]:
    """Return what a file of TOML says.

    Raises:
      ValueError: for what is not TOML.
      OSError: if the file cannot be read.
    """
    with open(path, "rb") as file:
        try:
            return tomllib.load(file)
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"{path} is not TOML: {error}") from None


def read(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the arguments of a sweep that TOML or a manifest gives by name.

    Raises:
      ValueError: for an unknown or missing name, or a value of the wrong kind; it says `where`.
    """
    if unknown := [name for name in given if name not in names()]:
        near = difflib.get_close_matches(unknown[0], names(), 1)
        meant = f" (did you mean {near[0]!r}?)" if near else ""
        known = ", ".join(names())
        raise ValueError(f"{where}: unknown name {unknown[0]!r}{meant}; a sweep has {known}")
    arguments = dict(given)
    for kind in (Identity, Place):
        for field in dataclasses.fields(kind):
            if field.name not in given:
                defaults = (field.default, field.default_factory)
                if all(default is dataclasses.MISSING for default in defaults):
                    raise ValueError(f"{where}: {field.name} is missing")
            elif "written" in field.metadata:
                value = field.metadata["written"].read(given[field.name])
                arguments[field.name] = value
    return arguments


def folder_of(storage: Any) -> Where:
    """Return the folder that `storage` names, or the store's address; see `where_of`."""
    return where_of("storage", storage)


def below(storage: Where, *names: str) -> Where:
    """Return what has these names below a folder or an address."""
    return "/".join((storage, *names)) if isinstance(storage, str) else storage.joinpath(*names)


def _described(
    settings: Identity | Place, wanted: Callable[[dataclasses.Field[Any]], bool]
) -> dict[str, Any]:
    described: dict[str, Any] = {}
    for field in filter(wanted, dataclasses.fields(settings)):
        value, written = getattr(settings, field.name), field.metadata.get("written")
        described[field.name] = value if value is None or written is None else written.write(value)
    return described


def _check_plain(settings: Identity | Place) -> None:
    """Raise for what JSON cannot say."""
    for name, value in settings.describe().items():
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"{name} must be of strings, numbers, booleans, lists and dictionaries, got "
                f"{value!r}: {error}"
            ) from None


def _set(settings: Identity | Place, name: str, value: Any) -> None:
    object.__setattr__(settings, name, value)


def _mesh(mesh: Any, rules: Mapping[str, Any] | None) -> dict[str, int] | None:
    ruled = set[str]() if rules is None else dividing.axes_of(rules)
    if mesh is None and rules is None:
        return None
    if not isinstance(mesh, Mapping) or not set(mesh) <= {"trial", "data"} | ruled:  # pyright: ignore[reportUnknownArgumentType]
        named = ", ".join(sorted(ruled)) or "nothing"
        also = "" if rules is None else f", and what rules name: {named}"
        raise ValueError(f'mesh must be {{"trial": a, "data": b}}{also}, got {mesh!r}')
    if "trial" in ruled or not ruled <= set(mesh):  # pyright: ignore[reportUnknownArgumentType]
        had = ", ".join(repr(name) for name in mesh if name != "trial")  # pyright: ignore
        raise ValueError(f"rules must divide over axes of the mesh ({had}), got {sorted(ruled)}")
    given: dict[str, Any] = dict(mesh)  # pyright: ignore[reportUnknownArgumentType]
    return {name: check_count(f"mesh[{name!r}]", size) for name, size in given.items()}


def _resources(given: Mapping[str, Any]) -> dict[str, float]:
    plain: dict[str, float] = {}
    for name, amount in given.items():
        check_number(f"resources[{name!r}]", amount, 0, float("inf"))
        if name in ("CPU", "GPU"):
            raise ValueError(f"resources: write num_{name.lower()}s, got {name!r}")
        plain[name] = amount.item() if isinstance(amount, np.generic | np.ndarray) else amount
    return plain


def _seconds(name: str, value: Any) -> float:
    return check_number(name, value, 0, float("inf"), open_low=True)
