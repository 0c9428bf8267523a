"""A population of 64 trials: a sweep of this library, a loop by hand, Ray Tune; a process each."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import Any

import environments
import trees
from comparison_page import table

WAYS = {"gradhpo": "**gradhpo**", "hand": "by hand", "tune": "Ray Tune"}
COLUMNS = ["by", "trial-steps/s", "to the first generation, s", "peak of all processes, MiB"]


def measure(folder: Path) -> dict[str, Any]:
    """Return what was measured of each way, by name."""
    found = environments.python(folder, "ray")
    script = environments.HERE / "scripts" / "population.py"
    variables = environments.variables("ray")
    return {way: _one([str(found), str(script), way], variables) for way in WAYS}


def rows(measured: dict[str, Any]) -> str:
    """Return the table."""
    lines = [
        [title, f"{of['rate']:,.0f}", f"{of['startup']:.1f}", f"{of['mebibytes']:,.0f}"]
        for way, title in WAYS.items()
        for of in (measured[way],)
    ]
    return table(COLUMNS, lines)


def _one(command: list[str], variables: dict[str, str]) -> dict[str, float]:
    print(" ".join(command[1:]), flush=True)
    process = subprocess.Popen(command, env=variables, text=True, stdout=subprocess.PIPE)
    peak = 0.0
    while process.poll() is None:
        peak = max(peak, trees.mebibytes(process.pid))
        time.sleep(0.5)
    assert process.stdout is not None
    text = process.stdout.read()
    if process.returncode or not text:
        raise SystemExit(f"{' '.join(command[1:])} ended with {process.returncode}")
    return {**json.loads(text), "mebibytes": peak}
