"""Figures of a sweep over its generations, by matplotlib: the metric, and the searched settings."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gradhpo.cluster.discrete import Integer
from gradhpo.cluster.distributions import Distribution, Uniform
from gradhpo.cluster.lineage import Turn

QUANTILES = (0.25, 0.5, 0.75)
PANELS = 3
"""Panels in a row."""


class Curves(NamedTuple):
    """What is drawn of a metric, `(generations,)` each; NaN where every trial has diverged."""

    best: np.ndarray
    """So far, over all trials."""
    low: np.ndarray
    median: np.ndarray
    high: np.ndarray


def curves_of(rows: np.ndarray, sign: int) -> Curves:
    """Return the curves of all trials together.

    Args:
      rows: `(generations, slots)`, the metric.
      sign: 1 if it is minimized, -1 if maximized.
    """
    finite = [row[np.isfinite(row)] for row in np.asarray(rows, float)]
    nothing = np.full(len(QUANTILES), np.nan)
    low, median, high = np.array(
        [np.quantile(row, QUANTILES) if len(row) else nothing for row in finite]
    ).T
    best = np.array([(row * sign).min(initial=np.inf) for row in finite])
    best = np.minimum.accumulate(best)
    return Curves(np.where(np.isinf(best), np.nan, best * sign), low, median, high)


def draw_metric(
    target: Any, rows: np.ndarray, turns: Sequence[Turn], metric: str, sign: int
) -> Any:
    """Draw the metric of all trials, their median and middle half, the best so far, the winner.

    Args:
      target: a path to write a figure to, or matplotlib axes to draw on.
      rows: `(generations, slots)`, the metric.
      turns: the winner's life.
      metric: its name.
      sign: 1 if it is minimized, -1 if maximized.

    Returns:
      The axes.

    Raises:
      ImportError: if matplotlib is not installed.
    """
    figure, axes = _axes(target, "SweepResult.plot", 1)
    (axes,) = axes
    generations, curves = np.arange(len(rows)), curves_of(rows, sign)
    _trials(axes, rows)
    axes.fill_between(
        generations, curves.low, curves.high, color="C1", alpha=0.3, label="its middle half"
    )
    axes.plot(generations, curves.median, color="C1", label="the median of all trials")
    axes.plot(generations, curves.best, color="C3", linestyle="--", label="the best so far")
    _winner(axes, rows, turns)
    positive = np.nanmin(np.where(np.isfinite(rows), rows, np.inf)) > 0
    axes.set(xlabel="generation", ylabel=metric, yscale="log" if positive else "linear")
    axes.legend(fontsize=7)
    _save(figure, target)
    return axes


def draw_front(
    target: Any, compared: Mapping[str, np.ndarray], front: Sequence[Mapping[str, float]]
) -> Any:
    """Draw the first two objectives of all trials, and the front.

    Args:
      target: a path to write a figure to, or matplotlib axes to draw on.
      compared: by objective, what all trials had.
      front: of each trial that no other dominates, its objectives.

    Returns:
      The axes.

    Raises:
      ImportError: if matplotlib is not installed.
    """
    first, second = list(compared)[:2]
    figure, (axes,) = _axes(target, "SweepResult.plot", 1)
    axes.plot(compared[first], compared[second], "C0.", alpha=0.3, label="all trials")
    line = ([scores[first] for scores in front], [scores[second] for scores in front])
    axes.plot(*line, "k.", label="the front")
    if len(compared) == 2:
        axes.plot(*line, "k-", drawstyle="steps-post")
    axes.set(xlabel=first, ylabel=second)
    axes.legend(fontsize=7)
    _save(figure, target)
    return axes


def draw_settings(
    target: Any,
    columns: Mapping[str, np.ndarray],
    kinds: Mapping[str, Sequence[Distribution]],
    turns: Sequence[Turn],
) -> list[Any]:
    """Draw what each searched setting was in all trials, and in the winner.

    Args:
      target: a path to write a figure to, or matplotlib axes to draw on, one for each setting.
      columns: by the setting's name, `(generations, slots)`, the number; NaN where there is none.
      kinds: by the setting's name, its distributions in combinations of choices.
      turns: the winner's life.

    Returns:
      The axes.

    Raises:
      ImportError: if matplotlib is not installed.
      ValueError: if nothing is searched that is a number, or for another number of axes.
    """
    if not columns:
        raise ValueError("nothing to draw: the sweep searches no setting that is a number")
    figure, axes = _axes(target, "SweepResult.plot_settings", len(columns))
    for panel, (name, rows) in zip(axes, columns.items(), strict=True):
        log = all(isinstance(about, Uniform | Integer) and about.log for about in kinds[name])
        _trials(panel, rows)
        _winner(panel, rows, turns)
        scale = "log" if log and np.nanmin(rows) > 0 else "linear"  # hypergradients may lead out
        panel.set(xlabel="generation", ylabel=name or "hyperparams", yscale=scale)
    if turns:
        axes[0].legend(fontsize=7)
    _save(figure, target)
    return axes


def _trials(axes: Any, rows: np.ndarray) -> None:
    axes.plot(rows, color="C0", alpha=min(0.6, 20 / rows.shape[1]), linewidth=0.8)


def _winner(axes: Any, rows: np.ndarray, turns: Sequence[Turn]) -> None:
    """Draw the winner's line; of several objectives there is none."""
    if not turns:
        return
    line = [rows[turn.generation, turn.slot] for turn in turns]
    axes.plot([turn.generation for turn in turns], line, color="black", label="the winner")


def _axes(target: Any, who: str, panels: int) -> tuple[Any, list[Any]]:
    """Return a new figure for a path, None for axes; and the axes to draw on."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError(f"{who} needs matplotlib: pip install 'gradhpo[report]'")
    if not isinstance(target, str | Path):
        axes = np.ravel(np.asarray(target, object)).tolist()
        if len(axes) != panels:
            raise ValueError(f"{who} needs {panels} axes to draw on, got {len(axes)}")
        return None, axes
    from matplotlib.figure import Figure

    width = min(panels, PANELS)
    height = -(-panels // width)
    size = (7, 4) if panels == 1 else (3.5 * width, 3 * height)
    figure = Figure(figsize=size, layout="constrained")
    axes = np.ravel(figure.subplots(height, width, squeeze=False)).tolist()
    for left in axes[panels:]:
        left.set_axis_off()
    return figure, axes[:panels]


def _save(figure: Any, target: Any) -> None:
    if figure is not None:
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(target, dpi=120)
