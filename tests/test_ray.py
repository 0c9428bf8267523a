"""Sweeps on real Ray: the numbers of one process, whatever is killed."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

# As a sweep does before it starts a Ray of its own: this machine's addresses only.
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
ray = pytest.importorskip("ray")

from gradhpo.cluster import SweepError, events  # noqa: E402
from tests import file_operations, numpy_workers  # noqa: E402
from tests.devices import flags  # noqa: E402
from tests.sweeps import (  # noqa: E402
    alive,
    assert_same_tables,
    sweep,
    wait_until,
    workers,
)

pytestmark = [
    pytest.mark.slow,
    # Ray's own, at interpreter level.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
ROOT = Path(__file__).parent.parent
LONG = 12
"""Generations of the sweeps in which workers are killed."""


@pytest.fixture(scope="module")
def cluster():
    """A Ray of this machine, for all tests that do not need one of their own."""
    about = {"include_dashboard": False, "log_to_driver": False}
    ray.init(address="local", num_cpus=6, **about, runtime_env=numpy_workers.on_ray(str(ROOT)))
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The small sweep, undisturbed, in this process."""
    return sweep(tmp_path_factory.mktemp("reference"), generations=LONG).run()


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The same with steps in NumPy."""
    with file_operations.numpy_steps():
        return sweep(tmp_path_factory.mktemp("expected"), generations=LONG).run()


def on_ray(storage, **changes):
    return sweep(storage, **{"executor": "ray", "workers": 2, "generations": LONG, **changes})


def kill(pid, number=signal.SIGKILL):
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


# --- what it computes ---------------------------------------------------------------------------


def test_the_numbers_of_one_process_from_one_compile(cluster, tmp_path):
    changes = {"population": 192, "shards": 2, "generations": 3, "workers": 2}
    result = on_ray(tmp_path / "ray", **changes).run()
    report = result.report
    assert (report.compiles, report.loads, report.workers_lost) == (1, 1, 0)
    # Not one of XLA's compilations happened in a worker that loaded.
    assert min(report.worker_compiles) == 0
    assert sum(report.worker_compiles) == report.compiles + report.small_compiles
    assert_same_tables(result, sweep(tmp_path / "local", **{**changes, "workers": 1}).run())


def test_a_gang_of_two_processes_holds_one_shard(cluster, tmp_path):
    changes = {
        "generations": 4,
        "shards": 2,
        "mesh": {"trial": 1, "data": 2},
        "batching": "map",
    }
    env = {"XLA_FLAGS": flags(1)}
    made = on_ray(tmp_path / "gang", **changes, workers=1, processes=2, env=env)
    killed = []

    def disturb(generation, table):
        del table
        if generation == 2:
            killed.append(kill(workers(made)[-1]))

    result = made.run(disturb)
    assert killed == [True]
    assert result.report.workers_lost == 1
    undisturbed = sweep(tmp_path / "one", **changes).run()  # two devices of one process
    assert_same_tables(result, undisturbed)


# --- SIGKILL --------------------------------------------------------------------------------------


def test_sigkill_of_workers_while_they_start_and_at_random_instants(cluster, tmp_path, expected):
    """Kills before the first generation is done, of one, and of both at once in some generation.

    Steps are in NumPy: what a killed worker compiled is loaded in the tests of plain processes.
    """
    rng = np.random.default_rng(0)
    at = {1: 1, 4: 2}
    made, kills, computed = on_ray(tmp_path, env={"NUMPY_STEPS": "Paced"}), [], []

    def strike(pids):
        kills.append(sum(kill(pid) for pid in pids))

    def strike_at_the_start():
        while not kills:
            time.sleep(rng.uniform(0.1, 1.2))
            if pids := workers(made):
                strike([rng.choice(pids)])

    def disturb(generation, table):
        del table
        computed.append(generation)
        if generation in at:
            there = workers(made)
            chosen = rng.permutation(there)[: at[generation]].tolist()
            timer = threading.Timer(rng.uniform(0, 0.08), strike, [chosen])
            timer.start()
            timers.append(timer)

    timers = [threading.Thread(target=strike_at_the_start)]
    timers[0].start()
    result = made.run(disturb)
    for timer in timers:
        timer.join()
    assert sum(kills) >= 3
    assert sum(isinstance(event, events.WorkerLost) for event in made.events) >= 2
    # Synchronous generations: whatever was lost, each was committed once, in order.
    assert computed == list(range(1, LONG + 1))
    assert_same_tables(result, expected)


DRIVER = """
import os, sys
sys.path.insert(0, {root!r})
from jax._src import xla_bridge
from tests.sweeps import sweep
made = sweep({storage!r}, executor="ray", workers=2, generations={generations})
def told(generation, table):
    # It would take memory on an accelerator, or a TPU from its worker.
    assert not xla_bridge.backends_are_initialized()
    print(generation, *[e.pid for e in made.events if e.name == "worker ready"], flush=True)
