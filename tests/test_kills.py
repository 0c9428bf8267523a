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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("every", "slow", "step", "scheduler"),
    [(1, 0, 3, "PBT"), (1, 1, 7, "PBT"), (3, 0, 2, "PBT"), (3, 1, 7, "PBT"), (3, 1, 29, "PB2")],
    ids=["every", "in flight", "every third", "every third, in flight", "PB2"],
)
def test_a_kill_at_any_file_operation_changes_no_bit(tmp_path, every, slow, step, scheduler):
    """And a second one while it goes on."""
    place = MEMORY if os.access(MEMORY, os.W_OK) else tmp_path
    with tempfile.TemporaryDirectory(dir=place) as folder:
        done = subprocess.run(
            [sys.executable, "-m", "tests.file_operations", folder]
            + [str(argument) for argument in (every, slow, step, scheduler)],
            capture_output=True,
            text=True,
            check=False,
            cwd=ROOT,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
        )
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) > 100 / step
