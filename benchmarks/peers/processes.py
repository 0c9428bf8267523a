"""Scripts of peers as whole processes: one that takes turns, and one that is timed to its end."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any, NamedTuple

import environments


class Whole(NamedTuple):
    """A process from its start to its end."""

    seconds: float
    mebibytes: float
    """Of memory at most, as the system counts its resident pages."""


class Turns:
    """A process of a peer that answers with its first steps, and then takes steps when told."""

    def __init__(self, command: list[str], variables: dict[str, str]) -> None:
        self._name = " ".join(command[1:4])
        self._process = subprocess.Popen(
            command, env=variables, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def answer(self) -> Any:
        """Return the next answer."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self._name} ended with {self._process.wait()} before its answer")
        return json.loads(line)

    def take(self, steps: int) -> float:
        """Return the seconds of a step, of so many."""
        assert self._process.stdin is not None
        print(steps, file=self._process.stdin, flush=True)
        return self.answer() / steps

    def end(self) -> None:
        """Let it end."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def command(folder: Path, peer: Any, model: str, case: str, inputs: Path) -> list[str]:
    """Return the command line of a peer's script."""
    script = environments.HERE / "scripts" / f"{peer.script}.py"
    found = environments.python(folder, peer.environment)
    return [str(found), str(script), model, case, str(inputs)]


def whole(command: list[str], steps: int, variables: dict[str, str]) -> Whole:
    """Run a script for some steps, and return what it took."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [*command, "--steps", str(steps)], env=variables, stdout=subprocess.DEVNULL
    )
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command[1:4])} ended with {process.returncode}")
    return Whole(seconds, used.ru_maxrss / 1024)
