"""The measured part of `docs/board.md`, and its figures, from what `measure.py` found."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from comparison_page import filled, table, with_quartiles

CHECKOUT = Path(__file__).parents[2]
PICTURES = CHECKOUT / "docs" / "pictures"
TITLES = {
    "SOBA": "SOBA, the board's",
    "SABA": "SABA, the board's",
    "F2SA": "F2SA, the board's",
    "StocBiO": "StocBiO, the board's",
    "soba": "SOBA",
    "masoba": "MA-SOBA",
    "saba": "SABA",
    "f2sa": "F2SA",
    "bome": "BOME",
    "implicit": "Implicit, Neumann",
    "one-step": "One-Step",
    "hyperdistill": "HyperDistill",
    "greedy": "Greedy",
    "unrolled": "Unrolled",
}
DRAWN: dict[str, tuple[str, str]] = {
    "saba": ("orange", "-"),
    "soba": ("blue", "-"),
    "implicit": ("green", "-"),
    "f2sa": ("orange", "--"),
    "one-step": ("blue", "--"),
    "hyperdistill": ("green", "--"),
    "greedy": ("blue", "-."),
    "unrolled": ("green", "-."),
    "SABA": ("grey", ":"),
    "SOBA": ("grey", "--"),
    "F2SA": ("grey", "-"),
    "StocBiO": ("grey", "-."),
}
"""Colour and line of what a figure shows; the board's own last, above ours."""
CALLS = 64_000
"""Where all methods are compared, and where a figure ends: 100 evaluations of SOBA's or SABA's."""
PROBLEMS = {
    "small": ("Quadratics, the board's default: w and λ of 100", "‖∇h‖²", CALLS),
    "small-10": ("Quadratics, λ of 10", "‖∇h‖²", CALLS),
    "published": ("Quadratics, as published", "‖∇h‖²", CALLS),
    **{
        f"cleaning-{p}": (f"Data cleaning, corruption {p}", "test error", CALLS // 2)
        for p in (0.5, 0.7, 0.9)
    },
}
Curve = dict[str, Any]


def write(found: dict[str, Any], page: Path) -> None:
    """Write the tables into the page, and the figures beside its others."""
    parts = [f"Measured on {found['machine']}."]
    for problem, (title, metric, calls) in PROBLEMS.items():
        if problem not in found:
            continue
        parts += [f"### {title}", *_sections(found[problem], metric, calls)]
        if curves := found[problem].get("curves"):
            name = f"board-{problem.replace('.', '-')}"
            _draw(curves, metric, calls, PICTURES / f"{name}.svg")
            against = "calls and time" if _timed(curves) else "calls"
            parts.append(f"![{title}: {metric} against {against}](pictures/{name}.svg)")
    page.write_text(filled(page.read_text(), "\n\n".join(parts)))


def _timed(curves: dict[str, Curve]) -> bool:
    return all(curve["seconds"] for curve in curves.values())


def _sections(of: dict[str, Any], metric: str, calls: int) -> Iterable[str]:
    if curves := of.get("curves"):
        columns = ["method", "seeds", f"{metric}, {calls:,} calls", "at the end", "after calls"]
        yield table([*columns, "CPU ms a step"], _rows(curves, metric, calls))
    if pairs := of.get("pairs"):
        yield "CPU time of a step, in turns in one process:"
        yield table(["ours : the board's", "ms a step", "the board's", "ratio"], _paired(pairs))


def _rows(curves: dict[str, Curve], metric: str, calls: int) -> Iterable[list[str]]:
    for name, title in TITLES.items():
        if name not in curves:
            continue
        taken, values = _arrays(curves[name], metric)
        within = values[:, np.flatnonzero(taken <= calls)[-1]]
        kind = ".1e" if metric != "test error" else ".3f"
        yield [
            _ours_bold(title),
            str(len(values)),
            _quartiles(within, kind),
            _quartiles(values[:, -1], kind),
            f"{taken[-1]:,.0f}",
            f"{1000 * seconds:.2f}" if (seconds := curves[name]["seconds"]) else "–",
        ]


def _ours_bold(title: str) -> str:
    return title if title.endswith("board's") else f"**{title}**"


def _paired(pairs: dict[str, Any]) -> Iterable[list[str]]:
    for name, of in pairs.items():
        ours, theirs = ([1000 * x / of["steps"] for x in of[who]] for who in ("ours", "theirs"))
        titles = " : ".join(TITLES[one].split(",")[0] for one in name.split(":"))
        yield [titles, *(with_quartiles(x, ".2f") for x in (ours, theirs, of["ratio"]))]


def _arrays(curve: Curve, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the calls, and the metric with an axis of seeds; infinite where one diverged."""
    key = "test_accuracy" if metric == "test error" else "value"  # the board's name for an error
    longest = max(len(rows) for rows in curve["seeds"])
    values = np.full((len(curve["seeds"]), longest), np.inf)
    for row, found in zip(values, curve["seeds"], strict=True):
        row[: len(found)] = [np.nan_to_num(of.get(key, np.inf), nan=np.inf) for of in found]
    return curve["calls"] * curve["every"] * np.arange(longest), values


def _quartiles(values: Any, kind: str) -> str:
    if len(values) < 2:
        return format(values[0], kind)
    return with_quartiles(_percentiles(values), kind)


def _percentiles(values: Any) -> Any:
    """Return the quartiles over seeds, each a number of one where there is no finite mean."""
    return np.percentile(values, [25, 50, 75], axis=0, method="nearest")


def _draw(curves: dict[str, Curve], metric: str, calls: int, path: Path) -> None:
    """Draw medians and quartiles against calls and against time."""
    drawing: Any = importlib.util.module_from_spec(_spec := _draw_spec())
    assert _spec.loader is not None
    _spec.loader.exec_module(drawing)
    colours = {name: getattr(drawing, name.upper()) for name in ("grey", "blue", "orange", "green")}
    mpl.use("agg")
    with mpl.rc_context(drawing.STYLE):
        timed = _timed(curves)
        figure, panels = plt.subplots(
            1, 1 + timed, figsize=(7.2, 3.9), layout="constrained", sharey=True, squeeze=False
        )
        left, after_first = panels[0, 0], 0.0
        for name in [name for name in DRAWN if name in curves]:
            taken, values = _arrays(curves[name], metric)
            shown = np.flatnonzero(taken <= calls)
            shown = shown[:: max(1, len(shown) // 25)]
            low, median, high = _percentiles(values[:, shown])
            after_first = max(after_first, *high[1:])
            colour, line = colours[DRAWN[name][0]], DRAWN[name][1]
            title = TITLES[name].replace(", the board's", " (board)").split(",")[0]
            steps = taken[shown] / curves[name]["calls"]
            scales = (curves[name]["calls"], curves[name]["seconds"])
            for axes, scale in zip(panels[0], scales, strict=False):
                axes.plot(scale * steps, median, linestyle=line, color=colour, label=title)
                axes.fill_between(scale * steps, low, high, color=colour, alpha=0.2, linewidth=0)
        left.set(xlabel="calls of oracles", ylabel=metric)
        if timed:
            panels[0, 1].set(xlabel="CPU seconds")
        if metric == "test error":
            left.set(ylim=(None, after_first))
        else:
            left.set(yscale="log")
        handles = left.get_legend_handles_labels()
        figure.legend(*handles, fontsize=9, ncols=4, loc="outside lower center")
        nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(path, metadata=nothing)
        plt.close(figure)


def _draw_spec() -> Any:
    """Return where the colours of the documentation's figures are."""
    found: Callable[..., Any] = importlib.util.spec_from_file_location
    return found("draw", PICTURES / "draw.py")
