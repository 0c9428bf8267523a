"""The measured part of `docs/comparison.md`: tables between two marks; the prose stays."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
COLUMNS = [
    "hypergradient",
    "by",
    "CPU ms a step",
    "time / ours",
    "whole process, CPU s",
    "peak, MiB",
    "lines",
    "distance",
]


def row(title: str, peer: str, measured: dict[str, Any], lines: int) -> list[str]:
    """Return a row of the table: one peer on one case; without figures where it failed."""
    far = measured.get("distance")
    figures = ["–"] * 4
    if "failed" not in measured:
        figures = [
            with_quartiles(measured["ms"], ".2f"),
            with_quartiles(measured["ratio"], ".2f"),
            f"{measured['whole']:.1f}" if "whole" in measured else "–",
            f"{measured['mebibytes']:.0f}" if "mebibytes" in measured else "–",
        ]
    return [title, peer, *figures, str(lines), f"{far:.0e}" if far else "–"]


def table(columns: list[str], rows: Iterable[list[str]]) -> str:
    """Return a Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def filled(page: str, measured: str) -> str:
    """Return the page with its measured part replaced.

    Raises:
      ValueError: if it does not have the two marks, once each and in order.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end) or BEGIN in rest or END in before + after:
        raise ValueError(f"the page must have {BEGIN} and then {END}, once each")
    return f"{before}{BEGIN}\n\n{measured}\n\n{END}{after}"


def with_quartiles(quartiles: Iterable[float], kind: str) -> str:
    """Return a median with its quartiles; no line is broken at a minus sign or in the range."""
    low, median, high = (format(value, kind).replace("-", "−") for value in quartiles)
    return f"{median} ({low}\u2060–\u2060{high})"
