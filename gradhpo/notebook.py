"""How results show themselves in a notebook: small tables, all of whose texts are escaped."""

from __future__ import annotations

import html
import importlib.util
import sys
from collections.abc import Sequence
from typing import Any

CELL = "text-align: right; padding: 2px 10px; white-space: nowrap"
LEFT = "text-align: left; padding: 2px 10px; white-space: nowrap"


def table(
    columns: Sequence[object],
    rows: Sequence[Sequence[object]],
    *,
    title: object = "",
    bold: Sequence[bool] = (),
    below: Sequence[object] = (),
) -> str:
    """Return a table as HTML.

    Args:
      columns: the names over it; none for no head.
      rows: of texts.
      title: above it.
      bold: which rows stand out.
      below: lines below it.
    """
    head = "<thead><tr>" + _cells("th", columns) + "</tr></thead>" if columns else ""
    lines: list[str] = []
    for number, row in enumerate(rows):
        weight = "bold" if number < len(bold) and bold[number] else "normal"
        lines.append(f'<tr style="font-weight: {weight}">{_cells("td", row)}</tr>')
    above = f"<div><b>{_text(title)}</b></div>" if title else ""
    after = "".join(f"<div>{_text(line)}</div>" for line in below)
    body = f"<table>{head}<tbody>{''.join(lines)}</tbody></table>" if rows else ""
    return f"<div>{above}{body}{after}</div>"


def in_notebook() -> bool:
    """Whether a notebook shows what this process does."""
    shell: Any = sys.modules.get("IPython")
    found = None if shell is None else shell.get_ipython()
    return found is not None and hasattr(found, "kernel")


def has_widgets() -> bool:
    """Whether there is what tqdm draws with in a notebook."""
    return importlib.util.find_spec("ipywidgets") is not None


def _cells(kind: str, texts: Sequence[object]) -> str:
    styles = [LEFT, *[CELL] * (len(texts) - 1)]
    pairs = zip(texts, styles, strict=True) if texts else ()
    return "".join(f'<{kind} style="{style}">{_text(text)}</{kind}>' for text, style in pairs)


def _text(text: object) -> str:
    return html.escape(str(text))
