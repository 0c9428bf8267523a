"""Figures of registered claims from what was measured, in the style of the other pictures."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import claims
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import report

PICTURES = Path(__file__).parents[2] / "docs" / "pictures"


def name_of(claim: claims.Claim) -> str:
    """Return the name of a claim's figure."""
    return f"evidence-{claim.name}.svg"


def is_drawn(claim: claims.Claim, found: dict[str, dict[str, Any]]) -> bool:
    """Whether there is something to be seen: curves, or methods beside each other."""
    shows = claim.curves or claim.pairs or len(claim.methods) > 1
    return any(found.values()) and bool(shows)


def draw(claim: claims.Claim, found: dict[str, dict[str, Any]], folder: Path = PICTURES) -> Path:
    """Draw a claim, and return the file.

    Its curves if it has some, means and ranges over seeds; or pairs of measures of every seed; else
    its first measure of all methods, means with 95% intervals, and every seed.

    Args:
      claim: of which `is_drawn` is true.
      found: what was measured, by case and method.
      folder: where the figure is written.
    """
    style = _style()
    colours = [getattr(style, name) for name in ("GREY", "BLUE", "ORANGE", "GREEN")] + ["#9467bd"]
    cases = {case: methods for case, methods in found.items() if methods}
    mpl.use("agg")
    with mpl.rc_context(style.STYLE):
        kind = _curves if claim.curves else _pairs if claim.pairs else _points
        figure = kind(claim, cases, colours)
        path = folder / name_of(claim)
        nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(path, metadata=nothing)
        plt.close(figure)
    return path


def _points(claim: claims.Claim, cases: dict[str, Any], colours: list[str]) -> Any:
    figure, axes = plt.subplots(figsize=(7.2, 2.8), layout="constrained")
    measure, label = next(iter(claim.measures.items()))
    width = 0.6 / len(claim.methods)
    for index, (method, colour) in enumerate(zip(claim.methods, colours, strict=False)):
        there = [at for at, methods in enumerate(cases.values()) if method in methods]
        values = [methods[method][measure] for methods in cases.values() if method in methods]
        places = np.asarray(there) + width * (index - (len(claim.methods) - 1) / 2)
        means, halves = [np.mean(x) for x in values], [report.half_width(x) for x in values]
        for place, of_seeds in zip(places, values, strict=True):
            axes.plot([place] * len(of_seeds), of_seeds, ".", color=colour, alpha=0.4)
        style: Any = {"fmt": "o", "markersize": 5, "capsize": 3}
        axes.errorbar(places, means, halves, color=colour, label=method, **style)
    axes.set_xticks(range(len(cases)), list(cases))
    axes.set(ylabel=label, xlim=(-0.5, len(cases) - 0.5))
    figure.legend(fontsize=9, loc="outside right upper")
    return figure


def _curves(claim: claims.Claim, cases: dict[str, Any], colours: list[str]) -> Any:
    rows, columns = len(cases), len(claim.curves)
    figure, grid = plt.subplots(
        rows, columns, figsize=(7.2, 2.4 * rows), layout="constrained", sharex=True, squeeze=False
    )
    for axes_row, (case, methods) in zip(grid, cases.items(), strict=True):
        for axes, (curve, label) in zip(axes_row, claim.curves.items(), strict=True):
            for method, colour in zip(claim.methods, colours, strict=False):
                if method in methods:
                    values = np.asarray(methods[method][curve])  # (evaluations, seeds)
                    part = 100 * np.arange(1, len(values) + 1) / len(values)
                    axes.plot(part, values.mean(1), color=colour, linewidth=1.6, label=method)
                    low, high = values.min(1), values.max(1)
                    axes.fill_between(part, low, high, color=colour, alpha=0.15, linewidth=0)
            axes.set(ylabel=label, title=case)
    for axes in grid[-1]:
        axes.set(xlabel="part of the run, %")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), fontsize=9, loc="outside right upper")
    return figure


def _pairs(claim: claims.Claim, cases: dict[str, Any], colours: list[str]) -> Any:
    figure, grid = plt.subplots(
        1, len(cases), figsize=(4.8, 3.6), layout="constrained", squeeze=False
    )
    (x, x_label), (y, y_label) = claim.pairs.items()
    for axes, methods in zip(grid[0], cases.values(), strict=True):
        for method in methods.values():
            across, up = np.asarray(method[x]), np.asarray(method[y])
            axes.plot(across[:, :-1].ravel(), up[:, :-1].ravel(), "o", color=colours[0], alpha=0.5)
            axes.plot(across[:, -1], up[:, -1], "*", color=colours[2], markersize=11)
        axes.set(xlabel=x_label, ylabel=y_label)
    return figure


def _style() -> Any:
    """Return the module with the style and the colours of the documentation's figures."""
    spec: Any = importlib.util.spec_from_file_location("draw", PICTURES / "draw.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
