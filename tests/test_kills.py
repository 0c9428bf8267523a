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


def kills_of(module, folder, *groups):
    """Run a module of the tests that kills sweeps; return how often it did, by group of kills.

    Args:
      module: of which a process forks each life of a sweep.
      folder: where its files are.
      groups: (generations between checkpoints, 1 for a slow disk or 0, operations between kills,
        scheduler or kind).
    """
    arguments = [str(what) for group in groups for what in group]
    done = subprocess.run(
        [sys.executable, "-m", f"tests.{module}", str(folder), *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return list(map(int, done.stdout.split()))


GROUPS = {
    "every": (1, 0, 11, "PBT"),
    "in flight": (1, 1, 23, "PBT"),
    "every third": (3, 0, 9, "PBT"),
    "every third, in flight": (3, 1, 29, "PBT"),
    "PB2": (3, 1, 53, "PB2"),
}


@pytest.mark.slow
def test_a_kill_at_any_file_operation_changes_no_bit(tmp_path):
    """And a second one while it goes on."""
    place = MEMORY if os.access(MEMORY, os.W_OK) else tmp_path
    with tempfile.TemporaryDirectory(dir=place) as folder:
        killed = kills_of("file_operations", folder, *GROUPS.values())
    for (name, (_, _, step, _)), kills in zip(GROUPS.items(), killed, strict=True):
        assert kills > 100 / step, name
