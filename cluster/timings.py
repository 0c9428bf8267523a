"""Where the seconds of a start go, by name."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator


class Timings:
    """Adds up seconds: `with timings("compiling"): ...`, and then `timings.seconds`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, what: str) -> Generator[None]:
        """Count what is done inside."""
        started = time.perf_counter()
        try:
            yield
        finally:
            taken = time.perf_counter() - started
            self.seconds[what] = self.seconds.get(what, 0.0) + taken
