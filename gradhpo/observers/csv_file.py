"""A CSV file: a row for each trial of each generation, or for each step."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from gradhpo.commit import commit
from gradhpo.observers.events import Begun, Progress
from gradhpo.observers.lines import append, check_beginning, ends, trim
from gradhpo.observers.tracker import Tracker


class CSV(Tracker):
    """Writes a CSV file, with a header; goes on with it when the run does.

    A sweep gives a row for each trial of each generation, `solve` one for each step (and run of a
    batch), with what `Problem.metrics` gave at evaluations in columns of its own.

    Args:
      path: the file: none, or one that this tracker wrote.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__()
        self.path = Path(path)
        self._columns: list[str] = []

    def __str__(self) -> str:
        return f"CSV({str(self.path)!r})"

    def open(self, begun: Begun) -> int:
        """Read how far it is; the last number is written again, as it may be cut short."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        check_beginning(self, self.path, f"{begun.axis},")
        self._columns = self._header()
        found = ends(self.path, _number, self.most, header=True)
        self.check_own(begun, found.last)
        return trim(self.path, found)

    def write(self, event: Progress, after: int) -> None:
        """Append the rows, in one write."""
        rows = list(event.rows(after))
        new = list(dict.fromkeys(name for row in rows for name in row))
        if missing := [name for name in new if name not in self._columns]:
            self._widen([*self._columns, *missing])
        append(self.path, _text(self._columns, rows))

    def close(self) -> None:
        """Nothing stays open."""

    def _header(self) -> list[str]:
        if not self.path.exists():
            return []
        with open(self.path, newline="") as file:
            line = file.readline()
        if not line.endswith("\n"):  # its writer was killed at once
            self.path.unlink()
            return []
        return next(csv.reader([line]))

    def _widen(self, columns: list[str]) -> None:
        """Write the file with more columns, whole or not at all."""
        rows: list[dict[str, str]] = []
        if self._columns:
            with open(self.path, newline="") as file:
                rows = list(csv.DictReader(file))

        def content(file: BinaryIO) -> None:
            file.write(_text(columns, [dict(zip(columns, columns, strict=True)), *rows]))

        commit(self.path, content)
        self._columns = columns


def _number(line: bytes) -> int:
    return int(line.split(b",", 1)[0])


def _text(columns: list[str], rows: Iterable[Mapping[str, Any]]) -> bytes:
    made = io.StringIO()
    writer = csv.writer(made, lineterminator="\n")
    writer.writerows([row.get(name, "") for name in columns] for row in rows)
    return made.getvalue().encode()
