"""The measured part of `docs/board.md`, and its figures, from what `measure.py` found."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from comparison_page import filled, table

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
    "SABA": ("orange", ":"),
    "saba": ("orange", "-"),
    "SOBA": ("blue", ":"),
    "soba": ("blue", "-"),
    "StocBiO": ("grey", ":"),
    "f2sa": ("grey", "-"),
    "hyperdistill": ("green", "-"),
    "greedy": ("green", "--"),
    "one-step": ("green", ":"),
    "unrolled": ("blue", "--"),
}
"""Colour and line of what a figure shows."""
PROBLEMS = {
    "small": ("Quadratics, the small configuration", "‖∇h‖²"),
    "published": ("Quadratics, as published", "‖∇h‖²"),
    **{f"cleaning-{p}": (f"Data cleaning, corruption {p}", "test error") for p in (0.5, 0.7, 0.9)},
}
Curve = dict[str, Any]


def write(found: dict[str, Any], page: Path) -> None:
    """Write the tables into the page, and the figures beside its others."""
    parts = [f"Measured on {found['machine']}."]
    for problem, (title, metric) in PROBLEMS.items():
        if problem not in found:
            continue
        parts += [f"### {title}", *_sections(found[problem], metric)]
        if short := _short(found[problem].get("curves", {})):
            name = f"board-{problem.replace('.', '-')}"
            _draw(short, metric, PICTURES / f"{name}.svg")
            parts.append(f"![{title}: {metric} against calls and time](pictures/{name}.svg)")
    page.write_text(filled(page.read_text(), "\n\n".join(parts)))


def _short(curves: dict[str, Curve]) -> dict[str, Curve]:
    return {name: of for name, of in curves.items() if "," not in name}


def _sections(of: dict[str, Any], metric: str) -> Iterable[str]:
    curves = of.get("curves", {})
    if short := _short(curves):
        yield table(["method", "seeds", "calls", metric, "s"], _rows(short, metric))
    if long := {n.split(",")[0]: c for n, c in curves.items() if "," in n}:
        yield "After ten times as many calls, the board's 100 evaluations:"
        yield table(["method", "seeds", "calls", metric, "s"], _rows(long, metric))
    if pairs := of.get("pairs"):
        yield "Time of a call, in turns in one process:"
        yield table(["ours : the board's", "ms a step", "the board's", "ratio"], _paired(pairs))


def _rows(curves: dict[str, Curve], metric: str) -> Iterable[list[str]]:
    for name, title in TITLES.items():
        if name not in curves:
            continue
        calls, seconds, values = _arrays(curves[name], metric)
        ends = _quartiles(values[:, -1], ".1e" if metric != "test error" else ".3f")
        last = f"{np.median(seconds[:, -1]):.1f}"
        yield [_ours_bold(title), str(len(values)), f"{calls[-1]:,.0f}", ends, last]


def _ours_bold(title: str) -> str:
    return title if title.endswith("board's") else f"**{title}**"


def _paired(pairs: dict[str, Any]) -> Iterable[list[str]]:
    for name, of in pairs.items():
        ours, theirs = ([1000 * x / of["steps"] for x in of[who]] for who in ("ours", "theirs"))
        titles = " : ".join(TITLES[one].split(",")[0] for one in name.split(":"))
        yield [titles, *(_written(x, ".2f") for x in (ours, theirs, of["ratio"]))]


def _arrays(curve: Curve, metric: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the calls, the seconds and the metric, the latter two with an axis of seeds."""
    key = "test_accuracy" if metric == "test error" else "value"  # the board's name for an error
    shortest = min(len(of["rows"]) for of in curve["seeds"])
    values = [[row.get(key, np.nan) for row in of["rows"][:shortest]] for of in curve["seeds"]]
    seconds = np.array([of["seconds"][:shortest] for of in curve["seeds"]])
    return curve["calls"] * np.arange(shortest), seconds, np.array(values)


def _quartiles(values: Any, kind: str) -> str:
    if len(values) < 2:
        return format(values[0], kind)
    return _written(np.percentile(values, [25, 50, 75]), kind)


def _written(quartiles: Any, kind: str) -> str:
    low, median, high = (format(x, kind) for x in quartiles)
    return f"{median} ({low}–{high})"


def _draw(curves: dict[str, Curve], metric: str, path: Path) -> None:
    """Draw medians and quartiles against calls and against time."""
    drawing: Any = importlib.util.module_from_spec(_spec := _draw_spec())
    assert _spec.loader is not None
    _spec.loader.exec_module(drawing)
    colours = {name: getattr(drawing, name.upper()) for name in ("grey", "blue", "orange", "green")}
    mpl.use("agg")
    with mpl.rc_context(drawing.STYLE):
        figure, (left, right) = plt.subplots(
            1, 2, figsize=(7.2, 3.1), layout="constrained", sharey=True
        )
        for name in [name for name in DRAWN if name in curves]:
            calls, seconds, values = _arrays(curves[name], metric)
            low, median, high = np.percentile(values, [25, 50, 75], axis=0)
            colour, line = colours[DRAWN[name][0]], DRAWN[name][1]
            title = TITLES[name].replace(", the board's", " (board)")
            for axes, x in ((left, calls), (right, np.median(seconds, axis=0))):
                axes.plot(x, median, line, color=colour, linewidth=1.6, label=title)
                axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
        left.set(xlabel="calls of oracles", ylabel=metric)
        right.set(xlabel="seconds")
        if metric != "test error":
            left.set_yscale("log")
        figure.legend(*left.get_legend_handles_labels(), fontsize=8, loc="outside right upper")
        nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(path, metadata=nothing)
        plt.close(figure)


def _draw_spec() -> Any:
    """Return where the colours of the documentation's figures are."""
    found: Callable[..., Any] = importlib.util.spec_from_file_location
    return found("draw", PICTURES / "draw.py")
