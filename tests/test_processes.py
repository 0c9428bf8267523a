"""Sweeps on plain processes of this machine: the numbers of one process, whatever is killed."""

import dataclasses
import functools
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gradhpo.cluster import Sweep, SweepError, executors, local_processes
from gradhpo.cluster.commands import Again
from gradhpo.cluster.fleet import Fleet
from gradhpo.cluster.this_process import ThisProcess
from tests import file_operations, sweep_problems
from tests.numpy_workers import boot
from tests.sweeps import alive, assert_same_tables, lost, sweep, wait_until, workers

ROOT = Path(__file__).parent.parent
LONG = 10


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The small sweep, undisturbed, in this process."""
    return sweep(tmp_path_factory.mktemp("reference"), generations=LONG).run()


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The same with steps in NumPy."""
    with file_operations.numpy_steps():
        return sweep(tmp_path_factory.mktemp("expected"), generations=LONG).run()


@pytest.fixture
def numpy_workers(monkeypatch, numpy_steps):
    """Let steps be a few lines of NumPy in workers, too; return what chooses of which class."""

    def of(name):
        monkeypatch.setattr(local_processes, "BOOT", boot(name))

    of("Plain")
    return of


def on_processes(storage, **changes):
    return sweep(storage, **{"executor": "processes", "workers": 2, "generations": LONG, **changes})


@pytest.mark.slow
def test_a_killed_and_a_stopped_worker_change_nothing(tmp_path, reference):
    made, hit = on_processes(tmp_path, heartbeat=2), []

    def disturb(generation, table):
        del table
        if generation in (3, 6):
            hit.append(workers(made)[0])
            os.kill(hit[-1], signal.SIGKILL if generation == 3 else signal.SIGSTOP)

    result = made.run(disturb)
    assert_same_tables(result, reference)
    assert len(set(hit)) == 2
    assert any("SIGKILL" in reason for reason in lost(made))
    assert any("silent" in reason for reason in lost(made))
    assert result.report.workers_lost == 2
    assert result.report.compiles == 1  # later incarnations load it
    assert not any(map(alive, hit))
    assert not workers(made)


@pytest.mark.slow
def test_a_worker_that_hangs_is_replaced(tmp_path, expected, numpy_workers):
    """After a SIGSTOP, by a deadline; its process is ended too."""
    made, stopped = on_processes(tmp_path, deadline=4), []

    def disturb(generation, table):
        del table
        if generation == 4:
            stopped.append(workers(made)[0])
            os.kill(stopped[0], signal.SIGSTOP)

    result = made.run(disturb)
    assert any("did not answer" in reason for reason in lost(made))
    assert len(stopped) == 1
    assert not any(map(alive, stopped))
    assert_same_tables(result, expected)


@pytest.mark.slow
def test_another_number_of_workers_goes_on_after_a_kill_at_the_end(
    tmp_path, expected, numpy_workers
):
    """A worker is killed after the last generation, which is whole without it."""
    made = on_processes(tmp_path, workers=2, generations=5)

    def strike(generation, table):
        del table
        if generation == 5:
            os.kill(workers(made)[0], signal.SIGKILL)

    assert made.run(strike).generations == 5
    assert_same_tables(on_processes(tmp_path, workers=1).run(), expected)


@pytest.mark.slow
def test_workers_take_the_program_from_a_compilation_cache(tmp_path):
    env = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    changes = {"generations": 2, "env": env}
    cold = on_processes(tmp_path / "cold", **changes).run()
    warm = on_processes(tmp_path / "warm", **changes, workers=1).run()
    counts = [(r.report.compiles, r.report.loads, r.report.restores) for r in (cold, warm)]
    assert counts == [(1, 1, 0), (0, 0, 1)]
    assert warm.report.worker_compiles == [0]
    assert_same_tables(warm, cold)


@pytest.mark.slow
def test_a_crowded_worker_and_a_slow_disk_end_in_the_same_checkpoints(
    tmp_path, monkeypatch, numpy_workers
):
    """They are never at the same generation: one writes what does not fit, the other comes late."""
    slow, killed = tmp_path / "slow", []
    monkeypatch.setenv("SLOW_DISK", str(slow))
    numpy_workers("SlowDisk")
    changes = {"shards": 3, "checkpoint_every": 3, "generations": LONG}
    made = on_processes(tmp_path / "sweep", **changes)

    def disturb(generation, table):
        del table
        if generation in (1, 5):  # until the next generation the other one has all three shards
            chosen = [p for p in workers(made) if (p == int(slow.read_text())) == (generation == 1)]
            for pid in chosen[:1]:
                os.kill(pid, signal.SIGKILL)
                killed.append(generation)

    result = made.run(disturb)
    assert killed == [1, 5]  # the slow one, and a fast one
    assert result.report.workers_lost >= 2
    undisturbed = sweep(tmp_path / "reference", **changes).run()
    assert_same_tables(result, undisturbed)
    resumed = Sweep.from_storage(
        tmp_path / "sweep", generations=LONG + 2, executor="local", progress=False
    ).run()
    assert len(resumed.table["generation"]) > len(result.table["generation"])


