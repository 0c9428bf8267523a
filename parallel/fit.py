"""How many slots fit on a device: what `Population(slots="fit")` asks."""

from __future__ import annotations

import os
from collections.abc import Callable

import jax
from jax.sharding import Mesh

MOST_SLOTS = 2**20
"""On one device, that "fit" tries."""


def memory_limit(mesh: Mesh | None) -> int:
    """Return 90% of a device's memory, in bytes; for a CPU device, of its share of the host's."""
    devices = jax.devices()[:1] if mesh is None else list(mesh.devices.ravel())
    stats = devices[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return int(0.9 * (stats["bytes_limit"] - stats.get("bytes_in_use", 0)))
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(0.9 * free / len(devices))


def largest(needs: Callable[[int], int], mesh: Mesh | None, limit: int) -> int:
    """Return the most slots whose program needs no more than `limit` bytes on a device.

    Bytes grow nearly linearly with slots; each guess comes from a line through what was measured,
    and is measured itself.
    """
    unit = 1 if mesh is None else mesh.shape.get("trial", 1)
    low, low_bytes = unit, needs(unit)
    if low_bytes > limit:
        raise ValueError(
            f'slots="fit": one slot on each device needs {low_bytes:,} bytes, and {limit:,} are '
            "there; give more memory=, or a smaller problem"
        )
    high, high_bytes = 2 * unit, needs(2 * unit)
    while high_bytes <= limit:  # outgrow the limit, by the line but at least doubling
        low, low_bytes = high, high_bytes
        high *= 2
        high_bytes = needs(high)
        if high >= MOST_SLOTS * unit:
            return low
    for _ in range(30):
        gap = max(unit, low // 50 // unit * unit)  # as close as it needs to be, about 2%
        if high - low <= gap:
            break
        slope = (high_bytes - low_bytes) / (high - low)
        guess = low + int((limit - low_bytes) / max(slope, 1e-9))
        guess = guess // unit * unit
        guess = min(max(guess, low + unit), high - unit)
        measured = needs(guess)
        if measured <= limit:
            low, low_bytes = guess, measured
            guess = min(low + max(unit, low // 50 // unit * unit), high - unit)
            if guess > low and needs(guess) > limit:
                return low
        else:
            high, high_bytes = guess, measured
    return low
