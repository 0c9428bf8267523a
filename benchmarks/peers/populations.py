"""A population of 64 trials: a sweep of this library, a loop by hand, Ray Tune; a process each."""

from __future__ import annotations

import json
import math
import subprocess
import time
from pathlib import Path
from typing import Any

import environments
import trees
from comparison_page import table

WAYS = {"gradhpo": "**gradhpo**", "hand": "by hand", "tune": "Ray Tune"}
LIMIT = 900.0
"""Seconds that a way may take."""
COLUMNS = ["by", "trial-steps/s", "to the first generation, s", "peak of all processes, MiB"]


def measure(folder: Path, way: str) -> dict[str, Any]:
    """Return what was measured of a way, or why it failed."""
    try:
        found = environments.python(folder, "ray")
    except environments.UnavailableError as error:
        return {"failed": str(error)}
    script = environments.HERE / "scripts" / "population.py"
    return _one([str(found), str(script), way], environments.variables("ray"))


def rows(measured: dict[str, Any]) -> str:
    """Return the table."""
    lines = [_row(title, measured[way]) for way, title in WAYS.items() if way in measured]
    return table(COLUMNS, lines)


def _row(title: str, measured: dict[str, Any]) -> list[str]:
    if "failed" in measured:
        return [f"{title}: {measured['failed']}", "–", "–", "–"]
    figures = (f"{measured['rate']:,.0f}", f"{measured['startup']:.1f}")
    return [title, *figures, f"{measured['mebibytes']:,.0f}"]


def _one(command: list[str], variables: dict[str, str]) -> dict[str, Any]:
    process = subprocess.Popen(command, env=variables, text=True, stdout=subprocess.PIPE)
    peak, began = 0.0, time.monotonic()
    while process.poll() is None:
        peak = max(peak, trees.mebibytes(process.pid))
        if time.monotonic() - began > LIMIT:
            process.terminate()
            process.wait()
            return {"failed": f"not done within {LIMIT:.0f} s"}
        time.sleep(0.5)
    assert process.stdout is not None
    text = process.stdout.read()
    if process.returncode or not text:
        return {"failed": f"ended with {process.returncode}"}
    figures = json.loads(text)
    if not all(map(math.isfinite, figures.values())):  # no trial came to the end of a generation
        return {"failed": "no generation ended"}
    return {**figures, "mebibytes": peak}
