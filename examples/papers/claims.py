"""Claims as data: what is to be found out and how, written down before anything is computed.

`claims/NAME.toml` holds a claim: its source, the protocol, all settings, cases and methods, and
what is expected of them. `claims/results/NAME.CASE.json` holds what was measured: every measure of
every method for every seed. A statement holds if the whole 95% interval (Student's t, over seeds;
of differences of runs with the same seed) is on its side.
"""

from __future__ import annotations

import dataclasses
import json
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import report

FOLDER = Path(__file__).parent / "claims"
DIGITS = 5
"""Significant digits of a number in a result."""


@dataclasses.dataclass(frozen=True)
class Statement:
    """Something expected of a measure: of a method, or of one method less another."""

    says: str
    measure: str
    method: str
    less: str | dict[str, float] | None = None
    """The method that it is compared with, or several with their shares."""
    above: float = 0.0
    """What the measure, or the difference, should be above."""
    sign: int = 1
    """-1 if smaller is better: what counts is then the negative."""
    cases: tuple[str, ...] | None = None
    """The cases that it speaks of; None for all."""

    @property
    def others(self) -> dict[str, float]:
        """The methods that it is compared with, and their shares."""
        return {self.less: 1.0} if isinstance(self.less, str) else self.less or {}

    def values(self, methods: dict[str, Any]) -> np.ndarray | None:
        """Return what should be above `above`, `(seeds,)`; None where it was not measured."""
        if not {self.method, *self.others} <= set(methods):
            return None
        values = np.asarray(methods[self.method][self.measure])
        for name, share in self.others.items():
            other = np.asarray(methods[name][self.measure])
            values = values[: len(other)] - share * other[: len(values)]
        return self.sign * values

    def verdict(self, methods: dict[str, Any], digits: int = 2) -> str:
        """Return whether it holds, with the numbers that say so."""
        values = self.values(methods)
        if values is None:
            return "not run"
        if not np.isfinite(values).all():
            return "no: a run diverged"
        mean, half = values.mean(), report.half_width(values)
        shown = f"{report.interval(self.sign * values, digits)}, {len(values)} seeds"
        if mean - half > self.above:
            return f"yes ({shown})"
        if mean + half < self.above:
            return f"no ({shown})"
        side = "in the mean only" if mean > self.above else "not in the mean"
        return f"open, {side} ({shown})"


@dataclasses.dataclass(frozen=True)
class Claim:
    """What one file of `claims/` says."""

    name: str
    script: str
    """The module whose `evidence(settings, method, keys)` measures a method in a case."""
    title: str
    source: str
    protocol: str
    methods: tuple[str, ...]
    measures: dict[str, str]
    """The columns of the table by the measure that is in them."""
    settings: dict[str, Any]
    cases: dict[str, dict[str, Any]]
    """By name, what differs from the settings. Two keys are none: `seeds`, how many runs, and
    `published`, by method, which is shown beside."""
    statements: tuple[Statement, ...]
    tiny: dict[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    """What differs from the settings where all is only to be seen to run."""
    seeds: int = 5
    published: str = "published"
    """What the published figures are."""
    digits: int = 2
    """After the point, in its tables."""
    curves: dict[str, str] = dataclasses.field(default_factory=dict[str, str])
    """Measures `(evaluations, seeds)` that the figure shows, and how it names them."""
    pairs: dict[str, str] = dataclasses.field(default_factory=dict[str, str])
    """Or two measures `(seeds, n)` that it shows against each other; the last of n stands out."""

    def settings_of(self, case: str, tiny: bool = False) -> dict[str, Any]:
        """Return all settings of a case, which are what a result belongs to."""
        own = {k: v for k, v in self.cases[case].items() if k not in ("published", "seeds")}
        return self.settings | own | (self.tiny if tiny else {})

    def seeds_of(self, case: str) -> int:
        """Return how many runs a cell of the case has."""
        return self.cases[case].get("seeds", self.seeds)


def load(name: str, folder: Path = FOLDER) -> Claim:
    """Return a claim.

    Raises:
      ValueError: if the file has a key that there is not, lacks one, or a statement names a measure
        or a method that the claim does not have.
    """
    path = folder / f"{name}.toml"
    table = tomllib.loads(path.read_text(encoding="utf-8"))
    try:
        told = [
            s | {"cases": tuple(s["cases"])} if "cases" in s else s for s in table["statements"]
        ]
        statements = tuple(Statement(**statement) for statement in told)
        table |= {"methods": tuple(table["methods"]), "statements": statements}
        claim = Claim(name, **table)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None
    for statement in claim.statements:
        for method in (statement.method, *statement.others):
            if method not in claim.methods:
                raise ValueError(f"{path}: {method!r} is none of the methods {claim.methods}")
        if unknown := set(statement.cases or ()) - set(claim.cases):
            raise ValueError(f"{path}: {sorted(unknown)[0]!r} is none of the cases")
    return claim


def names(folder: Path = FOLDER) -> list[str]:
    """Return the names of all claims."""
    return sorted(path.stem for path in folder.glob("*.toml"))


def result(claim: Claim, case: str, results: Path, tiny: bool = False) -> dict[str, Any]:
    """Return what was measured in a case, by method; nothing that has other settings."""
    path = results / f"{claim.name}.{case}.json"
    if not path.exists():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    return found["methods"] if found["settings"] == claim.settings_of(case, tiny) else {}


def results(claim: Claim, folder: Path) -> dict[str, dict[str, Any]]:
    """Return what was measured, by case and method."""
    return {case: result(claim, case, folder) for case in claim.cases}


def keep(
    claim: Claim, case: str, results: Path, methods: dict[str, Any], versions: Any, tiny: bool
) -> None:
    """Write what was measured in a case, whole or not at all."""
    results.mkdir(parents=True, exist_ok=True)
    path = results / f"{claim.name}.{case}.json"
    settings = claim.settings_of(case, tiny)
    made = {"settings": settings, "versions": versions, "methods": methods}
    part = path.with_suffix(".part")
    part.write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(path)


def rounded(values: Any) -> Any:
    """Return arrays as lists of numbers with few digits."""
    return [float(f"{x:.{DIGITS}g}") if np.ndim(x) == 0 else rounded(x) for x in np.asarray(values)]
