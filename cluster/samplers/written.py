"""Samplers as they are written in TOML and in a manifest, and read from there."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from gradhpo.cluster.samplers.asking import Sampler
from gradhpo.cluster.samplers.drawn import Drawn
from gradhpo.cluster.samplers.optuna_sampler import OptunaSampler
from gradhpo.cluster.schedulers import written as schedulers
from gradhpo.cluster.space import SearchSpace


@dataclasses.dataclass(frozen=True)
class Named:
    """A sampler of a program, by its name; imported by `loaded`, or when it is first asked."""

    named: schedulers.Named

    def load(self) -> Sampler:
        """Import it.

        Raises:
          TypeError: if it is no sampler.
        """
        made: Any = self.named.load()
        made = made() if isinstance(made, type) else made
        return checked(made)

    def ask(
        self, space: SearchSpace, history: Drawn, rng: np.random.Generator, n: int
    ) -> Mapping[str, Any]:
        """Import it, and ask it."""
        return self.load().ask(space, history, rng, n)


def checked(sampler: Any) -> Sampler:
    """Return a sampler.

    Raises:
      TypeError: for what is none, or has settings that are no dataclass's.
    """
    if isinstance(sampler, type) or not isinstance(sampler, Sampler):
        accepted = "an OptunaSampler(…), or an object with ask(space, history, rng, n)"
        raise TypeError(f"sampler must be {accepted}, got {sampler!r}")
    told = isinstance(sampler, OptunaSampler) or dataclasses.is_dataclass(sampler)
    if not told and getattr(sampler, "__dict__", None):
        names = ", ".join(vars(sampler))
        raise TypeError(
            f"sampler: {type(sampler).__name__} has {names}, which a sweep cannot write down: make "
            "it a dataclass of what it is, and nothing else"
        )
    return sampler


def loaded(sampler: Sampler | None) -> Sampler | None:
    """Return a sampler itself, imported where it is given by name, and seen to be there.

    Raises:
      ImportError, TypeError, ValueError: if it cannot be used.
    """
    if isinstance(sampler, OptunaSampler):
        sampler.make(seed=0)
    return sampler.load() if isinstance(sampler, Named) else sampler


def describe(sampler: Any) -> dict[str, Any]:
    """Return a sampler as it is written in TOML and in a sweep's manifest."""
    if isinstance(sampler, OptunaSampler):
        return sampler.describe()
    return schedulers.describe(sampler.named if isinstance(sampler, Named) else sampler)


def parse(description: Any) -> Sampler:
    """Return the sampler that `describe` wrote, or a TOML table with the same keys.

    Nothing is imported.

    Raises:
      ValueError: for an unknown name.
    """
    accepted = '{name = "OptunaSampler", kind = "TPESampler"} or {function = "module:name"}'
    if not isinstance(description, Mapping):
        raise ValueError(f"sampler must be a table, {accepted}, got {description!r}")
    settings: dict[str, Any] = dict(description)  # pyright: ignore[reportUnknownArgumentType]
    if "function" in settings:
        return Named(schedulers.Named(str(settings.pop("function")), settings))
    if (name := settings.pop("name", None)) != "OptunaSampler":
        raise ValueError(f"sampler must be {accepted}, got name = {name!r}")
    return OptunaSampler(**settings)
