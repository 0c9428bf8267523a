"""Sweeps on real Ray: the numbers of one process, whatever is killed."""

import contextlib
import dataclasses
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

from gradhpo.cluster import SearchSpace, SuccessiveHalving, SweepError, events  # noqa: E402
from tests.devices import flags  # noqa: E402
from tests.sweeps import (  # noqa: E402
    SPACE,
    alive,
    assert_same_tables,
    lost,
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
LONG = 16
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
    changes = {"population": 256, "shards": 4, "generations": 3, "workers": 4}
    result = on_ray(tmp_path / "ray", **changes).run()
    report = result.report
    assert (report.compiles, report.loads, report.workers_lost) == (1, 3, 0)
    # Not one of XLA's compilations happened in a worker that loaded.
    assert sorted(report.worker_compiles)[:3] == [0, 0, 0]
    assert sum(report.worker_compiles) == report.compiles + report.small_compiles
    assert_same_tables(result, sweep(tmp_path / "local", **{**changes, "workers": 1}).run())


def test_workers_take_the_program_from_a_compilation_cache(cluster, tmp_path):
    env = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    changes = {"generations": 2, "workers": 2, "env": env}
    cold, warm = (on_ray(tmp_path / name, **changes).run() for name in ("cold", "warm"))
    counts = [(r.report.compiles, r.report.loads, r.report.restores) for r in (cold, warm)]
    assert counts == [(1, 1, 0), (0, 0, 2)]
    assert warm.report.worker_compiles == [0, 0]
    assert_same_tables(warm, cold)


def test_the_number_of_workers_does_not_matter(cluster, tmp_path, reference):
    for generations, count in ((5, 3), (LONG, 1)):
        result = on_ray(tmp_path, workers=count, generations=generations).run()
    assert_same_tables(result, reference)


def test_arrays_of_the_driver_reach_workers_read_only(cluster, tmp_path):
    x = np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32) + 1
    changes = {"problem": "tests.sweep_problems:with_data", "data": {"x": x}, "generations": 2}
    result = on_ray(tmp_path / "ray", **changes, env={"EXPECT_READ_ONLY": "1"}).run()
    assert_same_tables(result, sweep(tmp_path / "local", **changes).run())


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


def test_choices_and_another_scheduler(cluster, tmp_path):
    space = dataclasses.replace(SPACE, choices={"method": ["first-order", "one-step"]})
    changes = {"space": space, "scheduler": SuccessiveHalving(reduction=2), "generations": 4}
    result = on_ray(tmp_path / "ray", **changes).run()
    assert result.report.compiles == 2
    assert_same_tables(result, sweep(tmp_path / "local", **changes).run())
    assert isinstance(SPACE, SearchSpace)


# --- SIGKILL --------------------------------------------------------------------------------------


def test_sigkill_of_workers_at_random_instants(cluster, tmp_path, reference):
    """Seven kills of one worker, or of all at once, each at an instant in some generation."""
    rng = np.random.default_rng(0)
    at = dict.fromkeys(rng.choice(np.arange(1, LONG - 1), 5, replace=False).tolist(), 1)
    for generation in sorted(at)[::4]:
        at[generation] = 2  # both workers
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
    assert sum(kills) >= 5
    assert sum(isinstance(event, events.WorkerLost) for event in made.events) >= 3
    # Synchronous generations: whatever was lost, each was committed once, in order.
    assert computed == list(range(1, LONG + 1))
    assert_same_tables(result, reference)
    # Programs were compiled once, and loaded by every later incarnation.
    assert result.report.compiles == 1
    assert result.report.loads >= 1


def test_sigkill_while_workers_start_and_compile(cluster, tmp_path, reference):
    """Three kills before the first generation is done."""
    rng = np.random.default_rng(1)
    made, kills = on_ray(tmp_path), []

    def strike():
        while len(kills) < 3:
            time.sleep(rng.uniform(0.1, 1.2))
            if pids := workers(made):
                kills.append(kill(rng.choice(pids)))

    thread = threading.Thread(target=strike)
    thread.start()
    result = made.run()
    thread.join()
    assert_same_tables(result, reference)


