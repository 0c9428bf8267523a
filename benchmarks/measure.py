"""What the benchmarks share: paired times, XLA's own figures, and tables that name the machine."""

from __future__ import annotations

import platform
import re
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table


def paired_ratio(
    ours: Callable[[], Any], theirs: Callable[[], Any], rounds: int, seconds: float = 0.1
) -> tuple[float, float, float]:
    """Return the median of ours/theirs over paired rounds, and its quartiles.

    The two run in turns, in the order of an alternating coin, each for about `seconds` a round;
    noise that lasts longer than a round then hits both.
    """
    calls = [max(1, int(seconds / max(_time(f, 1), 1e-6))) for f in (ours, theirs) if _time(f, 1)]
    ratios: list[float] = []
    for i in range(rounds):
        pair = [(ours, calls[0]), (theirs, calls[1])]
        times = [_time(f, n) / n for f, n in (pair if i % 2 else pair[::-1])]
        a, b = times if i % 2 else times[::-1]
        ratios.append(a / b)
    low, median, high = np.percentile(ratios, [25, 50, 75])
    return float(median), float(low), float(high)


def _time(function: Callable[[], Any], calls: int) -> float:
    started = time.perf_counter()
    for _ in range(calls):
        jax.block_until_ready(function())
    return time.perf_counter() - started


def cost(compiled: Any) -> tuple[float, int]:
    """Return the FLOPs of a compiled program and the bytes of its temporaries, as XLA says."""
    analysis = compiled.cost_analysis()
    return analysis["flops"], compiled.memory_analysis().temp_size_in_bytes


class Report:
    """Tables for the terminal, and the same as a Markdown file."""

    def __init__(self, title: str, command: str) -> None:
        self._console = Console()
        self._lines = [f"# {title}", "", f"`{command}` on {machine()}.", ""]

    def say(self, text: str) -> None:
        """Add a paragraph."""
        self._console.print(text, highlight=False)
        self._lines += [text, ""]

    def table(self, title: str, columns: list[str], rows: list[list[str]]) -> None:
        """Add a table."""
        table = Table(*columns, title=title)
        for row in rows:
            table.add_row(*row)
        self._console.print(table)
        lines = [columns, ["---"] * len(columns), *rows]
        self._lines += [f"## {title}", "", *(f"| {' | '.join(row)} |" for row in lines), ""]

    def write(self, output: Path | None) -> None:
        """Write the Markdown."""
        if output is not None:
            output.write_text("\n".join(self._lines).rstrip() + "\n")
            self._console.print(f"Written: {output}")


def machine() -> str:
    """Return the device, the host's processor and the versions."""
    device = jax.devices()[0]
    kind = f"{len(jax.devices())} {device.platform} device(s) ({device.device_kind})"
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    processor = found.group(1) if found else platform.machine()
    packages = ", ".join(f"{name} {version(name)}" for name in ("jax", "jaxlib", "optax"))
    return f"{kind}, {processor}, {cores()} cores, Python {platform.python_version()}, {packages}"


def cores() -> int:
    """Return how many cores this process may use."""
    import os

    return len(os.sched_getaffinity(0))
