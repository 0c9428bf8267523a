"""Why a sweep ends before its last generation: its `Stop`, a request, a signal.

It is decided between generations, and changes no number: a sweep that goes on computes what it
would have computed.
"""

from __future__ import annotations

import time

from gradhpo.cluster.events import Note, Tell
from gradhpo.cluster.journal import Best
from gradhpo.cluster.storage import Storage
from gradhpo.watch import Stop


class Stopping:
    """Says after every generation whether there is a next one.

    Args:
      storage: where requests come from; what an earlier run was asked is forgotten.
      stop: the conditions; None for none.
      metric: its name.
      sign: 1 if the metric is minimized, -1 if maximized.
      began: `time.monotonic()` of the run's beginning.
      tell: takes events.
    """

    def __init__(
        self,
        storage: Storage,
        stop: Stop | None,
        metric: str,
        sign: int,
        began: float,
        tell: Tell,
    ) -> None:
        self._storage, self._stop, self._began, self._tell = storage, stop, began, tell
        self._metric, self._sign = metric, sign
        self.reason: str | None = None
        """Why it ends; once said, it stays."""
        self.expected = False
        """Whether that was a condition of `Stop`."""
        storage.forget_stop()

    def already(self, done: int, best: Best | None) -> bool:
        """Whether the sweep that is gone on with is at its end; seconds are each run's own."""
        self.reason = self._condition(done, best, elapsed=0)
        self.expected = self.reason is not None
        return self.expected

    def ask(self, done: int, best: Best | None) -> None:
        """See whether it ends after so many generations, with this best so far."""
        if self.reason is None:
            self.reason = self._condition(done, best, time.monotonic() - self._began)
            self.expected = self.reason is not None
        if self.reason is None:
            self.reason = self._request()

    def signal(self, name: str) -> None:
        """End after the generation in flight, since a signal came."""
        self.reason = self.reason or name

    def forget(self) -> None:
        """Forget what was asked, now that it is done."""
        self._storage.forget_stop()

    def _condition(self, done: int, best: Best | None, elapsed: float) -> str | None:
        if self._stop is None or not done:
            return None
        score = None if best is None else best["score"] * self._sign
        since = done - (0 if best is None else best["generation"] + 1)
        about = (self._metric, self._sign > 0, score, since, "generations", elapsed)
        return self._stop.why(*about)

    def _request(self) -> str | None:
        """Return who asks for the end; where that cannot be seen, say so, and go on."""
        try:
            return self._storage.stop_request()
        except OSError as error:
            self._tell(Note(f"whether somebody asks for the end cannot be seen: {error}"))
            return None
