"""How a population's slots are laid out on the devices, and which layout is fastest here."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gradhpo.parallel.compiled import Compiled
from gradhpo.parallel.mesh import axis_size
from gradhpo.state import PyTree

Batching: TypeAlias = "str | int"
"""`"vmap"`, `"map"`, a chunk size, and each after `"shard/"`; `"shard"` is `"shard/vmap"`."""

ACCEPTED = '"auto", "vmap", "map", a chunk size, "shard", or "shard/" before one of these'
CHUNKS = (4, 16, 64)
"""The chunk sizes that "auto" tries."""
MODELLED = ("cpu",)
"""Platforms on which a model of the step chooses, and nothing is measured."""
AT_HAND = 2**23
"""Bytes of the slots that a CPU best computes at once.

With less, it is the many small operations that take the time, with more the memory: see
benchmarks/population.md.
"""
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

    def at_once(self, own: int) -> int:
        """Return how many of a device's own slots it computes at once, if there are as many."""
        return own if self.within == "vmap" else 1 if self.within == "map" else int(self.within)

    def over_slots(self, one: Callable[..., Any], slots: int) -> Callable[..., Any]:
        """Return a function of stacked arguments that calls `one` for each slot."""
        chunk = self.at_once(slots)
        if chunk >= slots and self.within != "map":
            return jax.vmap(one)
        if self.within == "map":
            return lambda *stacked: jax.lax.map(lambda slot: one(*slot), stacked)
        return lambda *stacked: jax.lax.map(lambda slot: one(*slot), stacked, batch_size=chunk)

    def advance_slots(self, one: Callable[..., Any], slots: int) -> Callable[..., Any]:
        """Return a function of a stacked state and more that calls `one` for each slot.

        `one(state, *more) -> (state, rows)`. The new states take the places of the old ones, slot
        by slot: a `map` would hold both populations, old and new.
        """
        chunk = min(self.at_once(slots), slots)
        if chunk == slots:
            return self.over_slots(one, slots)
        many = one if self.within == "map" else jax.vmap(one)

        def advance(start: Any, carry: Any, more: Any, size: int) -> Any:
            """Advance the slots from `start`; one slot goes without its axis."""
            state, rows = carry
            alone = self.within == "map"
            new, row = many(*_part((state, *more), start, size, alone))
            return _with_part(state, new, start, alone), _with_part(rows, row, start, alone)

        def whole(state: PyTree, *more: PyTree) -> tuple[PyTree, PyTree]:
            # Not by `vmap`, which some operations of a user's have no rule for.
            shapes = jax.eval_shape(self.over_slots(one, slots), state, *more)[1]
            carry = state, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            carry = jax.lax.fori_loop(
                0, slots // chunk, lambda i, carry: advance(i * chunk, carry, more, chunk), carry
            )
            done = slots // chunk * chunk
            return carry if done == slots else advance(done, carry, more, slots - done)

        return whole


def _part(tree: PyTree, start: Any, size: int, alone: bool) -> PyTree:
    def part(x: jax.Array) -> jax.Array:
        taken = jax.lax.dynamic_slice_in_dim(x, start, size)
        return taken[0] if alone else taken

    return jax.tree.map(part, tree)


def _with_part(tree: PyTree, new: PyTree, start: Any, alone: bool) -> PyTree:
    def update(x: jax.Array, y: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(x, y[None] if alone else y, start, 0)

    return jax.tree.map(update, tree, new)


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


def likeliest(found: list[Layout], slots: int, slot_bytes: float) -> Layout:
    """Return the layout that is likely to be the fastest on a CPU, by a model of the step.

    Args:
      found: layouts, those that need more memory last.
      slots: of all shards.
      slot_bytes: that a step of one slot works on; see `working_set`.
    """

    def distance(layout: Layout) -> float:
        return abs(math.log(slot_bytes * layout.at_once(slots // layout.shards) / AT_HAND))

    return min(found, key=distance)


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
