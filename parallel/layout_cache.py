"""Layouts that `batching="auto"` measured, kept for later processes. Nothing depends on them.

One small file for each step key below `~/.cache/gradhpo`; `GRADHPO_CACHE` names another folder, or
is "off".
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path

from gradhpo.checkpoints import write_json
from gradhpo.parallel.compiled import StepKey


def folder() -> Path | None:
    """Return where layouts are kept; None for nowhere."""
    told = os.environ.get("GRADHPO_CACHE", "")
    if told:
        return None if told == "off" else Path(told).expanduser()
    try:
        caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:  # a user without a home
        return None
    return Path(caches) / "gradhpo"


def recall(key: StepKey) -> str | None:
    """Return the layout by its name; None where it is not known, or its file is damaged."""
    if (path := _path(key)) is None:
        return None
    try:
        name = json.loads(path.read_text())["batching"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return name if isinstance(name, str) else None


def remember(key: StepKey, batching: str) -> None:
    """Keep a layout, where there is room and permission."""
    if (path := _path(key)) is not None:
        with contextlib.suppress(OSError):
            write_json(path.parent, path.name, {"batching": batching})


def _path(key: StepKey) -> Path | None:
    """Return the file of a step key, on as many processors: the fastest layout depends on both."""
    processors = os.environ.get("PJRT_NPROC") or _processors()
    name = hashlib.sha256(f"{key.digest()} {processors}".encode()).hexdigest()
    caches = folder()
    return None if caches is None else caches / "layouts" / f"{name}.json"


def _processors() -> int | None:
    """Return how many XLA may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()