made.run(told)
"""


def test_sigkill_of_the_driver_and_all_that_it_started(tmp_path, reference):
    """A driver with its own Ray is killed while it runs: until then it started no backend of JAX.

    One that is killed while it starts leaves what the driver of any executor does.
    """
    code = DRIVER.format(root=str(ROOT), storage=str(tmp_path), generations=LONG)
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    with process:
        line = process.stdout.readline()
        time.sleep(np.random.default_rng(2).uniform(0, 0.3))
        process.kill()
    pids = [int(word) for word in line.split()[1:]]
    assert len(pids) == 2
    wait_until(lambda: not any(map(alive, pids)), 30, "a worker outlived its driver")
    result = sweep(tmp_path, generations=LONG).run()  # any executor goes on
    assert_same_tables(result, reference)


# --- clear errors, and nothing left behind -------------------------------------------------------

FAILING = {
    "first step": ({"problem": "tests.sweep_problems:fails_in_its_first_step"}, "on purpose"),
    "gang": (
        {"processes": 64, "resources": {"num_cpus": 2}},
        "no node of the cluster has as much 64 times",
    ),
    "resources": ({"resources": {"num_gpus": 64}}, r"num_gpus.*no node of the cluster"),
    "custom": ({"resources": {"unicorn": 1}}, "unicorn"),
}


@pytest.mark.parametrize("case", FAILING)
def test_errors_are_clear_and_leave_nothing_behind(cluster, tmp_path, case):
    changes, message = FAILING[case]
    made = on_ray(tmp_path, **changes)
    with pytest.raises(SweepError, match=message) as caught:
        made.run()
    assert len(str(caught.value).splitlines()) <= 10
    assert f"The storage: {tmp_path}" in str(caught.value)
    if case not in ("gang", "resources", "custom"):
        assert Path(str(caught.value).split("What the worker printed: ")[1].split()[0]).exists()
        assert "The worker's own traceback" in str(caught.value)
        assert 'sweep_problems.py", line' in str(caught.value)
        assert "\x1b" not in str(caught.value)
    wait_until(lambda: not workers(made), 10, "a worker is left behind")


def test_a_ray_of_its_own_is_stopped_and_listens_to_this_machine_only(tmp_path):
    """Arrays of the driver reach its workers, which may only read them."""
    ray.shutdown()
    seen = []
    x = np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32) + 1
    changes = {"problem": "tests.sweep_problems:with_data", "data": {"x": x}, "generations": 2}

    def look(generation, table):
        del table
        if generation == 1:
            seen.extend(listening())

    result = on_ray(tmp_path / "ray", **changes, env={"EXPECT_READ_ONLY": "1"}).run(look)
    assert not ray.is_initialized()
    assert_same_tables(result, sweep(tmp_path / "local", **changes).run())
    assert seen
    assert {address for address, name in seen if "ray" in name or "gcs" in name} <= {
        *("127.0.0.1", "::ffff:127.0.0.1")
    }
    wait_until(lambda: not ray_processes(), 15, f"left behind: {ray_processes()}")


def listening():
    """Addresses that processes of this machine listen on, with their names."""
    lines = subprocess.run(["ss", "-Hltnp"], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in lines.splitlines()]
    return [(row[3].rsplit(":", 1)[0].strip("[]"), row[5] if len(row) > 5 else "") for row in rows]


def ray_processes():
    """Names of Ray's processes that descend from this one."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = stat.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            parent = (stat.parent / "stat").read_text().rsplit(")", 1)[1].split()[1]
        except OSError:
            continue
        if ("raylet" in text or "gcs_server" in text) and int(parent) == os.getpid():
            found.append(text[:60])
    return found


# --- nodes that are lost: last, for each takes Ray from the tests that share one ----------------


@contextlib.contextmanager
def nodes_that_die_quickly():
    """A cluster on this machine, whose first node has no processors."""
    from ray.cluster_utils import Cluster

    ray.shutdown()
    quick = {  # to notice that a node is gone; Ray takes half a minute otherwise
        "health_check_initial_delay_ms": 0,
        "health_check_period_ms": 500,
        "health_check_timeout_ms": 1000,
        "health_check_failure_threshold": 2,
    }
    head = {"num_cpus": 0, "include_dashboard": False, "_system_config": quick}
    nodes = Cluster(initialize_head=True, head_node_args=head)
    try:
        yield nodes
    finally:
        ray.shutdown()
        nodes.shutdown()


def test_sigkill_of_a_node_and_the_loss_of_all(tmp_path, numpy_steps, expected):
    """A node's raylet is killed, with the worker on it, and a third one comes.

    Where all are lost and nothing will grow (wait=0), a sweep ends at once, and with the reason; it
    took an hour of starts before.
    """
    with nodes_that_die_quickly() as nodes:
        there = [nodes.add_node(num_cpus=1) for _ in range(2)]
        env = numpy_workers.on_ray(str(ROOT), NUMPY_STEPS="Plain")
        ray.init(address=nodes.address, log_to_driver=False, runtime_env=env)
        made, kills = on_ray(tmp_path / "one"), []

        def disturb(generation, table):
            del table
            if generation == 3:
                (raylet,) = there[1].all_processes["raylet"]
                kills.append(kill(raylet.process.pid))
            if generation == 6:
                there[1] = nodes.add_node(num_cpus=1)
                wait_until(lambda: ray.cluster_resources().get("CPU") == 2, 20, "no second node")
            if generation in (7, 8, 9, 10):
                ready = [e for e in made.events if isinstance(e, events.WorkerReady)]
                time.sleep(0 if len(ready) >= 3 else 2)  # let a worker start on the new node

        result = made.run(disturb)
        assert kills == [True]
        assert result.report.workers_lost >= 1
        assert_same_tables(result, expected)

        made = on_ray(tmp_path / "all", generations=3000)  # more than until the loss is noticed

        def lose(generation, table):
            del table
            if generation == 3:
                for node in there:
                    nodes.remove_node(node, allow_graceful=False)

        with pytest.raises(SweepError, match=r"no room for a worker: .*no node of the cluster"):
            made.run(lose)
    done = made.result().generations
    assert sweep(tmp_path / "all", generations=done + 1).run().generations == done + 1
