"""Why a sweep ends before its last generation: its `Stop`, a request, a signal.

It is decided between generations, and changes no number: a sweep that goes on computes what it
would have computed.
"""

from __future__ import annotations

import math
import time

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
    """

    def __init__(
        self, storage: Storage, stop: Stop | None, metric: str, sign: int, began: float
    ) -> None:
        self._storage, self._stop, self._began = storage, stop, began
        self._metric, self._sign = metric, sign
        self.reason: str | None = None
        """Why it ends; once said, it stays."""
        self.expected = False
        """Whether that was a condition of `Stop`."""
        storage.forget_stop()

    def already(self, done: int, best: Best | None) -> bool:
        """Whether the sweep that is gone on with is at its end; seconds are each run's own."""
        self.reason = self._condition(done, best)
        self.expected = self.reason is not None
        return self.expected

    def ask(self, done: int, best: Best | None) -> None:
        """See whether it ends after so many generations, with this best so far."""
        if self.reason is None:
            self.reason = self._condition(done, best) or self._late()
            self.expected = self.reason is not None
        if self.reason is None:
            self.reason = self._storage.stop_request()

    def signal(self, name: str) -> None:
        """End after the generation in flight, since a signal came."""
        self.reason = self.reason or name

    def forget(self) -> None:
        """Forget what was asked, now that it is done."""
        self._storage.forget_stop()

    def _condition(self, done: int, best: Best | None) -> str | None:
        stop, score = self._stop, math.inf if best is None else best["score"]
        if stop is None or not done:
            return None
        if stop.target is not None and score <= stop.target * self._sign:
            value = f"{self._metric} is {score * self._sign:.6g}"
            return f"the target is reached: {value}, target={stop.target:g}"
        since = done - (0 if best is None else best["generation"] + 1)
        if stop.patience is not None and since >= stop.patience:
            return f"{since} generations without a best so far, patience={stop.patience}"
        return None

    def _late(self) -> str | None:
        seconds = None if self._stop is None else self._stop.seconds
        if seconds is None or time.monotonic() - self._began < seconds:
            return None
        return f"seconds={seconds:g} are over"
