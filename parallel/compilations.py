"""What XLA compiled in this process, and what JAX's persistent cache gave, by JAX's own events."""

from __future__ import annotations

import collections
import functools
import threading
from typing import Any, NamedTuple

import jax.monitoring

ASKED = "/jax/core/compile/backend_compile_duration"
"""For each program that is compiled, or restored from the persistent cache in its place."""
RESTORED = "/jax/compilation_cache/cache_hits"


class Made(NamedTuple):
    """Programs, since `watch` was first called."""

    compiled: int
    """By XLA."""
    restored: int
    """From JAX's persistent compilation cache."""

    def since(self, before: Made) -> Made:
        """Return what was made after another count."""
        return Made(self.compiled - before.compiled, self.restored - before.restored)


_EVENTS: collections.Counter[tuple[str, int]] = collections.Counter()
"""By event and the thread that it happened in, which is the one that asked for the program."""
_LOCK = threading.Lock()


@functools.cache
def watch() -> None:
    """Count from now on; one pair of listeners a process, since JAX keeps them."""

    def listen(event: str, *seconds: float, **kwargs: Any) -> None:
        del seconds, kwargs
        if event in (ASKED, RESTORED):
            with _LOCK:
                _EVENTS[event, threading.get_ident()] += 1

    jax.monitoring.register_event_listener(listen)
    jax.monitoring.register_event_duration_secs_listener(listen)


def of_this_thread() -> Made:
    """Return what this thread asked for."""
    asked, restored = (_EVENTS[event, threading.get_ident()] for event in (ASKED, RESTORED))
    return Made(asked - restored, restored)


def of_this_process() -> Made:
    """Return what all threads asked for."""
    with _LOCK:
        events = list(_EVENTS.items())
    asked, restored = (sum(n for (e, _), n in events if e == event) for event in (ASKED, RESTORED))
    return Made(asked - restored, restored)


class CompileCounter:
    """A context that counts the programs asked for while it is open, by all threads.

    `with CompileCounter() as compiled: ...`, and then `compiled.count`: what XLA compiled, or JAX's
    persistent cache gave in its place.
    """

    def __enter__(self) -> CompileCounter:
        """Begin to count."""
        watch()
        self._before: Made = of_this_process()
        self._after: Made | None = None
        return self

    def __exit__(self, *exc: object) -> None:
        """End."""
        self._after = of_this_process()

    @property
    def count(self) -> int:
        """How many there were, or are up to now."""
        return sum((self._after or of_this_process()).since(self._before))
