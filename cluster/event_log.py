"""The storage's log of events, for `gradhpo status`; nothing is recovered from it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from typing import Any

from gradhpo.cluster.events import Begun, Event, Over, Progress
from gradhpo.cluster.storage import Storage
from gradhpo.files import Where


class EventLog:
    """An observer that adds a line of JSON for each event but those that the journal tells."""

    def __init__(self, storage: Where) -> None:
        self._storage = Storage(storage)

    def observe(self, event: Event) -> None:
        """Add its line; a disk that is full loses the line, and nothing else."""
        if isinstance(event, Begun | Over | Progress):
            return
        about = {"time": round(time.time(), 3), "event": event.name, **dataclasses.asdict(event)}
        self._storage.log(about)


def read(storage: Where) -> list[dict[str, Any]]:
    """Return the logged events, each a table with "time" and "event"; damaged lines left out."""
    try:
        lines = Storage(storage).events.read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return []
    return [facts for facts in map(decoded, lines) if facts is not None]


def decoded(line: str | bytes) -> dict[str, Any] | None:
    """Return the event of a line; None where its writer was killed."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        facts = json.loads(line)
        return {**facts, "time": float(facts["time"]), "event": str(facts["event"])}
    return None