class LosesRows(ThisProcess):
    """Some of the times that rows of other shards come with a generation, they are gone."""

    lost = 0

    def send(self, worker, call, what, arguments):
        with_rows = what == "run" and len(arguments[2]) > 0
        LosesRows.lost += with_rows
        if with_rows and LosesRows.lost in (1, 4, 7):
            self._news.append(Again(worker, call))
        else:
            super().send(worker, call, what, arguments)


def test_rows_that_are_lost_on_their_way_change_nothing(
    tmp_path, expected, numpy_steps, monkeypatch
):
    """As with the node that held them: they are in a checkpoint, or are computed again."""
    monkeypatch.setattr(executors, "ThisProcess", LosesRows)
    made = sweep(tmp_path, generations=LONG)
    assert_same_tables(made.run(), expected)
    assert LosesRows.lost > 7
    assert lost(made) == []


@pytest.mark.slow
def test_slow_is_not_dead(tmp_path, numpy_workers):
    """Each shard's generation takes longer than a worker may be silent."""
    numpy_workers("Slow")
    changes = {"population": 2, "shards": 2, "generations": 1}
    made = on_processes(tmp_path / "processes", **changes, heartbeat=0.6)
    result = made.run()
    assert min(entry["seconds"] for entry in result._entries) > 0.6
    assert lost(made) == []
    assert_same_tables(result, sweep(tmp_path / "local", **changes).run())


FAILING = {
    "import": ({"problem": "tests.sweep_problems:does_not_exist"}, "has no 'does_not_exist'"),
    "crash": ({}, "2 workers in a row were lost while shard . ran"),
    "memory": (
        {"problem": "tests.sweep_problems:ends_its_process"},
        "2 workers in a row were lost",
    ),
    "step": (
        {"problem": "tests.sweep_problems:prints_and_fails"},
        "failed to (trace|compile).*FileNotFound.*fails on purpose",
    ),
}


@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.slow) for c in FAILING])
def test_errors_name_the_storage_and_the_log_in_ten_lines(tmp_path, monkeypatch, case):
    changes, message = FAILING[case]
    few = functools.partial(dataclasses.replace, most_losses=1)
    monkeypatch.setattr(executors, "Fleet", lambda limits, *args: Fleet(few(limits), *args))
    if case == "crash":
        monkeypatch.setattr(local_processes, "BOOT", boot("Crashes"))
    made = on_processes(tmp_path / "storage", workers=1, **changes)
    with pytest.raises(SweepError, match=message) as caught:
        made.run()
    text = str(caught.value)
    assert len(text.splitlines()) <= 10
    assert str(tmp_path / "storage") in text
    log = Path(text.split("What the worker printed: ")[1].splitlines()[0])
    if case == "step":
        assert 'sweep_problems.py", line' in text
        assert "printed by a problem" in log.read_text()
        assert log.read_text().count("and says more than fits") >= 20  # the whole traceback
    assert not workers(made)


DRIVER = """
import os, sys
sys.path.insert(0, {root!r})
from gradhpo.cluster import local_processes
from tests.numpy_workers import boot, use
from tests.sweeps import sweep
use("Plain")
local_processes.BOOT = boot("Plain")
made = sweep({storage!r}, executor="processes", workers=2, generations=1000)
made.run(lambda g, table: print(g, *[e.pid for e in made.events if e.name == "worker ready"],
                                flush=True))
"""


@pytest.mark.slow
def test_a_killed_driver_leaves_no_process(tmp_path):
    """Not one that computes, and not one that is stopped."""
    code = DRIVER.format(root=str(ROOT), storage=str(tmp_path))
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as driver:
        pids = [int(word) for word in driver.stdout.readline().split()[1:]]
        os.kill(pids[0], signal.SIGSTOP)
        driver.kill()
    assert len(pids) == 2
    wait_until(lambda: not any(map(alive, pids)), 20, "a worker outlived its driver")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"processes": 2}, r'processes.*executor="processes" has one'),
        ({"resources": {"num_gpus": 1}}, "resources other than num_cpus is for Ray"),
        ({"runtime_env": {"pip": ["x"]}}, "runtime_env is for Ray"),
        ({"address": "auto"}, "address is for Ray"),
        ({"problem": sweep_problems.problem()}, "problem: .*cannot be sent"),
        ({"optimizer": functools.partial(lambda x: x, 1)}, "optimizer: .*cannot be sent"),
        ({"heartbeat": 0}, "heartbeat"),
    ],
)
def test_what_only_ray_can_is_refused_by_name(tmp_path, changes, message):
    with pytest.raises((TypeError, ValueError), match=message):
        on_processes(tmp_path / "new", **changes)
    assert not (tmp_path / "new").exists()
