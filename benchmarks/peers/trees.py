"""The memory of a process with all that it started, such as a Ray: sampled, shared pages once."""

from __future__ import annotations

import re
from pathlib import Path


def mebibytes(root: int) -> float:
    """Return the proportional set sizes of a process and its descendants, added up."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended meanwhile
            continue
        children.setdefault(parent, []).append(int(stat.parent.name))
    total, waiting = 0.0, [root]
    while waiting:
        process = waiting.pop()
        total += _kibibytes(process)
        waiting += children.get(process, [])
    return total / 1024


def _kibibytes(process: int) -> int:
    try:
        text = Path(f"/proc/{process}/smaps_rollup").read_text()
    except OSError:
        return 0
    found = re.search(r"^Pss:\s+(\d+)", text, re.MULTILINE)
    return int(found.group(1)) if found else 0
