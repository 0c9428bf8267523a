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
    ray.init(address="local", num_cpus=6, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The small sweep, undisturbed, in this process."""
    return sweep(tmp_path_factory.mktemp("reference"), generations=LONG).run()


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
    changes = {"population": 192, "shards": 3, "generations": 3, "workers": 3}
    result = on_ray(tmp_path / "ray", **changes).run()
    report = result.report
    assert (report.compiles, report.loads, report.workers_lost) == (1, 2, 0)
    # Not one of XLA's compilations happened in a worker that loaded.
    assert sorted(report.worker_compiles)[:2] == [0, 0]
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


def test_sigkill_of_workers_at_random_instants(cluster, tmp_path, reference):
    """Kills of one worker, of both at once and of one, each at an instant in some generation."""
    rng = np.random.default_rng(0)
    at = dict(zip((1, 4, 8), (1, 2, 1), strict=True))
    made, kills, computed = on_ray(tmp_path), [], []

    def strike(pids):
        kills.append(sum(kill(pid) for pid in pids))

    def disturb(generation, table):
        del table
        computed.append(generation)
        if generation in at:
            there = workers(made)
            chosen = rng.permutation(there)[: at[generation]].tolist()
            timer = threading.Timer(rng.uniform(0, 0.08), strike, [chosen])
            timer.start()
            timers.append(timer)

    timers = []
    result = made.run(disturb)
    for timer in timers:
        timer.join()
    assert sum(kills) >= 3
    assert sum(isinstance(event, events.WorkerLost) for event in made.events) >= 2
    # Synchronous generations: whatever was lost, each was committed once, in order.
    assert computed == list(range(1, LONG + 1))
    assert_same_tables(result, reference)
    # Programs were compiled once, and loaded by every later incarnation.
    assert result.report.compiles == 1
    assert result.report.loads >= 1


def test_sigkill_while_workers_start_and_compile(cluster, tmp_path, reference):
    """Two kills before the first generation is done."""
    rng = np.random.default_rng(1)
    made, kills = on_ray(tmp_path), []

    def strike():
        while len(kills) < 2:
            time.sleep(rng.uniform(0.1, 1.2))
            if pids := workers(made):
                kills.append(kill(rng.choice(pids)))

    thread = threading.Thread(target=strike)
    thread.start()
    result = made.run()
    thread.join()
    assert_same_tables(result, reference)


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
    """Two kills of a driver with its own Ray: while it starts, and while it runs.

    Until then it has started no backend of JAX.
    """
    rng = np.random.default_rng(2)
    code = DRIVER.format(root=str(ROOT), storage=str(tmp_path), generations=LONG)
    for index in range(2):
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        with process:
            line = ""
            if index:
                line = process.stdout.readline()
                time.sleep(rng.uniform(0, 0.3))
            else:
                time.sleep(rng.uniform(2, 5))
            process.kill()
        pids = [int(word) for word in line.split()[1:]]
        assert len(pids) == 2 * index
        wait_until(lambda pids=pids: not any(map(alive, pids)), 30, "a worker outlived its driver")
    result = sweep(tmp_path, generations=LONG).run()  # any executor goes on
    assert_same_tables(result, reference)


# --- clear errors, and nothing left behind -------------------------------------------------------

FAILING = {
    "module": ({"problem": "tests.breaks_on_import:problem"}, "broken on purpose"),
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
    if case in ("module", "first step"):
        assert "The worker's own traceback" in str(caught.value)
        file = {"module": "breaks_on_import.py", "first step": "sweep_problems.py"}
        assert f'{file[case]}", line' in str(caught.value)
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
def nodes_that_die_quickly(cpus):
    """A cluster on this machine, whose first node has so many processors."""
    from ray.cluster_utils import Cluster

    ray.shutdown()
    quick = {  # to notice that a node is gone; Ray takes half a minute otherwise
        "health_check_initial_delay_ms": 0,
        "health_check_period_ms": 500,
        "health_check_timeout_ms": 1000,
        "health_check_failure_threshold": 2,
    }
    head = {"num_cpus": cpus, "include_dashboard": False, "_system_config": quick}
    nodes = Cluster(initialize_head=True, head_node_args=head)
    try:
        yield nodes
    finally:
        ray.shutdown()
        nodes.shutdown()


def test_the_loss_of_all_nodes_ends_at_once(tmp_path):
    """Where nothing will grow (wait=0), and with the reason; it took an hour of starts before."""
    with nodes_that_die_quickly(cpus=0) as nodes:
        node = nodes.add_node(num_cpus=2)
        ray.init(address=nodes.address, log_to_driver=False)
        made = on_ray(tmp_path, generations=500)  # more than are done until the loss is noticed

        def disturb(generation, table):
            del table
            if generation == 3:
                nodes.remove_node(node, allow_graceful=False)

        with pytest.raises(SweepError, match=r"no room for a worker: .*no node of the cluster"):
            made.run(disturb)
        done = made.result().generations
        assert sweep(tmp_path, generations=done + 1).run().generations == done + 1


def test_sigkill_of_a_node(tmp_path, reference):
    """A second node's raylet is killed, with the worker on it; a third one comes."""
    with nodes_that_die_quickly(cpus=1) as nodes:
        second = [nodes.add_node(num_cpus=1)]
        ray.init(address=nodes.address, log_to_driver=False)
        made, kills = on_ray(tmp_path, workers=2), []

        def disturb(generation, table):
            del table
            if generation == 3:
                (raylet,) = second[-1].all_processes["raylet"]
                kills.append(kill(raylet.process.pid))
            if generation == 6:
                second.append(nodes.add_node(num_cpus=1))
                wait_until(lambda: ray.cluster_resources().get("CPU") == 2, 20, "no second node")
            if generation in (7, 8, 9, 10):
                ready = [e for e in made.events if isinstance(e, events.WorkerReady)]
                time.sleep(0 if len(ready) >= 3 else 2)  # let a worker start on the new node

        result = made.run(disturb)
        assert kills == [True]
        assert result.report.workers_lost >= 1
        assert_same_tables(result, reference)
