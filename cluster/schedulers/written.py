"""Schedulers as they are written in TOML and in a manifest, and read from there."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from gradhpo.cluster import importing
from gradhpo.cluster.schedulers.asha import ASHA
from gradhpo.cluster.schedulers.decision import Decision, Scheduler
from gradhpo.cluster.schedulers.halving import SuccessiveHalving
from gradhpo.cluster.schedulers.pb2 import PB2
from gradhpo.cluster.schedulers.pbt import PBT
from gradhpo.cluster.schedulers.random_search import RandomSearch
from gradhpo.cluster.schedulers.table import Table
from gradhpo.cluster.space import SearchSpace

BUILT_IN: dict[str, Any] = {
    c.__name__: c for c in (PBT, PB2, SuccessiveHalving, ASHA, RandomSearch)
}


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
    """Return a scheduler itself, imported where it is given by name.

    Raises:
      ImportError: if it needs a package that is not installed.
    """
    if isinstance(scheduler, PB2):
        scheduler.require()
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
