"""The lines that a user writes for a method: those that a script marks, without what all share."""

from __future__ import annotations

import re
from pathlib import Path

MARK = re.compile(r"\s*# peer: (.+)")
END = "# end"


def count(script: Path, case: str) -> int:
    """Return how many lines of code stand between `# peer: … CASE …` (or `all`) and `# end`.

    Blank lines and comments are not counted.

    Raises:
      ValueError: if a mark is not ended, or ended twice.
    """
    total, marked = 0, None
    for number, line in enumerate(script.read_text().splitlines(), 1):
        found, text = MARK.fullmatch(line), line.strip()
        if found or text == END:
            if (marked is None) != bool(found):
                raise ValueError(f"{script}:{number}: marks do not pair: {text!r}")
            marked = found.group(1).split() if found else None
        elif marked and text and not text.startswith("#"):
            total += "all" in marked or case in marked
    if marked is not None:
        raise ValueError(f"{script}: the last mark has no {END!r}")
    return total
