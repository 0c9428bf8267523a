"""Why a sweep ends before its last generation: its `Stop`, a request, a signal.

It is decided between generations, and changes no number: a sweep that goes on computes what it
would have computed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

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
    """

    def __init__(
        self, storage: Storage, stop: Stop | None, objectives: Objectives, began: float
    ) -> None:
        self._storage, self._stop, self._began = storage, stop, began
        self._objectives = objectives
        self.reason: str | None = None
        """Why it ends; once said, it stays."""
        self.expected = False
        """Whether that was a condition of `Stop`."""
        storage.forget_stop()

    def already(self, done: int, found: Sequence[Found]) -> bool:
        """Whether the sweep that is gone on with is at its end; seconds are each run's own."""
        self.reason = self._condition(done, found)
        self.expected = self.reason is not None
        return self.expected

    def ask(self, done: int, found: Sequence[Found]) -> None:
        """See whether it ends after so many generations, of which this is kept."""
        if self.reason is None:
            self.reason = self._condition(done, found) or self._late()
            self.expected = self.reason is not None
        if self.reason is None:
            self.reason = self._storage.stop_request()

    def signal(self, name: str) -> None:
        """End after the generation in flight, since a signal came."""
        self.reason = self.reason or name

    def forget(self) -> None:
        """Forget what was asked, now that it is done."""
        self._storage.forget_stop()

    def _condition(self, done: int, found: Sequence[Found]) -> str | None:
        stop = self._stop
        if stop is None or not done:
            return None
        if stop.target is not None and found:
            metric, sign = self._objectives.only("a target is of one", "Take patience")
            (score,) = found[0].scores
            if score <= stop.target * sign:
                value = f"{metric} is {score * sign:.6g}"
                return f"the target is reached: {value}, target={stop.target:g}"
        since = done - (changed(found) + 1)
        if stop.patience is not None and since >= stop.patience:
            what = "a trial for the front" if self._objectives.several else "a best so far"
            return f"{since} generations without {what}, patience={stop.patience}"
        return None

    def _late(self) -> str | None:
        seconds = None if self._stop is None else self._stop.seconds
        if seconds is None or time.monotonic() - self._began < seconds:
            return None
        return f"seconds={seconds:g} are over"
