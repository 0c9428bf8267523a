"""The segments of a run: steps whose batches are drawn on the device, or read ahead on the host."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradhpo.errors import check_same_tree
from gradhpo.state import PyTree
from gradhpo.timetable import Timetable

CHUNK_STEPS = 512
"""Steps in a chunk, at most, with device data."""
HOST_CHUNK_STEPS = 64
"""Batches in a stack of host data, at most."""
HOST_CHUNK_BYTES = 2**26
"""Bytes of a stack of host data, at most, unless one batch has more."""


@dataclasses.dataclass(frozen=True)
class Segment:
    """Steps `start … end - 1`, or, with `calibrate`, a calibration before step `start`."""

    start: int
    end: int
    capacity: int
    """Steps that fit in a chunk."""
    calibrate: bool = False
    host: PyTree = None
    """A stack of host batch pairs, with `capacity` rows, the first for step `start`."""


def device_feed(first: int, steps: int) -> Iterator[Segment]:
    """Yield the steps of a run whose data is drawn on the device: one segment."""
    if first < steps:
        yield Segment(first, steps, CHUNK_STEPS)


def host_feed(
    timetable: Timetable, first: int, steps: int, pairs: Iterator[Any]
) -> Iterator[Segment]:
    """Yield the segments of a run with host data, stacked on the device; fewer if it ends early.

    Batches are read in the order of use and no further than needed. The next segment is read,
    stacked and sent while the present one computes.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="gradhpo-feed") as reader:
        segments = _read_segments(timetable, first, steps, pairs)
        upcoming = reader.submit(next, segments, None)
        while (segment := upcoming.result()) is not None:
            upcoming = reader.submit(next, segments, None)
            yield segment


def host_pairs(batches: Any, seed: list[int], timetable: Timetable, first: int) -> Iterator[Any]:
    """Return the iterator of batch pairs at the first step that the run still takes."""
    source: Any = batches(np.random.default_rng(seed)) if callable(batches) else batches
    pairs: Iterator[Any] = iter(source)
    if pairs is batches:
        return pairs  # stands where the last run left it
    calibrations = sum(timetable.calibrates_at(step) for step in range(first))
    return itertools.islice(pairs, first + timetable.T * calibrations, None)


def _read_segments(
    timetable: Timetable, first: int, steps: int, pairs: Iterator[Any]
) -> Iterator[Segment]:
    reader, step = _Reader(pairs), first
    while step < steps:
        if timetable.calibrates_at(step):
            read, host = reader.stack(timetable.T, capacity=timetable.T)
            if read < timetable.T:
                return
            yield Segment(step, step, timetable.T, calibrate=True, host=host)
        stop = min(steps, timetable.next_calibration(step) or steps)
        while step < stop:
            capacity = reader.capacity()
            wanted = min(capacity, stop - step)
            read, host = reader.stack(wanted, capacity)
            if read:
                yield Segment(step, step + read, capacity, host=host)
            if read < wanted:
                return
            step += read


class _Reader:
    """Reads batch pairs, checks that they are of one shape, and stacks them."""

    def __init__(self, pairs: Iterator[Any]) -> None:
        self._pairs = pairs
        self._first: Any = None
        self._kinds: Any = None
        """For each leaf of a pair the kind of PRNG key that it is, "" for none."""
        self._count = 0
        self._peeked: list[Any] = []

    def capacity(self) -> int:
        """Return how many pairs a stack holds, from the size of the first pair."""
        if self._first is None:
            self._peeked = self._read(1)
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(self._first))
        return max(1, min(HOST_CHUNK_STEPS, HOST_CHUNK_BYTES // max(1, size)))

    def stack(self, wanted: int, capacity: int) -> tuple[int, PyTree]:
        """Return how many of the wanted pairs there were, and their stack on the device."""
        pairs = self._peeked + self._read(wanted - len(self._peeked))
        self._peeked = []
        if not pairs:
            return 0, None

        def fill(*leaves: np.ndarray) -> np.ndarray:
            stack = np.zeros((capacity, *leaves[0].shape), leaves[0].dtype)
            np.stack(leaves, out=stack[: len(leaves)])
            return stack

        return len(pairs), jax.tree.map(_on_device, jax.tree.map(fill, *pairs), self._kinds)

    def _read(self, wanted: int) -> list[Any]:
        pairs: list[Any] = []
        for given in itertools.islice(self._pairs, wanted):
            if not isinstance(given, tuple | list) or len(given) != 2:
                accepted = "must give (train_batch, val_batch) pairs"
                got = f"{type(given).__name__} at index {self._count}"
                raise TypeError(f"Problem.batches {accepted}, got {got}")
            pair = jax.tree.map(_on_host, tuple(given))
            if self._first is None:
                self._first, self._kinds = pair, jax.tree.map(_kind_of_key, tuple(given))
            try:
                check_same_tree(f"Problem.batches: pair {self._count}", pair, "pair 0", self._first)
            except ValueError as error:
                error.add_note(
                    "a loader's last batch may be smaller: drop it (drop_last, drop_remainder)"
                )
                raise
            self._count += 1
            pairs.append(pair)
        return pairs


def _kind_of_key(leaf: Any) -> str:
    """Return the implementation of a typed PRNG key, "" for anything else."""
    typed = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return str(jax.random.key_impl(leaf)) if typed else ""


def _on_host(leaf: Any) -> np.ndarray:
    """Return a copy, since its owner may use the buffer again; of a typed key, its numbers."""
    return np.array(jax.random.key_data(leaf) if _kind_of_key(leaf) else leaf)


def _on_device(stack: np.ndarray, kind_of_key: str) -> jax.Array:
    array = jax.device_put(stack)
    return jax.random.wrap_key_data(array, impl=kind_of_key) if kind_of_key else array
