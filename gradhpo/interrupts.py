"""Ctrl-C and SIGTERM as a wish: what is being done is finished first."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Generator
from typing import Any


@contextlib.contextmanager
def deferred(note: Callable[[str], None]) -> Generator[None]:
    """Call `note` with the name of the first SIGINT or SIGTERM; a second one ends at once.

    Handlers are installed in the main thread only, and those of before come back at the end; one
    that was not installed from Python cannot come back, and is left where it is.

    Raises:
      KeyboardInterrupt: at the second signal.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    noted: list[int] = []

    def handle(number: int, frame: Any) -> None:
        del frame
        if noted:
            raise KeyboardInterrupt
        noted.append(number)
        note(signal.Signals(number).name)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    ours = {number: handler for number, handler in before.items() if handler is not None}
    try:
        for number in ours:
            signal.signal(number, handle)
        yield
    finally:
        for number, handler in ours.items():
            signal.signal(number, handler)
