"""Why a sweep ends before its last generation: its `Stop`, a request, a signal.

It is decided between generations, and changes no number: a sweep that goes on computes what it
would have computed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from gradhpo.cluster.events import Note, Tell
from gradhpo.cluster.front import Found, changed
from gradhpo.cluster.objectives import Objectives
from gradhpo.cluster.storage import Storage
from gradhpo.watch import Stop


class Stopping:
    """Says after every generation whether there is a next one.

    Args:
      storage: where requests come from; what an earlier run was asked is forgotten.
      stop: the conditions; None for none.
      objectives: what trials are compared by.
      began: `time.monotonic()` of the run's beginning.
      tell: takes events.
    """

    def __init__(
        self,
        storage: Storage,
        stop: Stop | None,
        objectives: Objectives,
        began: float,
        tell: Tell,
    ) -> None:
        self._storage, self._stop, self._began, self._tell = storage, stop, began, tell
        self._objectives = objectives
        self.reason: str | None = None
        """Why it ends; once said, it stays."""
        self.expected = False
        """Whether that was a condition of `Stop`."""
        storage.forget_stop()

    def already(self, done: int, found: Sequence[Found]) -> bool:
        """Whether the sweep that is gone on with is at its end; seconds are each run's own."""
        self.reason = self._condition(done, found, elapsed=0)
        self.expected = self.reason is not None
        return self.expected

    def ask(self, done: int, found: Sequence[Found]) -> None:
        """See whether it ends after so many generations, of which this is kept."""
        if self.reason is None:
            self.reason = self._condition(done, found, time.monotonic() - self._began)
            self.expected = self.reason is not None
        if self.reason is None:
            self.reason = self._request()

    def signal(self, name: str) -> None:
        """End after the generation in flight, since a signal came."""
        self.reason = self.reason or name

    def forget(self) -> None:
        """Forget what was asked, now that it is done."""
        self._storage.forget_stop()

    def _condition(self, done: int, found: Sequence[Found], elapsed: float) -> str | None:
        if self._stop is None or not done:
            return None
        since = done - (changed(found) + 1)
        if self._objectives.several:  # which have no target
            metric, sign, score, lacking = "", 1, None, "a trial for the front"
        else:
            metric, sign = next(iter(self._objectives.signs.items()))
            score = found[0].scores[0] * sign if found else None
            lacking = "a best so far"
        return self._stop.why(metric, sign > 0, score, since, "generations", elapsed, lacking)

    def _request(self) -> str | None:
        """Return who asks for the end; where that cannot be seen, say so, and go on."""
        try:
            return self._storage.stop_request()
        except OSError as error:
            self._tell(Note(f"whether somebody asks for the end cannot be seen: {error}"))
            return None
