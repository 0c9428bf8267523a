"""One case on one model: peers must agree, are timed in turns, then as whole processes."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from pathlib import Path
from typing import Any

import environments
import numpy as np
from agreement import DisagreementError, check
from contenders import CASES, OURS, PEERS
from processes import EndedError, Turns, Whole, command, whole


def measure(
    folder: Path, inputs: Path, model: str, case: str, rounds: int, wholes: int, steps: int
) -> dict[str, dict[str, Any]]:
    """Return what was measured of each peer: a row of the page's table.

    A peer that fails or disagrees is not timed: its row says why, as "failed", and the others go
    on. Where ours fails there is nothing to hold them against, so all fail.

    Args:
      folder: of the environments.
      inputs: the file that all read.
      model: its name.
      case: its name.
      rounds: turns of each peer.
      wholes: whole processes of each peer; 0 for none, and no "whole" and "mebibytes" in a row.
      steps: that a whole process takes.
    """
    rows: dict[str, dict[str, Any]] = {name: {} for name in CASES[case].peers}
    lines: dict[str, list[str]] = {}
    for name, row in rows.items():
        with _noting(row):
            lines[name] = command(folder, PEERS[name], model, case, inputs)
    given = {name: environments.variables(PEERS[name].environment) for name in lines}
    running = {name: Turns(line, given[name]) for name, line in lines.items()}
    try:
        _check(running, rows, model, case)
        ready = {
            name: turns for name, turns in running.items() if rows[name].keys() == {"distance"}
        }
        times = _in_turns(ready, rows, rounds)
    finally:
        for turns in running.values():
            turns.end()
    for name, taken in times.items():
        rows[name]["ms"] = _quartiles(1000 * taken)
        rows[name]["ratio"] = _quartiles(taken / times[OURS])
    for row in rows.values():
        if "ms" not in row:
            row.setdefault("failed", f"{OURS} failed, which it is held against")
    ends: dict[str, list[Whole]] = {name: [] for name in times}
    for _ in range(wholes):
        for name in times:
            with _noting(rows[name]):
                ends[name].append(whole(lines[name], steps, given[name]))
    for name, of in ends.items():
        if wholes and len(of) == wholes:
            rows[name]["whole"] = float(np.median([end.seconds for end in of]))
            rows[name]["mebibytes"] = float(np.median([end.mebibytes for end in of]))
    return rows


@contextlib.contextmanager
def _noting(row: dict[str, Any]) -> Generator[None]:
    """Write into a row why its peer failed, in place of raising it."""
    try:
        yield
    except (EndedError, environments.UnavailableError) as error:
        row["failed"] = str(error)
    except DisagreementError as error:
        row["failed"] = str(error)
        if np.isfinite(error.distance):
            row["distance"] = error.distance


def _check(
    running: dict[str, Turns], rows: dict[str, dict[str, Any]], model: str, case: str
) -> None:
    """Write into each row how far its hypergradient is from ours, or why it failed."""
    first: dict[str, Any] = {}
    for name, turns in running.items():
        with _noting(rows[name]):
            first[name] = turns.answer()
    for name, answer in first.items():
        if OURS in first:
            with _noting(rows[name]):
                rows[name]["distance"] = check(name, model, case, answer, first[OURS])


def _in_turns(
    running: dict[str, Turns], rows: dict[str, dict[str, Any]], rounds: int, seconds: float = 0.3
) -> dict[str, np.ndarray]:
    """Return the seconds of CPU of a step, for each peer that does not fail, and round.

    A turn is about `seconds` long; whoever began a round begins the next one last.
    """
    counts: dict[str, int] = {}
    for name, turns in running.items():
        with _noting(rows[name]):
            turns.take(10)  # warm
            counts[name] = max(1, min(64, int(seconds / turns.take(5))))
    times: dict[str, list[float]] = {name: [] for name in counts}
    order = list(counts)
    for _ in range(rounds):
        for name in order:
            with _noting(rows[name]):
                times[name].append(running[name].take(counts[name]))
        order = [*order[1:], *order[:1]]
    if len(times.get(OURS, ())) < rounds:
        return {}
    return {name: np.array(taken) for name, taken in times.items() if len(taken) == rounds}


def _quartiles(values: np.ndarray) -> list[float]:
    return [float(value) for value in np.percentile(values, [25, 50, 75])]
