"""Texts from elsewhere on a terminal: what would move its cursor is shown, and not sent."""

from __future__ import annotations


def printable(text: object, *, lines: bool = False) -> str:
    r"""Return a text with escapes such as `\x1b` in place of what a terminal would obey.

    Args:
      text: a path, a name, a message from a storage.
      lines: whether it may have several lines.
    """
    kept = "\n\t" if lines else ""
    return "".join(
        c if c.isprintable() or c in kept else c.encode("unicode_escape").decode("ascii")
        for c in str(text)
    )
