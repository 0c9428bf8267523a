"""What the tests of sweeps share: a small sweep, equal to the bit, and its workers' processes."""

import time
from pathlib import Path

import numpy as np

from gradhpo.cluster import PBT, SearchSpace, Sweep, events, loguniform

SPACE = SearchSpace(hyperparams={"log_rate": loguniform(1e-3, 3e-1, stored="log")})
GENERATIONS = 8
SETTINGS = {
    "problem": "tests.sweep_problems:problem",
    "optimizer": "tests.sweep_problems:optimizer",
    "space": SPACE,
    "population": 12,
    "generations": GENERATIONS,
    "steps_per_generation": 5,
    "scheduler": PBT(quantile=0.34),
    "batching": "map",
    "shards": 4,
    "progress": False,
    "executor": "local",
}


def sweep(storage, **changes):
    """Return the small sweep, with other settings where given."""
    return Sweep(**{**SETTINGS, "storage": storage, **changes})


def assert_same_tables(result, expected):
    """Compare whole tables to the bit."""
    assert list(result.table) == list(expected.table)
    for name, column in expected.table.items():
        assert result.table[name].dtype == column.dtype, name
        np.testing.assert_array_equal(result.table[name], column, err_msg=name)
        assert result.table[name].tobytes() == column.tobytes(), name
    assert result.best.lineage == expected.best.lineage
    for name, array in expected.best.arrays.items():
        assert result.best.arrays[name].tobytes() == array.tobytes(), name


class Killed(BaseException):
    """What no sweep takes for an error of its own."""


def killing_after(last):
    """Return a callback that ends a sweep after this generation, as a kill would."""

    def strike(generation, table):
        del table
        if generation == last:
            raise Killed

    return strike


def alive(pid):
    """Whether a process of this machine is there, and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def workers(made):
    """Process ids of the workers that a running sweep has had, the living ones."""
    pids = [event.pid for event in list(made.events) if isinstance(event, events.WorkerReady)]
    return [pid for pid in pids if alive(pid)]


def lost(made):
    """Why workers of a sweep were given up."""
    return [event.reason for event in made.events if isinstance(event, events.WorkerLost)]


def wait_until(condition, seconds, what):
    """Wait for something that takes a while."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.02)
