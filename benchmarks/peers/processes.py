"""Scripts of peers as whole processes: one that takes turns, and one that is timed to its end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import IO, Any, NamedTuple

import environments

LIMIT = 900.0
"""Seconds in which a process must answer."""


ONE_CORE = ("taskset", "--cpu-list", str(min(os.sched_getaffinity(0))))
"""Seconds of CPU on one core are the same beside other work; those of two hold waiting as well."""


class EndedError(Exception):
    """A peer's process ended, or was ended, before it was done; the text says how."""


class Whole(NamedTuple):
    """A process from its start to its end."""

    seconds: float
    """Of CPU."""
    mebibytes: float
    """Of memory at most, as the system counts its resident pages."""


class Turns:
    """A process of a peer that answers with its first steps, and then takes steps when told."""

    def __init__(self, command: list[str], variables: dict[str, str]) -> None:
        self._told = tempfile.TemporaryFile("w+")  # noqa: SIM115
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, env=variables, text=True, stdin=pipe, stdout=pipe, stderr=self._told
        )

    def answer(self) -> Any:
        """Return the next answer.

        Raises:
          EndedError: if there is none within `LIMIT`, or the process has ended.
        """
        assert self._process.stdout is not None
        limit = threading.Timer(LIMIT, self._process.kill)
        limit.start()
        line = self._process.stdout.readline()
        limit.cancel()
        if not line:
            raise EndedError(_how(self._process.wait(), self._told))
        return json.loads(line)

    def take(self, steps: int) -> float:
        """Return the seconds of CPU of a step, of so many."""
        assert self._process.stdin is not None
        try:
            print(steps, file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise EndedError(_how(self._process.wait(), self._told)) from None
        return self.answer() / steps

    def end(self) -> None:
        """Let it end."""
        for end in (self._process.stdin, self._process.stdout):
            assert end is not None
            with contextlib.suppress(BrokenPipeError):
                end.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._told.close()


def command(folder: Path, peer: Any, model: str, case: str, inputs: Path) -> list[str]:
    """Return the command line of a peer's script."""
    script = environments.HERE / "scripts" / f"{peer.script}.py"
    found = environments.python(folder, peer.environment)
    return [*ONE_CORE, str(found), str(script), model, case, str(inputs)]


def whole(command: list[str], steps: int, variables: dict[str, str]) -> Whole:
    """Run a script for some steps, and return what it took.

    Raises:
      EndedError: if it fails, or takes longer than `LIMIT`.
    """
    with tempfile.TemporaryFile("w+") as told:
        process = subprocess.Popen(
            [*command, "--steps", str(steps)],
            env=variables,
            stdout=subprocess.DEVNULL,
            stderr=told,
        )
        limit = threading.Timer(LIMIT, process.kill)
        limit.start()
        _, status, used = os.wait4(process.pid, 0)
        limit.cancel()
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise EndedError(_how(process.returncode, told))
        return Whole(used.ru_utime + used.ru_stime, used.ru_maxrss / 1024)


def _how(status: int, told: IO[str]) -> str:
    """Return how a process ended, with the last line of what it told."""
    if status == -signal.SIGKILL:
        return f"killed: no memory, or no answer within {LIMIT:.0f} s"
    told.seek(0)
    lines = [line.strip() for line in told if line.strip()]
    return f"ended with {status}: {lines[-1] if lines else 'it told nothing'}"
