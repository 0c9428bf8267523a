"""A progress bar, where tqdm is installed and somebody is looking."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

from gradhpo.notebook import has_widgets, in_notebook


def watched() -> bool:
    """Whether stderr is a terminal, or a notebook, which shows what is drawn there."""
    return sys.stderr.isatty() or in_notebook()


class Bar:
    """A context that draws a tqdm bar, or does nothing.

    `show` True needs tqdm, False never draws, None draws where tqdm is installed and somebody is
    looking, see `watched`.

    Raises:
      ImportError: if `show` is True and tqdm is missing.
    """

    def __init__(self, show: bool | None, total: int, unit: str, done: int = 0) -> None:
        installed = importlib.util.find_spec("tqdm") is not None
        if show and not installed:
            raise ImportError("progress=True needs tqdm: pip install tqdm, or pass progress=None")
        self._bar: Any = None
        if show or (show is None and installed and watched()):
            if in_notebook() and has_widgets():
                from tqdm.notebook import tqdm
            else:
                from tqdm.std import tqdm

            self._bar = tqdm(total=total, initial=done, unit=unit, smoothing=0.1)

    @property
    def drawn(self) -> bool:
        """Whether there is a bar."""
        return self._bar is not None

    def advance(self, steps: int, **shown: float) -> None:
        """Move the bar on, and show these numbers beside it."""
        if self._bar is not None:
            self._bar.update(steps)
            self._bar.set_postfix({name: _short(value) for name, value in shown.items()})

    def write(self, text: str) -> None:
        """Print a line to stderr, above the bar where there is one."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.close()


def _short(value: float) -> str:
    return f"{value:,.0f}" if 1e4 <= value < 1e7 else f"{value:.4g}"
