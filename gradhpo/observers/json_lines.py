"""A file of JSON lines: what the run is, and a line for each row."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from gradhpo.observers.events import Begun, Progress
from gradhpo.observers.lines import append, check_beginning, ends, trim
from gradhpo.observers.tracker import OtherRunError, Tracker


class JSONLines(Tracker):
    """Writes a line of JSON for each row that `CSV` has; goes on with the file when the run does.

    What is no finite number is `null`.

    Args:
      path: the file: none, or one that this tracker wrote.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__()
        self.path = Path(path)

    def __str__(self) -> str:
        return f"JSONLines({str(self.path)!r})"

    def open(self, begun: Begun) -> int:
        """Read how far it is; the last number is written again, as it may be cut short."""
        self.path.parent.mkdir(parents=True, exist_ok=True)

        def number_of(line: bytes) -> int:
            row = json.loads(line)
            if not isinstance(row, dict) or begun.axis not in row:
                raise OtherRunError(
                    f"{self} must have a {begun.axis!r} in every line, has {line!r}"
                )
            return int(row[begun.axis])  # pyright: ignore[reportUnknownArgumentType]

        check_beginning(self, self.path, json.dumps({begun.axis: 0})[:-2])
        found = ends(self.path, number_of, self.most)
        self.check_own(begun, found.last)
        return trim(self.path, found)

    def write(self, event: Progress, after: int) -> None:
        """Append the lines, in one write."""
        rows = ({name: _plain(x) for name, x in row.items()} for row in event.rows(after))
        text = "".join(json.dumps(row) + "\n" for row in rows)
        append(self.path, text.encode())

    def close(self) -> None:
        """Nothing stays open."""


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
