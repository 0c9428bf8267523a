"""One case on one model: peers must agree, are timed in turns, then as whole processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import agreement
import environments
import numpy as np
from contenders import CASES, OURS, PEERS
from processes import Turns, Whole, command, whole


def measure(
    folder: Path, inputs: Path, model: str, case: str, rounds: int, wholes: int, steps: int
) -> dict[str, dict[str, Any]]:
    """Return what was measured of each peer: a row of the page's table.

    Args:
      folder: of the environments.
      inputs: the file that all read.
      model: its name.
      case: its name.
      rounds: turns of each peer.
      wholes: whole processes of each peer.
      steps: that a whole process takes.
    """
    lines = {name: command(folder, PEERS[name], model, case, inputs) for name in CASES[case].peers}
    given = {name: environments.variables(PEERS[name].environment) for name in lines}
    running = {name: Turns(line, given[name]) for name, line in lines.items()}
    first = {name: turns.answer() for name, turns in running.items()}
    far = {
        name: agreement.check(name, model, case, answer, first[OURS])
        for name, answer in first.items()
    }
    times = _in_turns(running, rounds)
    for turns in running.values():
        turns.end()
    ends: dict[str, list[Whole]] = {name: [] for name in lines}
    for _ in range(wholes):
        for name, line in lines.items():
            ends[name].append(whole(line, steps, given[name]))
    return {
        name: {
            "distance": far[name],
            "ms": _quartiles(1000 * times[name]),
            "ratio": _quartiles(times[name] / times[OURS]),
            "whole": float(np.median([end.seconds for end in ends[name]])),
            "mebibytes": float(np.median([end.mebibytes for end in ends[name]])),
        }
        for name in lines
    }


def _in_turns(
    running: dict[str, Turns], rounds: int, seconds: float = 0.3
) -> dict[str, np.ndarray]:
    """Return the seconds of a step, for each peer and round.

    A turn is about `seconds` long; whoever began a round begins the next one last.
    """
    counts: dict[str, int] = {}
    for name, turns in running.items():
        turns.take(10)  # warm
        counts[name] = max(1, min(64, int(seconds / turns.take(5))))
    times: dict[str, list[float]] = {name: [] for name in running}
    order = list(running)
    for _ in range(rounds):
        for name in order:
            times[name].append(running[name].take(counts[name]))
        order = [*order[1:], order[0]]
    return {name: np.array(taken) for name, taken in times.items()}


def _quartiles(values: np.ndarray) -> list[float]:
    return [float(value) for value in np.percentile(values, [25, 50, 75])]
