"""A virtual environment for each set of peers, with the versions that `requirements/` pins."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).parent
CHECKOUT = HERE.parents[1]
OF_CHECKOUT = ("gradhpo", "ray")
"""Environments that take this library from the checkout."""
NOT_DECLARED = {"betty-ml"}
"""Packages that say they need an older Python than this, and run on it all the same."""


class UnavailableError(Exception):
    """An environment cannot be made here."""


def python(folder: Path, name: str) -> Path:
    """Return the interpreter of an environment, made first if it is not there as pinned.

    Raises:
      UnavailableError: if it cannot be made.
    """
    wanted = (HERE / "requirements" / f"{name}.txt").read_text()
    environment = folder.resolve() / name
    found, done = environment / "bin" / "python", environment / "done.txt"
    if not done.exists() or done.read_text() != wanted:
        print(f"Making {environment}", flush=True)
        venv.create(environment, with_pip=True, clear=True)
        _install(found, _lines(wanted))
        done.write_text(wanted)
    return found


def variables(name: str) -> dict[str, str]:
    """Return the environment variables of a peer's process."""
    kept = {key: value for key, value in os.environ.items() if key not in ("XLA_FLAGS",)}
    kept["PYTHONPATH"] = str(CHECKOUT) if name in OF_CHECKOUT else ""
    return kept | {"JAX_PLATFORMS": "cpu"}


def _lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def _install(found: Path, requirements: list[str]) -> None:
    """Install; torch first, so that no other package brings another one."""
    first = [line for line in requirements if line.startswith("torch==")]
    strays = [line for line in requirements if line.split("==")[0] in NOT_DECLARED]
    rest = [line for line in requirements if line not in first + strays]
    for options, lines in (
        ([], first),
        ([], first + rest),
        (["--no-deps", "--ignore-requires-python"], strays),
    ):
        if lines:
            command = [found, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            done = subprocess.run([*command, *options, *lines], check=False, stdout=sys.stderr)
            if done.returncode:
                raise UnavailableError(f"pip cannot install {', '.join(lines)}")
