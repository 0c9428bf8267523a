"""What a sweep cost, by its journal and its log: compiles, faults that it survived, seconds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

COUNTED = ("compiles", "loads", "restores", "small_compiles", "calibration_compiles")
FAULTS = {
    "worker lost": "workers lost",
    "damaged": "files damaged",
    "repaired": "files repaired",
    "gone back": "gone back",
    "observer failed": "observers that failed",
}
"""Events that are counted as faults, and what they are called."""
SHOWN = 60
"""Of the last events."""
SILENT = ("prepared", "compiling", "running")
"""Events that are not listed: they are counted."""


class Costs:
    """Adds up what a log says, event by event."""

    def __init__(self) -> None:
        self._counts, self._faults = Counter[str](), Counter[str]()
        self._parts: dict[str, float] = {}
        self._starting: float | None = None
        self._startup, self._starts = 0.0, 0
        self._last: list[dict[str, Any]] = []

    def add(self, events: Iterable[Mapping[str, Any]]) -> None:
        """Take events of a log, in their order."""
        for facts in events:
            self._add(facts)
        self._last = self._last[-SHOWN:]

    def described(self, seconds: Sequence[float]) -> dict[str, Any]:
        """Return it as JSON has it; beside it the seconds of the generations that are done."""
        return {
            "compiles": {name: self._counts[name] for name in COUNTED},
            "faults": dict(self._faults),
            "starts": self._starts,
            "seconds": {
                "generations": float(sum(seconds)),
                "starting": self._startup,
                "of starting": dict(self._parts),
            },
            "events": self._last,
        }

    def _add(self, facts: Mapping[str, Any]) -> None:
        event, when = facts["event"], facts["time"]
        if event == "starting":
            self._starting, self._starts = when, self._starts + 1
        elif event == "running" and self._starting is not None:
            self._startup += max(0.0, when - self._starting)
            self._starting = None
        elif event == "prepared":
            self._prepared(facts)
        if event in FAULTS:
            self._faults[FAULTS[event]] += 1
        if event not in SILENT:
            said = {n: x for n, x in facts.items() if n not in ("time", "event") and x is not None}
            text = ", ".join(f"{name}={value}" for name, value in said.items())
            self._last.append({"time": when, "event": event, "text": text[:500]})

    def _prepared(self, facts: Mapping[str, Any]) -> None:
        for name in COUNTED:
            if isinstance(number := facts.get(name), int):
                self._counts[name] += number
        for part in facts.get("seconds") or ():
            match part:
                case [str() as name, float() | int() as seconds] if not facts.get("loads"):
                    self._parts[name] = self._parts.get(name, 0.0) + seconds
                case _:
                    pass
