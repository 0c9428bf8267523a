"""What every tracker does: write each number once, whatever was killed or failed meanwhile."""

from __future__ import annotations

import abc
import sys
from typing import ClassVar

from gradhpo.observers.events import Begun, Event, GoneBack, Over, Progress, Stopped

COMPLETE = "complete"
"""Why a run ended that came to its last number."""
ENDED = "ended"
"""Where trackers of experiments write down why."""


class OtherRunError(ValueError):
    """Where a tracker would write there is another run."""


class Tracker(abc.ABC):
    """An observer that keeps what is measured somewhere else, and knows how far it is there.

    What it missed, since it failed or its process was killed, it asks the run for; what it is told
    a second time, after a resume, it leaves out. What was given up, it opens anew without.
    """

    rewrites: ClassVar[bool] = True
    """Whether a number that was written can be written again."""

    def __init__(self) -> None:
        self._begun: Begun | None = None
        self._open = self._own = False
        self._done = 0
        self._why = ""
        """What ended the run before its last number."""
        self.most = sys.maxsize
        """The highest number that `open` may return: what is there after it was given up."""

    def observe(self, event: Event) -> None:
        """Take an event.

        Raises:
          OtherRunError: when a run begins, and another one is there.
        """
        if isinstance(event, Begun):
            self._leave()
            self._begun, self._own, self._why = event, False, ""
            self.most = sys.maxsize if event.again else event.done
            self._follow(event)
        elif isinstance(event, GoneBack) and self._begun is not None and self.rewrites:
            self._leave()
            self.most = event.done
            self._begin(self._begun)
        elif isinstance(event, Progress) and self._begun is not None:
            self.most = max(self.most, event.last)
            self._follow(self._begun, event)
        elif isinstance(event, Stopped):
            self._why = event.reason
        elif isinstance(event, Over):
            if self._open:
                self.ended(event.error or self._why or COMPLETE)
            self._leave()

    def _follow(self, begun: Begun, event: Progress | None = None) -> None:
        """Write what is not there yet; after an error look anew how far that is."""
        try:
            self._begin(begun)
            behind = event is None or event.first > self._done + 1
            for done in begun.past(self._done) if behind else (event,):
                self._write(done)
        except BaseException:
            self._leave()
            raise

    def _begin(self, begun: Begun) -> None:
        if not self._open:
            self._done = self.open(begun)
            self._open = self._own = True

    def _write(self, event: Progress | None) -> None:
        if event is not None and event.last > self._done:
            self.write(event, self._done)
            self._done = event.last

    def _leave(self) -> None:
        if self._open:
            self._open = False
            self.close()

    def check_own(self, begun: Begun, last: int) -> None:
        """Raise if what is there, up to a number, cannot be of this run.

        Raises:
          OtherRunError: if so.
        """
        if last and not (begun.done or begun.again or self._own):
            raise OtherRunError(
                f"{self} holds another run, up to {begun.axis} {last}: this one, which begins "
                "anew, needs a place of its own"
            )

    @abc.abstractmethod
    def open(self, begun: Begun) -> int:
        """Begin, or go on; return the last number that is whole there, 0 for none, `most` at most.

        Raises:
          OtherRunError: if another run is there.
        """

    @abc.abstractmethod
    def write(self, event: Progress, after: int) -> None:
        """Write what is done after a number."""

    def ended(self, why: str) -> None:
        """Write down why nothing more comes for now; trackers of tables have no place for it.

        Args:
          why: the reason of a `Stopped`, the error, or `COMPLETE`.
        """
        del why

    @abc.abstractmethod
    def close(self) -> None:
        """Let go of what `open` took."""
