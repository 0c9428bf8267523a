"""Telling observers what happens, whatever they do with it."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Generator
from typing import Any, Protocol

from gradhpo.errors import warn_user
from gradhpo.observers.events import Begun, Event, ObserverFailed, Over, Progress
from gradhpo.observers.tracker import OtherRunError


class Observer(Protocol):
    """What wants to know: a display, a log, a tracker of experiments."""

    def observe(self, event: Event, /) -> Any:
        """Take an event, in the driver's process, before the next one happens.

        What it raises is told once, and the run goes on.
        """
        ...


class Telling:
    """Hands events to observers, one after another, and keeps all but what begins and gets on.

    A signal's event may come while another is told; it then waits for its turn.

    Args:
      kept: where events are kept.
    """

    def __init__(self, kept: list[Event]) -> None:
        self._observers: list[tuple[Observer, bool]] = []
        self.kept = kept
        self._waiting: list[Event] = []
        self._telling = False
        self._failed: set[int] = set()
        self.progress = 0
        """How often something was done."""

    def to(self, *observers: Observer, strict: bool = False) -> None:
        """Tell these too, from now on; what a strict one raises ends the run.

        Raises:
          TypeError: for what is no observer.
        """
        for observer in observers:
            if not callable(getattr(observer, "observe", None)):
                have = "CSV(path) and the others of gradhpo.observers have one"
                raise TypeError(f"observers must have a method observe, got {observer!r}: {have}")
            self._observers.append((observer, strict))

    def tell(self, event: Event) -> None:
        """Tell all observers.

        Raises:
          OtherRunError: if an observer would mix two runs.
        """
        self._waiting.append(event)
        if self._telling:
            return
        self._telling = True
        try:
            while self._waiting:
                self._tell(self._waiting.pop(0))
        finally:
            self._telling = False

    def _tell(self, event: Event) -> None:
        if isinstance(event, Progress):
            self.progress += 1
        elif event.name not in ("begun", "over"):
            self.kept.append(event)
        for observer, strict in self._observers:
            try:
                observer.observe(event)
            except Exception as error:
                if strict or (isinstance(error, OtherRunError) and isinstance(event, Begun)):
                    raise
                self._fail(observer, error)

    def _fail(self, observer: Observer, error: Exception) -> None:
        if id(observer) not in self._failed:
            self._failed.add(id(observer))
            told = f"{type(error).__name__}: {error}"
            self._waiting.append(ObserverFailed(str(observer), told))


@contextlib.contextmanager
def ended(telling: Telling) -> Generator[None]:
    """Tell observers at the end that nothing more comes, an error included."""
    try:
        yield
    except BaseException as error:
        telling.tell(Over(f"{type(error).__name__}: {error}"))
        raise
    telling.tell(Over())


class Warns:
    """An observer that warns of others that fail, where nobody shows events."""

    def observe(self, event: Event) -> None:
        """Warn, whatever warnings are turned into."""
        if isinstance(event, ObserverFailed):
            with warnings.catch_warnings():
                warnings.simplefilter("always", RuntimeWarning)
                warn_user(event.line(), RuntimeWarning)
