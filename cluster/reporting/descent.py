"""The tree of descent: whose weights trials go on from, as branches to be drawn."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from gradhpo.cluster.schedulers import NEW

MOST_LEAVES = 400
"""So many are drawn with those that nobody goes on from; where there are more, without."""


@dataclasses.dataclass
class Branch:
    """Generations in a row with one trial, or one that alone goes on from it."""

    first: int
    last: int
    slot: int
    """Of its last generation."""
    trial: int
    parent: int
    """The branch that it came from; -1 for a new trial."""
    place: float = 0.0
    """Where it is drawn: leaves are at 0, 1, 2, …"""


class Tree(NamedTuple):
    """The branches, parents before their children."""

    branches: list[Branch]
    whole: bool
    """Whether those are among them that nobody of the last generation comes from."""
    of: list[np.ndarray]
    """By generation, the number of each slot's branch; -1 where it is not drawn."""

    def on(self, lived: Sequence[tuple[int, int]]) -> list[int]:
        """Return the branches that a life is on, see `life`."""
        found = [int(self.of[generation][slot]) for generation, slot in lived]
        return [branch for branch in dict.fromkeys(found) if branch >= 0]

    def described(self) -> dict[str, Any]:
        """Return it as JSON has it, a list for each field of the branches."""
        fields = [field.name for field in dataclasses.fields(Branch)]
        lists = {name: [getattr(one, name) for one in self.branches] for name in fields}
        return {**lists, "whole": self.whole}


def tree(
    trials: Sequence[np.ndarray], parents: Sequence[np.ndarray], most: int = MOST_LEAVES
) -> Tree:
    """Return the tree of descent.

    Args:
      trials: the number of each slot's trial, generation by generation.
      parents: the slot that each came from.
      most: leaves of a tree with all that ever ran.
    """
    ended = sum(_ends(now, after) for now, after in zip(trials, parents[1:], strict=False))
    whole = ended + (len(trials[-1]) if trials else 0) <= most
    found, of = _grown(trials, parents, _needed(parents, whole))
    _place(found)
    return Tree(found, whole, of)


def life(parents: Sequence[np.ndarray], slot: int, generation: int) -> list[tuple[int, int]]:
    """Return `(generation, slot)` of a trial and those that it came from, the first one first."""
    found: list[tuple[int, int]] = []
    for at in range(generation, -1, -1):
        found.append((at, slot))
        slot = int(parents[at][slot])
        if slot == NEW:
            break
    return found[::-1]


def _ends(now: np.ndarray, after: np.ndarray) -> int:
    """Return how many trials nobody goes on from."""
    return len(now) - len(np.unique(after[after != NEW]))


def _needed(parents: Sequence[np.ndarray], whole: bool) -> list[np.ndarray]:
    """Return which slots of each generation are drawn."""
    needed = [np.ones(len(row), bool) for row in parents]
    if whole:
        return needed
    for at in range(len(parents) - 1, 0, -1):
        sources = parents[at][needed[at]]
        needed[at - 1] = np.isin(np.arange(len(parents[at])), sources[sources != NEW])
    return needed


def _grown(
    trials: Sequence[np.ndarray], parents: Sequence[np.ndarray], needed: Sequence[np.ndarray]
) -> tuple[list[Branch], list[np.ndarray]]:
    """Return the branches of the slots that are drawn, and by generation which one a slot is on."""
    of: list[np.ndarray] = []
    first: list[int] = []
    parent: list[int] = []
    for at, row in enumerate(parents):
        slots = np.flatnonzero(needed[at])
        sources = row[slots] if at else np.full(len(slots), NEW)
        before = np.append(of[-1], -1) if at else np.full(1, -1)  # of NEW, the last one
        children = np.bincount(sources[sources != NEW], minlength=len(row))
        alone = (sources != NEW) & (children[sources] == 1)
        now = np.full(len(row), -1)
        now[slots[alone]] = before[sources[alone]]
        now[slots[~alone]] = len(first) + np.arange((~alone).sum())
        first += [at] * int((~alone).sum())
        parent += before[sources[~alone]].tolist()
        of.append(now)
    last, slot, trial = (np.zeros(len(first), int) for _ in range(3))
    for at, (now, numbers) in enumerate(zip(of, trials, strict=True)):
        slots = np.flatnonzero(now >= 0)
        last[now[slots]], slot[now[slots]], trial[now[slots]] = at, slots, numbers[slots]
    fields = zip(first, last.tolist(), slot.tolist(), trial.tolist(), parent, strict=True)
    return [Branch(*one) for one in fields], of


def _place(found: Sequence[Branch]) -> None:
    """Put leaves one below the other, with those of a branch together, and it in their middle."""
    children: list[list[int]] = [[] for _ in found]
    for number, one in enumerate(found):
        if one.parent >= 0:
            children[one.parent].append(number)
    roots = [number for number, one in enumerate(found) if one.parent < 0]
    left, place = roots[::-1], 0
    while left:
        number = left.pop()
        if not children[number]:
            found[number].place, place = float(place), place + 1
        left += children[number][::-1]
    for number in range(len(found) - 1, -1, -1):
        if children[number]:
            places = [found[child].place for child in children[number]]
            found[number].place = (min(places) + max(places)) / 2
