"""What a run computes, as a few words and checksums: runs with equal ones are of one program."""

from __future__ import annotations

import dataclasses

import jax
import optax

from gradhpo._version import __version__
from gradhpo.errors import warn_user
from gradhpo.optimizer import BilevelOptimizer

ADDED = {"added": True}
"""Metadata of a setting that a method got after runs with it were written to disk."""


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """Which problem and optimizer a run has."""

    versions: str
    """Of what makes a program from them: other versions make another one."""
    optimizer: str
    """Its class and settings."""
    init: str
    data: str | None
    step: str

    def check(self, name: str, before: Fingerprint) -> None:
        """Raise if this run is another one than `before`, which is to go on.

        Between versions nothing can be said of the programs, and a warning says that.

        Raises:
          ValueError: if something differs; it is named.
        """
        if before.versions != self.versions:
            warn_user(
                f"{name} was begun with {before.versions}, and this is {self.versions}: whether "
                "problem and optimizer are the same is not checked, and bits may differ",
                UserWarning,
            )
            return
        before.check_optimizer(name, self.optimizer)
        for part, what in _PARTS.items():
            if getattr(before, part) != getattr(self, part):
                raise ValueError(f"{name} is of a run with {what}. {_GO_ON}")

    def check_optimizer(self, name: str, now: str) -> None:
        """Raise if a run's optimizer is another one than `now`, from `settings`."""
        if self.optimizer != now:
            raise ValueError(
                f"{name} is of a run with another optimizer, {self.optimizer}; got {now}"
            )


_GO_ON = "To go on all the same: resume=dataclasses.replace(solution, fingerprint=None)"
_PARTS = {
    "init": "another Problem.init",
    "data": "another Problem.data",
    "step": "another problem or optimizer: a step with its losses, batch, inner_optimizer, "
    "outer_optimizer, update_fn, episodes or devices computes something else",
}


def versions() -> str:
    """Return what decides which program is made from a problem."""
    return (
        f"gradhpo {__version__}, jax {jax.__version__}, optax {optax.__version__} on "
        f"{jax.default_backend()}"
    )


def settings(optimizer: BilevelOptimizer) -> str:
    """Return an optimizer's class and its settings that are numbers or words.

    Of one that runs another in parallel, those of the other.
    """
    inside = getattr(optimizer, "optimizer", None)
    if isinstance(inside, BilevelOptimizer):
        return settings(inside)
    unwritten = _at_default_since(optimizer)
    given = sorted(item for item in vars(optimizer).items() if item[0] not in unwritten)
    parts = [f"{n}={x!r}" for n, x in given if isinstance(x, bool | int | float | str)]
    return f"{type(optimizer).__name__}({', '.join(parts)})"


def _at_default_since(optimizer: BilevelOptimizer) -> set[str]:
    """Return which settings are at their default and `ADDED`: those of older runs lack them."""
    if not dataclasses.is_dataclass(optimizer):
        return set()
    added = [
        field for field in dataclasses.fields(optimizer) if ADDED.items() <= field.metadata.items()
    ]
    return {field.name for field in added if getattr(optimizer, field.name) == field.default}
