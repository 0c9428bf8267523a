"""`Diagnosis`: what `diagnose` found, as a table, a figure and a plain recommendation."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from pathlib import Path
from typing import Any

import numpy as np

import gradhpo
from gradhpo import notebook
from gradhpo.in_code import in_code
from gradhpo.regime import Regime

__all__ = ["Diagnosis", "Row"]

ALIGNED = 0.9
"""The mean cosine from which a method's direction counts as that of the exact hypergradient."""
NEGLIGIBLE = 0.05
"""The second-order share below which the direct term alone is enough."""
COLUMNS = ("method", "cosine", "norm ratio", "noise", "second-order", "time", "FLOPs")


@dataclasses.dataclass(frozen=True)
class Row:
    """What was measured of one method."""

    name: str
    cosine: np.ndarray
    """To the exact hypergradient, `(samples,)`; NaN where the estimate is zero."""
    norm_ratio: np.ndarray
    """Norm of the estimate over that of the exact hypergradient, `(samples,)`."""
    second_order: np.ndarray
    """`‖g - g_FO‖ / (‖g_FO‖ + ‖g - g_FO‖)`, `(samples,)`: 0 without a second-order term, 1 without
    a direct one."""
    time: np.ndarray
    """Of an inner step with the method, over one of training alone, `(rounds,)`."""
    flops: float
    """The same of FLOPs as XLA counts them; NaN without timing."""
    noise: float = float("nan")
    """The variance of the estimate over the samples, over its squared mean; NaN for one sample."""

    @property
    def aligned(self) -> bool:
        """Whether the mean cosine is at least `ALIGNED`."""
        return bool(np.mean(self.cosine) >= ALIGNED)

    @property
    def cost(self) -> float:
        """The median of `time`; NaN without timing."""
        return float(np.median(self.time)) if self.time.size else float("nan")

    def cells(self) -> list[str]:
        """Return the row of the table."""
        cosine = "no direction" if np.isnan(self.cosine).all() else _spread(self.cosine, 3)
        time = "-"
        if self.time.size:
            low, high = np.percentile(self.time, [25, 75])
            time = f"{self.cost:.1f}x [{low:.1f}, {high:.1f}]"
        ratio, share = _spread(self.norm_ratio, 2), f"{100 * np.mean(self.second_order):.0f}%"
        flops = "-" if np.isnan(self.flops) else f"{self.flops:.1f}x"
        noise = "-" if np.isnan(self.noise) else f"{self.noise:.2g}"
        return [self.name, cosine, ratio, noise, share, time, flops]


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """Methods compared with the exact hypergradient at one state; `print` shows the table."""

    rows: list[Row]
    """The methods asked for."""
    exact: Row
    """The exact hypergradient through the whole horizon."""
    horizon: int
    """T."""
    seconds: float
    """Of an inner step of training alone, without a hypergradient."""
    notes: tuple[str, ...] = ()
    """Methods that were left out, and why; and settings of others."""
    regime: Regime | None = None
    """Where the state stands: how rough, how noisy, and whether at a minimum."""

    def row(self, name: str) -> Row:
        """Return the row of this name.

        Raises:
          KeyError: if there is none; the message says which there are.
        """
        found = {row.name: row for row in (*self.rows, self.exact)}
        if name not in found:
            raise KeyError(f"no method {name!r}, there are {', '.join(found)}")
        return found[name]

    @property
    def recommended(self) -> Row:
        """The method recommended: see `recommendation`."""
        return self._choose()[0]

    @property
    def recommendation(self) -> str:
        """A method and the reason for it, in plain words.

        Where training is chaotic along the hypergradient before the horizon, and a step does not
        get what the hypergradient promises, the longest unroll that is not. Otherwise, of the
        methods with a mean cosine of at least 0.9 the cheapest (of those within 10% of its time,
        the most aligned); "first-order" already where the exact gradient's second-order share is
        below 5%; and the exact method where no estimate is aligned. Without timing, the most
        aligned is taken.
        """
        row, reason = self._choose()
        ratio = float(np.mean(row.norm_ratio))
        advice = f"{row.name}: {reason}."
        if self._within_smooth() is not None:
            return advice  # the exact gradient is no measure there
        if not 0.5 <= ratio <= 2:
            advice += (
                f" Its norm is {ratio:.2g} times the exact one: move λ with an optimizer that "
                "does not mind the scale, such as Adam, or divide the rate by that."
            )
        return advice + self._horizon_advice()

    def _within_smooth(self) -> tuple[Row, str] | None:
        """Return the longest unroll that is not chaotic, where T steps are."""
        regime = self.regime
        if regime is None or regime.smooth_until >= self.horizon or regime.useful:
            return None
        steps, named = regime.smooth_until, {row.name: row for row in self.rows}
        short = [k for k in range(steps, 1, -1) if f"unrolled {k}" in named]
        name = f"unrolled {short[0]}" if short else "one-step"
        if name not in named:
            return None
        return named[name], f"training is chaotic along the hypergradient beyond {steps} steps"

    def _choose(self) -> tuple[Row, str]:
        if truncated := self._within_smooth():
            return truncated
        share = float(np.mean(self.exact.second_order))
        named = {row.name: row for row in self.rows}
        if share < NEGLIGIBLE and "first-order" in named:
            reason = f"the second-order term is {100 * share:.1f}% of the exact hypergradient"
            return named["first-order"], reason
        aligned = [row for row in self.rows if row.aligned]
        if not aligned:
            usable = [row for row in self.rows if not np.isnan(np.mean(row.cosine))]
            best = max(usable, key=lambda row: np.mean(row.cosine), default=None)
            nearest = ""
            if best is not None:
                nearest = f" (the nearest, {best.name}, has {np.mean(best.cosine):.2f})"
            reason = f"no estimate has a mean cosine of {ALIGNED}{nearest}; UnrolledOptimizer"
            steps = f"(unroll_steps={self.horizon}) is exact"
            return self.exact, reason + steps + _times(self.exact)
        if not np.isnan(self.exact.cost):
            least = min(row.cost for row in aligned)
            aligned = [row for row in aligned if row.cost <= 1.1 * least]
        chosen = max(aligned, key=lambda row: np.mean(row.cosine))
        reason = f"cosine {np.mean(chosen.cosine):.3f} to the exact hypergradient"
        return chosen, reason + _times(chosen) + f"; exact{_times(self.exact)}"

    def _horizon_advice(self) -> str:
        truncated = [row for row in self.rows if row.name.startswith("unrolled ")]
        if not truncated:
            return ""
        enough = next((row for row in truncated if row.aligned), None)
        if enough is None:
            return f" T: no fewer than all {self.horizon} steps are aligned."
        steps = enough.name.removeprefix("unrolled ")
        ratio = float(np.mean(enough.norm_ratio))
        shares = f"have the direction, and {ratio:.0%} of the norm"
        return f" T: the last {steps} of {self.horizon} steps {shares}."

    def _footer(self) -> list[str]:
        written = in_code(self.recommended.name, self.horizon)
        base = "" if np.isnan(self.seconds) else f", {1e3 * self.seconds:.3g} ms"
        return [
            f"Over {len(self.exact.cosine)} walks of T = {self.horizon} steps: mean and standard "
            f"deviation. Time and FLOPs: of an inner step, over training alone{base}; quartiles.",
            *self.notes,
            *self.advice(),
            f"Recommended: {self.recommendation}",
            *([f"In code: {written}."] if written else []),
        ]

    def advice(self) -> list[str]:
        """Return what was found of the state, and what follows, a line each."""
        if self.regime is None:
            return []
        implicit = any(row.name.startswith("implicit") for row in self.rows)
        known = [name for name in ("PESOptimizer",) if hasattr(gradhpo, name)]
        return self.regime.advice(implicit, known)

    def __str__(self) -> str:
        cells = [list(COLUMNS), *(row.cells() for row in (*self.rows, self.exact))]
        widths = [max(len(line[i]) for line in cells) for i in range(len(COLUMNS))]
        lines = [
            "  ".join(
                text.rjust(width) if index else text.ljust(width)
                for index, (text, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in cells
        ]
        return "\n".join([*lines, *self._footer()])

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write it as `diagnosis.json` into a folder, of a sweep or a run: its report shows it.

        Args:
          folder: a path, made if it is not there, or the address of a store; one that was there
            is replaced.

        Raises:
          OSError: if it cannot be written.
        """
        from gradhpo import saved_diagnosis

        saved_diagnosis.write(folder, self)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Diagnosis:
        """Return what `save` wrote.

        Raises:
          FileNotFoundError: if there is none.
          ValueError: if it is damaged.
        """
        from gradhpo import saved_diagnosis

        return saved_diagnosis.read(folder)

    def _repr_html_(self) -> str:
        """Show the table in a notebook."""
        rows = [row.cells() for row in (*self.rows, self.exact)]
        bold = [row.name == self.recommended.name for row in (*self.rows, self.exact)]
        return notebook.table(COLUMNS, rows, bold=bold, below=self._footer())

    def show(self) -> None:
        """Print the table: with rich where it is installed, as plain text otherwise."""
        if importlib.util.find_spec("rich") is None:
            print(self)
            return
        from rich.console import Console
        from rich.table import Table

        table = Table()
        for index, column in enumerate(COLUMNS):
            table.add_column(column, justify="right" if index else "left", no_wrap=True)
        for row in (*self.rows, self.exact):
            bold = "bold" if row.name == self.recommended.name else ""
            table.add_row(*row.cells(), style=bold)
        console = Console()
        if not console.is_terminal:  # a file or a pipe has no width that would cut the numbers
            console.width = max(console.width, Console(width=1000).measure(table).maximum)
        console.print(table)
        for line in self._footer():
            console.print(line, highlight=False)

    def plot(self, target: Any) -> Any:
        """Draw each method's cosine against its cost; needs matplotlib.

        Args:
          target: a path to write a figure to, or matplotlib axes to draw on.

        Returns:
          The axes.

        Raises:
          ImportError: if matplotlib is missing.
          ValueError: if nothing was timed (`rounds=0`).
        """
        if importlib.util.find_spec("matplotlib") is None:
            raise ImportError("Diagnosis.plot needs matplotlib: pip install matplotlib")
        if np.isnan(self.exact.cost):
            raise ValueError("nothing to plot against: diagnose(rounds=0) measures no cost")
        from matplotlib.figure import Figure

        figure = None
        axes = target
        if isinstance(target, str | Path):
            figure = Figure(figsize=(8, 4.5), layout="constrained")
            axes = figure.subplots()
        rows = sorted((*self.rows, self.exact), key=lambda row: row.cost)
        for index, row in enumerate(rows):
            mean, spread = np.mean(row.cosine), np.std(row.cosine)
            style: Any = {"color": f"C{index % 10}", "label": row.name, "markersize": 6}
            if row.name == self.recommended.name:
                style |= {"marker": "*", "markersize": 14}
            axes.errorbar(row.cost, mean, spread, **{"marker": "os^"[index // 10 % 3]} | style)
        axes.axhline(ALIGNED, color="gray", linewidth=0.8, linestyle=":")
        axes.set(xlabel="time of an inner step, over training alone", ylabel="cosine to exact")
        axes.set_title(f"T = {self.horizon}; star: recommended", fontsize=10)
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
        if figure is not None:
            figure.savefig(target, dpi=120)
        return axes


def _spread(values: np.ndarray, digits: int) -> str:
    return f"{np.mean(values):.{digits}f} ± {np.std(values):.{digits}f}"


def _times(row: Row) -> str:
    return "" if np.isnan(row.cost) else f", at {row.cost:.1f} times the cost of training"
