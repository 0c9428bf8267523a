"""What the papers' scripts share: intervals, a table of published beside reproduced, a figure."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from scipy.stats import t as student_t


def half_width(values: Any, level: float = 0.95) -> float:
    """Return the half-width of the mean's interval (Student's t); NaN for fewer than two values."""
    values = np.asarray(values, float)
    if len(values) < 2:
        return float("nan")
    spread = np.std(values, ddof=1) / np.sqrt(len(values))
    return float(student_t.ppf((1 + level) / 2, len(values) - 1) * spread)


def interval(values: Any, digits: int = 3) -> str:
    """Return "mean ± half-width" of the 95% interval, and how many values were not finite."""
    values = np.asarray(values, float)
    finite = values[np.isfinite(values)]
    lost = f" ({len(values) - len(finite)}/{len(values)} diverged)"
    if not len(finite):
        return "diverged"
    text = f"{finite.mean():.{digits}f}"
    if len(finite) > 1:
        text += f" ± {half_width(finite):.{digits}f}"
    return text + (lost if len(finite) < len(values) else "")


def writable(output: Path) -> Path:
    """Return the path, made sure before anything is computed that a figure can be written there.

    Raises:
      typer.BadParameter: if it is a folder, its ending names no format, or it cannot be written.
    """
    endings = plt.figure().canvas.get_supported_filetypes()
    plt.close()
    if output.suffix.removeprefix(".") not in endings:
        raise typer.BadParameter(f"{output}: the ending must be one of {', '.join(endings)}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        existed = output.exists()
        with output.open("ab"):
            pass
        if not existed:
            os.unlink(output)
    except OSError as error:
        raise typer.BadParameter(f"cannot write {output}: {error.strerror}") from None
    return output


def table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print a table, numbers to the right of a first column of names."""
    made = Table(title=title)
    for index, column in enumerate(columns):
        made.add_column(column, justify="right" if index else "left")
    for row in rows:
        made.add_row(*row)
    console().print(made)


def say(text: str) -> None:
    """Print a paragraph."""
    console().print(text, highlight=False)


def console() -> Console:
    """Return the terminal; wide where there is none, so that no table is cut in a file."""
    found = Console()
    return found if found.is_terminal else Console(width=140)


def axes(columns: int, rows: int = 1, width: float = 4.5) -> tuple[Any, Any]:
    """Return a figure and its axes, an array `(rows, columns)`, drawn without a display."""
    mpl.use("agg")
    size = (width * columns, 3.6 * rows)
    return plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)


def save(figure: Any, output: Path) -> None:
    """Write the figure, and say where."""
    figure.savefig(output, dpi=120)
    plt.close(figure)
    say(f"Figure: {output}")
