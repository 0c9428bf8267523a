"""What a person sees while a sweep runs: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import importlib.util
import sys
import time
from typing import Any

import numpy as np

from gradhpo.cluster.journal import Entry
from gradhpo.progress import Bar

SECONDS_BETWEEN_LINES = 5.0


class Display:
    """Shows generations as they are done.

    Args:
      show: None for what fits the output: a bar on a terminal (with tqdm installed), a line every
        few seconds elsewhere; True for the same with tqdm required; False for nothing.
      generations: of the whole sweep.
      done: of them, before this run.
      steps: trial-steps in a generation.
      metric: its name in the table.
      sign: 1 if it is minimized, -1 if maximized.
    """

    def __init__(
        self,
        show: bool | None,
        generations: int,
        done: int,
        steps: int,
        metric: str,
        sign: int,
    ) -> None:
        self._silent = show is False
        drawn = sys.stderr.isatty() and (show or importlib.util.find_spec("tqdm") is not None)
        self._lines = not self._silent and not drawn
        self._total, self._steps, self._metric, self._sign = generations, steps, metric, sign
        self._first, self._done = done, done
        self._since = self._printed = time.monotonic()
        self._show = False if self._lines or self._silent else show
        self._bar = Bar(False, generations, "generation")

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.__exit__(*exc)

    def begin(self) -> None:
        """Draw the bar, and count time from now: what came before was starting up."""
        self._since = self._printed = time.monotonic()
        self._bar = Bar(self._show, self._total, "generation", self._first)

    def generation(self, entry: Entry, columns: dict[str, np.ndarray]) -> None:
        """Show a generation that is done."""
        if self._silent:
            return
        self._done = entry["generation"] + 1
        scores = columns[self._metric]
        finite = scores[np.isfinite(scores)]
        best = float("nan") if not len(finite) else self._sign * float(np.min(self._sign * finite))
        shown = {
            "best": best,
            "median": float(np.median(finite)) if len(finite) else float("nan"),
            "diverged": float(len(scores) - len(finite)),
            "trial-steps/s": self._rate(),
        }
        self._bar.advance(1, **shown)
        now = time.monotonic()
        if not self._lines:
            return
        last = self._done >= self._total
        if last or self._done == self._first + 1 or now - self._printed > SECONDS_BETWEEN_LINES:
            self._printed = now
            left = (self._total - self._done) * (now - self._since) / (self._done - self._first)
            self.say(
                f"generation {self._done}/{self._total}: {self._metric} best {best:.4g}, median "
                f"{shown['median']:.4g}, {shown['diverged']:.0f} diverged, "
                f"{self._rate():,.0f} trial-steps/s, {_clock(left)} left"
            )

    def say(self, text: str) -> None:
        """Print a line, above the bar where there is one."""
        if not self._silent:
            self._bar.write(text)

    def _rate(self) -> float:
        taken = (self._done - self._first) * self._steps
        return taken / max(1e-9, time.monotonic() - self._since)


def describe(event: str, facts: dict[str, Any]) -> str | None:
    """Return an event as a line for a person; None for what needs no line."""
    if event == "worker lost":
        who = ", ".join(facts["process"]) or "a worker"
        return f"{who} {facts['reason']}: its shards go on elsewhere"
    if event == "damaged":
        return (
            f"damaged: {facts['what']}. Generation {facts['generation'] + 1} is computed again "
            "from the one before"
        )
    if event in ("journal damaged", "note"):
        return str(facts["what"])
    return None


def _clock(seconds: float) -> str:
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{left:02}" if hours else f"{minutes}:{left:02}"