def test_sigkill_after_the_last_generation(cluster, tmp_path):
    made = on_ray(tmp_path, generations=2)

    def strike(generation, table):
        del table
        if generation == 2:
            kill(workers(made)[0])

    assert made.run(strike).generations == 2


def test_a_worker_that_hangs_is_replaced(cluster, tmp_path, reference):
    """SIGSTOP, twice; its process is ended too."""
    made = on_ray(tmp_path, deadline=4)
    stopped = []

    def disturb(generation, table):
        del table
        if generation in (4, 9):
            pid = workers(made)[0]
            os.kill(pid, signal.SIGSTOP)
            stopped.append(pid)

    result = made.run(disturb)
    assert sum("did not answer" in reason for reason in lost(made)) >= 2
    assert len(set(stopped)) == 2
    assert not any(map(alive, stopped))
    assert_same_tables(result, reference)


def test_a_silent_worker_is_replaced_and_a_slow_one_is_not(cluster, tmp_path):
    """Each shard's generation takes longer than a worker may be silent; there is no deadline."""
    changes = {"problem": "tests.sweep_problems:slow", "population": 2, "shards": 2}
    changes |= {"generations": 3}
    made, stopped = on_ray(tmp_path / "ray", **changes, heartbeat=0.8), []

    def disturb(generation, table):
        del table
        if generation == 2:
            stopped.append(workers(made)[0])
            os.kill(stopped[0], signal.SIGSTOP)

    result = made.run(disturb)
    assert len(lost(made)) == 1
    assert "silent" in lost(made)[0]
    assert min(entry["seconds"] for entry in result._entries) > 0.8
    assert not any(map(alive, stopped))
    assert_same_tables(result, sweep(tmp_path / "local", **changes).run())


DRIVER = """
import os, sys
sys.path.insert(0, {root!r})
from tests.sweeps import sweep
made = sweep({storage!r}, executor="ray", workers=2, generations={generations})
made.run(lambda g, table: print(g, *[e.pid for e in made.events if e.name == "worker ready"],
                                flush=True))
"""


def test_sigkill_of_the_driver_and_all_that_it_started(tmp_path, reference):
    """Two kills of a driver with its own Ray: while it starts, and while it runs."""
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
    ray.shutdown()
    seen = []

    def look(generation, table):
        del table
        if generation == 1:
            seen.extend(listening())

    result = on_ray(tmp_path, generations=2).run(look)
    assert not ray.is_initialized()
    assert result.generations == 2
    assert seen
    assert {address for address, name in seen if "ray" in name or "gcs" in name} <= {
        *("127.0.0.1", "::ffff:127.0.0.1")
    }
    wait_until(lambda: not ray_processes(), 15, f"left behind: {ray_processes()}")


def test_the_driver_starts_no_backend_of_jax(cluster, tmp_path):
    """Which would take memory on an accelerator, or a TPU from its worker."""
    code = (
        DRIVER.format(root=str(ROOT), storage=str(tmp_path), generations=2)
        + "from jax._src import xla_bridge\nassert not xla_bridge.backends_are_initialized()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


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
    """A second node's raylet is killed, twice, with the workers on it."""
    with nodes_that_die_quickly(cpus=1) as nodes:
        second = [nodes.add_node(num_cpus=1)]
        ray.init(address=nodes.address, log_to_driver=False)
        made, kills = on_ray(tmp_path, workers=2), []

        def disturb(generation, table):
            del table
            if generation in (5, 14):
                (raylet,) = second[-1].all_processes["raylet"]
                kills.append(kill(raylet.process.pid))
            if generation == 9:
                second.append(nodes.add_node(num_cpus=1))
                wait_until(lambda: ray.cluster_resources().get("CPU") == 2, 20, "no second node")
            if generation in (10, 11, 12, 13):
                ready = [e for e in made.events if isinstance(e, events.WorkerReady)]
                time.sleep(0 if len(ready) >= 3 else 2)  # let a worker start on the new node

        result = made.run(disturb)
        assert kills == [True, True]
        assert result.report.workers_lost >= 1
        assert_same_tables(result, reference)
