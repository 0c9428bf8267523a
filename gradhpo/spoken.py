"""What a long calculation says of itself while it works, where nobody sees a bar."""

from __future__ import annotations

import threading
import time as clock

from gradhpo.progress import Bar

EVERY = 15.0
"""Seconds between two lines that say that it still goes on."""


class Spoken:
    """A context that says what is done, and every few seconds what is being done.

    Args:
      bar: says what is being done instead, where it is drawn.
      silent: whether to say nothing at all.
      every: seconds between two signs of life.
    """

    def __init__(self, bar: Bar, silent: bool = False, every: float = EVERY) -> None:
        self._bar, self._silent, self._every = bar, silent, every
        self._doing, self._since = "begun", clock.perf_counter()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._signs_of_life, daemon=True)

    def doing(self, what: str) -> None:
        """Set what is said to be done from now on."""
        self._doing, self._since = what, clock.perf_counter()

    def say(self, text: str) -> None:
        """Write a line to stderr."""
        if not self._silent:
            self._bar.write(text)

    def _signs_of_life(self) -> None:
        while not self._over.wait(self._every):
            self.say(f"{self._doing}, for {clock.perf_counter() - self._since:.0f} s by now")

    def __enter__(self) -> Spoken:
        if not self._silent and not self._bar.drawn:
            self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()
