"""What a person sees while a sweep runs: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import importlib.util
import time

import numpy as np

from gradhpo.cluster.events import Event, GenerationDone, Resumed, Running, Starting
from gradhpo.cluster.objectives import Objectives
from gradhpo.cluster.printable import printable
from gradhpo.progress import Bar, watched

SECONDS_BETWEEN_LINES = 5.0


class Display:
    """An observer that shows events, and generations as they are done.

    Args:
      show: None for what fits the output: a bar on a terminal or in a notebook (with tqdm
        installed), a line every few seconds elsewhere; True for the same with tqdm required; False
        for nothing.
      where: the storage, as the first lines name it.
      generations: of the whole sweep.
      steps: trial-steps in a generation.
      objectives: what trials are compared by.
    """

    def __init__(
        self,
        show: bool | None,
        where: str,
        generations: int,
        steps: int,
        objectives: Objectives,
    ) -> None:
        self._silent = show is False
        drawn = watched() and (show or importlib.util.find_spec("tqdm") is not None)
        self._lines = not self._silent and not drawn
        self._where, self._total, self._steps, self._objectives = (
            where,
            generations,
            steps,
            objectives,
        )
        self._computed = 0
        self._since = self._printed = time.monotonic()
        self._show = False if self._lines or self._silent else show
        self._bar = Bar(False, generations, "gen")

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.__exit__(*exc)

    def observe(self, event: Event) -> None:
        """Show an event."""
        if self._silent:
            return
        if isinstance(event, GenerationDone):
            self._generation(event)
        elif isinstance(event, Running):
            self._begin(event.generation)
        elif (line := event.line()) is not None:
            named = isinstance(event, Resumed | Starting)
            self._bar.write(printable(f"{self._where}: {line}" if named else line, lines=True))

    def _begin(self, done: int) -> None:
        """Draw the bar, and count time from now: what came before was starting up."""
        self._computed = 0
        self._since = self._printed = time.monotonic()
        self._bar = Bar(self._show, self._total, "gen", done)

    def _generation(self, event: GenerationDone) -> None:
        self._computed += 1
        scores = self._objectives.scores(event.table)
        finite = np.asarray(np.isfinite(scores).all(axis=1))
        best = self._best(event)
        numbers = {name: float("nan") if x is None else x for name, x in best.items()}
        if not self._objectives.several:
            sign = next(iter(self._objectives.signs.values()))
            good = scores[finite, 0] * sign
            numbers["median"] = float(np.median(good)) if len(good) else float("nan")
        diverged = float(len(finite) - finite.sum())
        gone = {"diverged": diverged} if diverged else {}
        self._bar.advance(1, **numbers, **gone, **{"steps/s": self._rate()})
        now = time.monotonic()
        if not self._lines:
            return
        edge = event.generation >= self._total or self._computed == 1
        if edge or now - self._printed > SECONDS_BETWEEN_LINES:
            self._printed = now
            left = (self._total - event.generation) * (now - self._since) / self._computed
            self._bar.write(
                f"generation {event.generation}/{self._total}: {self._text(numbers)}, "
                f"{diverged:.0f} diverged, {self._rate():,.0f} trial-steps/s, {_clock(left)} left"
            )

    def _best(self, event: GenerationDone) -> dict[str, float | None]:
        """Return the best so far: of the metric, or of each objective, and how many are kept."""
        if not self._objectives.several:
            return {"best": event.best}
        shown: dict[str, float | None] = {"front": float(len(event.front))}
        for name, sign in self._objectives.signs.items():
            column = [scores[name] for scores in event.front]
            shown[name] = (min(column) if sign > 0 else max(column)) if column else None
        return shown

    def _text(self, numbers: dict[str, float]) -> str:
        if not self._objectives.several:
            metric = printable(self._objectives.names[0])
            return f"{metric} best {numbers['best']:.4g}, median {numbers['median']:.4g}"
        reached = [f"{printable(n)} {numbers[n]:.4g}" for n in self._objectives.names]
        return f"a front of {numbers['front']:.0f}, reaching {', '.join(reached)}"

    def _rate(self) -> float:
        return self._computed * self._steps / max(1e-9, time.monotonic() - self._since)


def _clock(seconds: float) -> str:
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{left:02}" if hours else f"{minutes}:{left:02}"
