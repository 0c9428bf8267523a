"""How a population's slots are laid out on the devices, and which layout is fastest here."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.sharding import Mesh

from gradhpo.parallel.compiled import Compiled
from gradhpo.parallel.mesh import axis_size

Batching: TypeAlias = "str | int"
"""`"vmap"`, `"map"`, a chunk size, and each after `"shard/"`; `"shard"` is `"shard/vmap"`."""

ACCEPTED = '"auto", "vmap", "map", a chunk size, "shard", or "shard/" before one of these'
CHUNKS = (4, 16, 64)
"""The chunk sizes that "auto" tries."""
ROUNDS = 8
ROUND_SECONDS = 0.03


@dataclasses.dataclass(frozen=True)
class Layout:
    """A layout, resolved: how many shards there are, and how a shard computes its slots."""

    within: str | int
    """ "vmap": all at once; "map": one after another; c: c at once."""
    shards: int = 1
    sharded: bool = False
    """Whether slots are divided over the mesh axis "trial"."""

    @property
    def name(self) -> Batching:
        """What a user passes as `batching` to get this layout."""
        return f"shard/{self.within}" if self.sharded else self.within

    def over_slots(self, one: Callable[..., Any], slots: int) -> Callable[..., Any]:
        """Return a function of stacked arguments that calls `one` for each slot."""
        chunk = slots if self.within == "vmap" else 1 if self.within == "map" else int(self.within)
        if chunk >= slots and self.within != "map":
            return jax.vmap(one)
        if self.within == "map":
            return lambda *stacked: jax.lax.map(lambda slot: one(*slot), stacked)
        return lambda *stacked: jax.lax.map(lambda slot: one(*slot), stacked, batch_size=chunk)


def parse(batching: Any, slots: int, mesh: Mesh | None) -> Layout | None:
    """Return the layout that `batching` names; None for "auto".

    Raises:
      ValueError: if it names none, or needs a mesh, or slots do not divide over its "trial" axis.
    """
    if batching == "auto":
        return None
    text = str(batching)
    sharded = text == "shard" or text.startswith("shard/")
    within: Any = "vmap" if text == "shard" else text.removeprefix("shard/")
    if isinstance(batching, bool) or within not in ("vmap", "map"):
        if isinstance(batching, bool) or not within.isdecimal() or int(within) < 1:
            raise ValueError(f"batching must be {ACCEPTED}, got {batching!r}")
        within = int(within)
    if not sharded:
        return Layout(within)
    if mesh is None:
        raise ValueError(f"batching={batching!r} needs a mesh: Population(mesh=make_mesh(trial=…))")
    return Layout(within, shards_of(slots, mesh), sharded=True)


def shards_of(slots: int, mesh: Mesh) -> int:
    """Return over how many devices the slots are divided.

    Raises:
      ValueError: if they do not divide.
    """
    shards = axis_size(mesh, "trial")
    if slots % shards:
        raise ValueError(f"slots must be a multiple of the mesh's {shards} trials, got {slots}")
    return shards


def candidates(slots: int, mesh: Mesh | None) -> list[Layout]:
    """Return the layouts that "auto" chooses from."""
    sharded = mesh is not None and mesh.shape.get("trial", 1) > 1
    shards = shards_of(slots, mesh) if sharded and mesh is not None else 1
    within: list[str | int] = ["map", *(c for c in CHUNKS if c < slots // shards), "vmap"]
    return [Layout(w, shards, sharded) for w in within]


def fastest(programs: dict[Layout, Compiled], *args: Any) -> Layout:
    """Return the layout whose program takes the least time, in paired rounds.

    The best time of a few rounds counts: noise on a machine only ever adds to it.
    """
    best = dict.fromkeys(programs, np.inf)
    calls: dict[Layout, int] = {}
    for layout, program in programs.items():
        jax.block_until_ready(program(*args))
        seconds = _seconds(program, args, 1)
        calls[layout] = max(1, int(ROUND_SECONDS / max(seconds, 1e-6)))
    for _ in range(ROUNDS):
        for layout, program in programs.items():
            best[layout] = min(best[layout], _seconds(program, args, calls[layout]))
    return min(best, key=lambda layout: best[layout])


def _seconds(program: Compiled, args: tuple[Any, ...], calls: int) -> float:
    started = time.perf_counter()
    for _ in range(calls):
        jax.block_until_ready(program(*args))
    return (time.perf_counter() - started) / calls
