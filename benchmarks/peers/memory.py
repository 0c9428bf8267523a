"""What a process holds after each stage: imports, a backend with arrays, the compiled step."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import environments
from comparison_page import table
from contenders import PEERS

CASES = (("mlp", "one-step"), ("mlp", "unrolled-5"))
SCRIPTS = ("gradhpo", "hand", "torchopt", "func")
STAGES = ("python and NumPy", "imports", "arrays", "first step", "50 steps", "peak")


def measure(folder: Path, data: Path) -> dict[str, Any]:
    """Return the MiB after each stage by model, case and peer, or why there are none."""
    return {
        f"{model}/{case}": {peer: _one(folder, data, model, case, peer) for peer in SCRIPTS}
        for model, case in CASES
    }


def rows(measured: dict[str, Any]) -> str:
    """Return the table."""
    lines = [
        [name.replace("/", ", "), PEERS[peer].title, *(f"{of[stage]:.0f}" for stage in STAGES)]
        for name, peers in measured.items()
        for peer, of in peers.items()
        if "failed" not in of
    ]
    return table(["resident MiB after", "by", *STAGES], lines)


def _one(folder: Path, data: Path, model: str, case: str, peer: str) -> dict[str, Any]:
    """Return the MiB of each stage of a process of its own."""
    of = PEERS[peer]
    try:
        found = environments.python(folder, of.environment)
    except environments.UnavailableError as error:
        return {"failed": str(error)}
    script = environments.HERE / "scripts" / "stages.py"
    command = [str(found), str(script), of.script, model, case, str(data)]
    variables = environments.variables(of.environment)
    done = subprocess.run(command, check=False, env=variables, text=True, capture_output=True)
    if done.returncode:
        return {"failed": f"ended with {done.returncode}"}
    return json.loads(done.stdout)
