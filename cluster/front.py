"""What a sweep keeps of all that it has seen: its best trial, or the front of several objectives.

One rule for both, since the best is a front of one: a trial joins if none that is kept is at least
as good in every objective, and those that it dominates leave.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from gradhpo.checkpoints import Saved
from gradhpo.cluster.dominance import crowding, nondominated
from gradhpo.cluster.journal import Best, Entry, Member
from gradhpo.cluster.objectives import Objectives

MOST = 32
"""Trials of a front that are kept, the loneliest: each is a state on the disk."""


class Found(NamedTuple):
    """A trial as it was after a generation."""

    scores: tuple[float, ...]
    """By objective, all minimized."""
    trial: int
    slot: int
    generation: int
    checkpoint: Saved


def joined(
    before: Sequence[Found], scores: np.ndarray, trial: np.ndarray, generation: int
) -> tuple[Found, ...]:
    """Return what is kept after a generation; what is of this one without its checkpoint.

    Args:
      before: what was kept.
      scores: `(slots, objectives)`, all minimized; what is not finite has diverged.
      trial: `(slots,)`, the trials' numbers.
      generation: this one.
    """
    slots = np.flatnonzero(np.isfinite(scores).all(axis=1))
    earlier = np.array([found.scores for found in before]).reshape(-1, scores.shape[1])
    everything = np.concatenate([earlier, scores[slots]])
    kept: list[Found] = []
    for row in _loneliest(everything, nondominated(everything)).tolist():
        if row < len(before):
            kept.append(before[row])
            continue
        slot = int(slots[row - len(before)])
        numbers = tuple(map(float, scores[slot]))
        kept.append(Found(numbers, int(trial[slot]), slot, generation, Saved("", "")))
    return tuple(kept)


def _loneliest(scores: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return as many rows of a front as are kept: one at a time, the most crowded leaves."""
    while len(rows) > MOST:
        apart = crowding(scores[rows])
        rows = np.delete(rows, len(rows) - 1 - np.argmin(apart[::-1]))  # of equal ones the newest
    return rows


def found_in(entry: Entry | None) -> tuple[Found, ...]:
    """Return what a line of the journal says is kept."""
    if entry is None:
        return ()
    if "front" in entry:
        return tuple(_found(one, tuple(one["scores"])) for one in entry["front"])
    best = entry["best"]
    return () if best is None else (_found(best, (best["score"],)),)


def _found(kept: Best | Member, scores: tuple[float, ...]) -> Found:
    return Found(scores, kept["trial"], kept["slot"], kept["generation"], kept["checkpoint"])


def write(entry: Entry, found: Sequence[Found], several: bool) -> None:
    """Write it into a line, as `found_in` reads it."""
    if several:
        entry["front"] = [
            {
                "scores": list(one.scores),
                "trial": one.trial,
                "slot": one.slot,
                "generation": one.generation,
                "checkpoint": one.checkpoint,
            }
            for one in found
        ]
        return
    for one in found:
        entry["best"] = {
            "score": one.scores[0],
            "trial": one.trial,
            "slot": one.slot,
            "generation": one.generation,
            "checkpoint": one.checkpoint,
        }


def told(found: Sequence[Found], objectives: Objectives) -> dict[str, Any]:
    """Return what an event says of it: the best's metric, or the front's objectives."""
    shown = [objectives.shown(one.scores) for one in sorted(found)]
    if objectives.several:
        return {"best": None, "front": tuple(shown)}
    return {"best": next(iter(shown[0].values())) if shown else None}


def of_journal(last: Sequence[Entry]) -> tuple[Found, ...]:
    """Return what is kept after the last of some lines."""
    return found_in(last[-1] if last else None)


def changed(found: Sequence[Found]) -> int:
    """Return the last generation that brought something that is kept; -1 where nothing is."""
    return max((one.generation for one in found), default=-1)


def with_checkpoints(
    found: Sequence[Found], generation: int, checkpoints: Mapping[int, Saved]
) -> tuple[Found, ...]:
    """Return it with the files of a generation's slots."""
    return tuple(
        one._replace(checkpoint=checkpoints[one.slot]) if one.generation == generation else one
        for one in found
    )
