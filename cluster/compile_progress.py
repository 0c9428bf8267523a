"""What is said while the programs of several combinations of choices compile."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from gradhpo.cluster import events
from gradhpo.cluster.events import Tell

STILL_EVERY = 30.0
"""Seconds after which it is said again what compiles."""


class CompileProgress:
    """Says what compiles, where several combinations of choices do."""

    def __init__(
        self, combinations: Sequence[Mapping[str, Any]], needed: Sequence[int], tell: Tell
    ) -> None:
        self._combinations, self._needed, self._tell = combinations, needed, tell
        self._since: dict[int, float] = {}
        self._said = time.monotonic()

    def begin(self, variant: int) -> None:
        """Say that one is begun, once."""
        if len(self._needed) > 1 and variant not in self._since:
            self._since[variant] = time.monotonic()
            self._tell(self._about(variant))

    def end(self, variant: int) -> events.Compiling | None:
        """Return what was said of one, with the seconds that it took."""
        since = self._since.pop(variant, None)
        return None if since is None else self._about(variant, time.monotonic() - since)

    def still(self) -> None:
        """Say from time to time what is not done yet."""
        now = time.monotonic()
        if now - self._said >= STILL_EVERY:
            self._said = now
            for variant, since in self._since.items():
                self._tell(self._about(variant, now - since))

    def _about(self, variant: int, seconds: float = 0) -> events.Compiling:
        where = (self._needed.index(variant) + 1, len(self._needed))
        return events.Compiling(variant, self._combinations[variant], *where, seconds)
