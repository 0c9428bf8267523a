"""The segments of a run: steps whose batches are drawn on the device, or read ahead on the host."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import jax
import numpy as np

from gradhpo.host import Places, Saved, Seed, Source, Stream
from gradhpo.state import PyTree
from gradhpo.timetable import Timetable

CHUNK_STEPS = 512
"""Steps in a chunk, at most, with device data."""
HOST_CHUNK_STEPS = 64
"""Batches in a stack of host data, at most."""
HOST_CHUNK_BYTES = 2**26
"""Bytes of a stack of host data, at most, unless one batch has more."""
PAUSE_SECONDS = 1.0
"""How long to read on when nobody computes: a program that ends waits for its reader."""
READ_SECONDS = 0.02, 0.3
"""How long a stack may take to read: the first, for which the device waits, and any later one."""


@dataclasses.dataclass(frozen=True)
class Segment:
    """Steps `start … end - 1`, or, with `calibrate`, a calibration before step `start`."""

    start: int
    end: int
    capacity: int
    """Steps that fit in a chunk."""
    calibrate: bool = False
    host: PyTree = None
    """A stack of host batch pairs, with `capacity` rows, the first for step `start`; after an axis
    of lanes, where they have streams of their own."""
    apart: bool = False
    """Whether `host` has that axis."""
    due: Any = None
    """For each lane whether it calibrates."""
    before: Places = dataclasses.field(default_factory=Places)
    """Where the streams stood before it (of steps: before a calibration that comes first)."""
    after: Places = dataclasses.field(default_factory=Places)


def device_feed(first: int, steps: int) -> Iterator[Segment]:
    """Yield the steps of a run whose data is drawn on the device: one segment."""
    if first < steps:
        yield Segment(first, steps, CHUNK_STEPS)


@dataclasses.dataclass(frozen=True)
class Lanes:
    """The runs or slots that go on together, and the stream that each of them reads."""

    streams: list[Stream]
    seeds: list[Seed]
    """Of each stream."""
    of: list[int] | None
    """For each lane its stream; None: all have the one, and a stack has no axis of lanes."""
    ages: np.ndarray
    """The step that each lane takes next."""
    running: np.ndarray
    """Which lanes need data."""

    @property
    def apart(self) -> bool:
        """Whether stacks have an axis of lanes."""
        return self.of is not None

    def due(self, timetable: Timetable, done: int) -> np.ndarray:
        """Return which lanes calibrate after `done` steps from here."""
        return self.running & np.array([timetable.calibrates_at(int(a) + done) for a in self.ages])

    def until(self, timetable: Timetable, done: int, steps: int) -> int:
        """Return after how many steps from here the next calibration comes, at most `steps`."""
        following = [timetable.next_calibration(int(a) + done) for a in self.ages[self.running]]
        offsets = zip(following, self.ages[self.running], strict=True)
        return min([steps, *(int(step - age) for step, age in offsets if step is not None)])

    def first_ages(self) -> list[int]:
        """Return the next step of a lane that reads each stream."""
        if self.of is None:
            return [int(self.ages[np.flatnonzero(self.running)[0]])]
        lanes = [i for i in range(len(self.of)) if self.running[i]]
        return [
            int(self.ages[next(i for i in lanes if self.of[i] == n)])
            for n in range(len(self.streams))
        ]

    def read_by(self, lanes: np.ndarray) -> list[int]:
        """Return the streams that these lanes read."""
        if self.of is None:
            return [0]
        return sorted({self.of[lane] for lane in np.flatnonzero(lanes)})

    def open(self) -> dict[tuple[Seed, int], Stream]:
        """Return the streams by what they give next."""
        streams = zip(self.seeds, self.streams, strict=True)
        return {(seed, stream.position or 0): stream for seed, stream in streams}

    def places(self) -> Places:
        """Return where the streams stand."""
        return [(seed, s.save()) for seed, s in zip(self.seeds, self.streams, strict=True)]


class HostFeed:
    """Reads the pairs of runs or slots ahead, and stacks them on the device, in a thread.

    Which pair a lane gets at a step is decided by its seed and the number of its step alone.

    Args:
      source: of the pairs.
      timetable: which pairs calibrations take.
      axis: whether stacks have a leading axis of lanes where lanes have streams of their own.
      put: places a stack without that axis, and one with it.
    """

    def __init__(
        self,
        source: Source,
        timetable: Timetable,
        *,
        axis: bool,
        put: tuple[Callable[[Any], Any], Callable[[Any], Any]] = (jax.device_put, jax.device_put),
    ) -> None:
        self.source, self._timetable, self._axis, self._put = source, timetable, axis, put
        self._open: dict[tuple[Seed, int], Stream] = {}
        self._known: dict[Seed, list[Saved]] = {}
        self._pair_seconds, self._patience = np.inf, READ_SECONDS[0]
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="gradhpo-feed")
        self._reading: Future[Any] = Future()
        self._asked, self._filling = threading.Event(), Future[None]()
        self._filling.set_result(None)

    def know(self, places: Places) -> None:
        """Take the short ways that `places` of another feed gave."""
        for seed, saved in places:
            self._known.setdefault(seed, []).append(saved)

    @property
    def places(self) -> Places:
        """Where the streams stood after the last segments."""
        return [(seed, saved[-1]) for seed, saved in self._known.items() if saved[-1]]

    def example(self, lanes: int | None) -> PyTree:
        """Return a full stack like those of `lanes`, on the device: one pair, repeated."""
        stack = _repeated(self.source.form.pair, lanes, self.capacity(lanes))
        return self._place(stack, lanes is not None)

    def example_calibration(self, lanes: int | None) -> PyTree:
        """Return such a stack for a calibration."""
        stack = _repeated(self.source.form.pair, lanes, self._timetable.T)
        return self._place(stack, lanes is not None)

    def capacity(self, lanes: int | None) -> int:
        """Return how many pairs a stack holds; `lanes` is its leading axis, None for none."""
        size = max(1, self.source.form.nbytes * (lanes or 1))
        return max(1, min(HOST_CHUNK_STEPS, HOST_CHUNK_BYTES // size))

    def segments(
        self,
        seeds: np.ndarray,
        ages: np.ndarray,
        running: np.ndarray,
        steps: int,
        first: int = 0,
        *,
        beyond: bool = False,
    ) -> Iterator[Segment]:
        """Yield the segments of so many steps; fewer if the data ends.

        The next segment is read, stacked and sent while the present one computes, and as many pairs
        as fit in another stack are read after it.

        Args:
          seeds: of each lane, `(lanes, numbers)`.
          ages: the step that each lane takes next, `(lanes,)`.
          running: which lanes need data, `(lanes,)`.
          steps: to take.
          first: the number that the first of them has in a `Segment`.
          beyond: whether to read on for later steps too, meanwhile and afterwards; never done in an
            iterator, which stands after the pairs that were used.
        """
        beyond = beyond and not self.source.once
        self._settle()
        self._patience = READ_SECONDS[0]
        lanes = self._lanes(seeds, ages, running)
        ends = [self._timetable.pairs_before(int(age) + steps) for age in lanes.first_ages()]
        reading = self._read(lanes, steps, first, taper=not beyond)
        self._reading = self._reader.submit(next, reading, None)
        try:
            while (segment := self._reading.result()) is not None:
                self._reading = self._reader.submit(next, reading, None)
                self._start_filling(lanes.streams, [None] * len(ends) if beyond else ends)
                yield segment
                self._asked.set()
        finally:
            self._asked.set()
            wait([self._reading, self._filling])
        self._keep(lanes)
        if beyond:
            self._start_filling(lanes.streams, [None] * len(ends), PAUSE_SECONDS)

    def _start_filling(
        self, streams: list[Stream], ends: Sequence[int | None], seconds: float = np.inf
    ) -> None:
        self._asked = threading.Event()
        self._filling = self._reader.submit(self._fill, streams, ends, self._asked, seconds)

    def _fill(
        self,
        streams: list[Stream],
        ends: Sequence[int | None],
        asked: threading.Event,
        seconds: float,
    ) -> None:
        """Read ahead pair by pair, until a segment is asked for, or a stack is full.

        What a reader raises comes out when the pair is needed.
        """
        wanted, began = max(stream.there for stream in streams), time.perf_counter()
        with contextlib.suppress(Exception):
            most = self.capacity(len(streams) if self._axis and self.source.own else None)
            while wanted < most and not asked.is_set() and time.perf_counter() - began < seconds:
                wanted += 1
                for stream, end in zip(streams, ends, strict=True):
                    left = wanted if end is None else end - (stream.position or 0)
                    stream.ahead(min(wanted, left))

    def calibration(self, seeds: np.ndarray, ages: np.ndarray, running: np.ndarray) -> Segment:
        """Return the segment of a calibration of all lanes now, whose pairs stay there."""
        self._settle()
        lanes, T = self._lanes(seeds, ages, running), self._timetable.T
        read, stack = self._stack(lanes, T, T, lanes.running, Stream.peek)
        self._open |= lanes.open()
        if read < T:
            raise ValueError(f"Problem.batches ended: {read} of the {T} pairs were left")
        host = self._place(stack, lanes.apart)
        return Segment(0, 0, T, True, host, lanes.apart, np.ones(len(running), bool))

    def first_pairs(self, seeds: np.ndarray, running: np.ndarray) -> PyTree:
        """Return the first pair of each lane, after an axis of lanes where stacks have one."""
        self._settle()
        axis = self._axis and self.source.own
        if not running.any():  # any numbers do
            return self._place(
                _repeated(self.source.form.pair, len(running) if axis else None), axis
            )
        lanes = self._lanes(seeds, np.zeros(len(running), int), running)
        host = self._stack(lanes, 1, 1, lanes.running, Stream.peek)[1]
        self._open |= lanes.open()
        return self._place(jax.tree.map(lambda x: x[:, 0] if axis else x[0], host), axis)

    def _settle(self) -> None:
        """Let the reader finish the pair that it is at."""
        self._asked.set()
        wait([self._filling])

    def _lanes(self, seeds: np.ndarray, ages: np.ndarray, running: np.ndarray) -> Lanes:
        running = running if running.any() else np.ones_like(running)
        own = self.source.own
        keys = [
            (tuple(seed.tolist()) if own else (), self._timetable.pairs_before(int(age)))
            for seed, age in zip(seeds, ages, strict=True)
        ]
        used = list(dict.fromkeys(key for key, runs in zip(keys, running, strict=True) if runs))
        streams = [self._at(*key) for key in used]
        apart = (self._axis and own) or len(used) > 1
        of = [used.index(key) if key in used else 0 for key in keys] if apart else None
        return Lanes(streams, [seed for seed, _ in used], of, ages, running)

    def _at(self, seed: Seed, position: int) -> Stream:
        if (stream := self._open.pop((seed, position), None)) is not None:
            return stream
        known = [saved for saved in self._known.get(seed, []) if saved.get("at", -1) <= position]
        best = max(known, key=lambda saved: saved.get("at", -1), default=None)
        return self.source.open(seed, position, best)

    def _keep(self, lanes: Lanes) -> None:
        """Let the streams stand there for whoever goes on, and remember the way to them."""
        before, self._known = self._known, {}
        for seed, saved in lanes.places():
            self._known.setdefault(seed, before.get(seed, [])[-1:]).append(saved)
        self._open = lanes.open()

    def _read(self, lanes: Lanes, steps: int, first: int, *, taper: bool) -> Iterator[Segment]:
        T, done, after = self._timetable.T, 0, lanes.places()
        while done < steps:
            due, before = lanes.due(self._timetable, done), after
            if due.any():
                read, stack = self._stack(lanes, T, T, due)
                if read < T:
                    return
                at, host = first + done, self._place(stack, lanes.apart)
                yield Segment(at, at, T, True, host, lanes.apart, due, before, before)
            stop = lanes.until(self._timetable, done, steps)
            while done < stop:
                left = stop - done
                wanted = self._rows(left if taper else None)
                wanted = max(wanted, min(stream.there for stream in lanes.streams))
                self._ahead(lanes.streams[:1], 1)  # to know a pair's size
                if not lanes.streams[0].there:
                    return
                capacity = self.capacity(None if lanes.of is None else len(lanes.of))
                wanted = min(wanted, capacity, left)
                self._ahead(lanes.streams, wanted)
                read, stack = self._stack(lanes, wanted, capacity, lanes.running)
                after = lanes.places()
                if read:
                    host = self._place(stack, lanes.apart)
                    at, end = first + done, first + done + read
                    yield Segment(at, end, capacity, False, host, lanes.apart, None, before, after)
                if read < wanted:
                    return
                done, before = done + read, after

    def _ahead(self, streams: list[Stream], wanted: int) -> None:
        """Read ahead in streams, and see how long a pair takes."""
        lacking, began = max(wanted - stream.there for stream in streams), time.perf_counter()
        for stream in streams:
            stream.ahead(wanted)
        if lacking > 0:  # what was there already says nothing of the reader
            self._pair_seconds = max(time.perf_counter() - began, 1e-6) / lacking

    def _rows(self, left: int | None) -> int:
        """Return how many pairs the next stack has, with `left` of them before the end.

        Nothing computes while the first stack is read, and nothing is read while the last one
        computes: from short ones they grow, and towards an end they halve, where reading is slow.
        """
        shortest, longest = READ_SECONDS
        rows, self._patience = self._patience / self._pair_seconds, min(2 * self._patience, longest)
        if left is not None:
            rows = min(rows, max(left / 2, shortest / self._pair_seconds))
        return max(1, min(HOST_CHUNK_STEPS, int(rows)))

    def _stack(
        self,
        lanes: Lanes,
        wanted: int,
        capacity: int,
        using: np.ndarray,
        take: Callable[[Stream, int], list[Any]] = Stream.take,
    ) -> tuple[int, PyTree]:
        """Return how many of the pairs wanted for some lanes there were, and their NumPy stack."""
        pairs = {index: take(lanes.streams[index], wanted) for index in lanes.read_by(using)}
        read = min(len(found) for found in pairs.values())
        if not read:
            return 0, None
        other = next(iter(pairs))  # for lanes without use: any numbers, and finite ones
        rows = [pairs.get(index, pairs[other])[:read] for index in lanes.of or [0]]

        def fill(like: np.ndarray, *leaves: np.ndarray) -> np.ndarray:
            stack = np.zeros((len(rows), capacity, *like.shape), like.dtype)
            for lane in range(len(rows)):
                np.stack(leaves[lane * read : (lane + 1) * read], out=stack[lane, :read])
            return stack if lanes.apart else stack[0]

        flat = [pair for found in rows for pair in found]
        return read, jax.tree.map(fill, self.source.form.pair, *flat)

    def _place(self, stack: PyTree, apart: bool) -> PyTree:
        return self.source.form.on_device(stack, self._put[apart])


def _repeated(pair: PyTree, *leading: int | None) -> PyTree:
    """Return a pair with more axes, those that are not None, in front."""
    axes = [n for n in leading if n is not None]
    return jax.tree.map(lambda x: np.broadcast_to(x, (*axes, *x.shape)), pair)
