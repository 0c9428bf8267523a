"""SIGKILL at every file operation of a sweep: what goes on ends equal to the bit."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MEMORY = Path("/dev/shm")
"""A file system without a disk, where there is one: SIGKILL needs none, and fsync costs nothing."""


def kills_of(module, *arguments):
    """Run a module of the tests that kills sweeps; return how often it did."""
    done = subprocess.run(
        [sys.executable, "-m", f"tests.{module}", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return int(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("every", "slow", "step", "scheduler"),
    [(1, 0, 7, "PBT"), (1, 1, 17, "PBT"), (3, 0, 5, "PBT"), (3, 1, 17, "PBT"), (3, 1, 37, "PB2")],
    ids=["every", "in flight", "every third", "every third, in flight", "PB2"],
)
def test_a_kill_at_any_file_operation_changes_no_bit(tmp_path, every, slow, step, scheduler):
    """And a second one while it goes on."""
    place = MEMORY if os.access(MEMORY, os.W_OK) else tmp_path
    with tempfile.TemporaryDirectory(dir=place) as folder:
        killed = kills_of("file_operations", folder, every, slow, step, scheduler)
    assert killed > 100 / step
