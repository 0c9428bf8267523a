"""Storages on a real server of S3, on this machine's loopback."""

import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from gradhpo import bucket, checkpoints, objects, stop_request
from gradhpo.bucket import Bucket
from gradhpo.cluster import StorageInUse, events, local_processes
from gradhpo.cluster.check import check_storage
from gradhpo.cluster.storage import Storage
from gradhpo.files import Unreachable
from gradhpo.objects import Objects
from tests import file_operations
from tests.numpy_workers import boot
from tests.s3_server import s3_server
from tests.sweeps import assert_same_tables, lost, sweep, workers

s3fs = pytest.importorskip("s3fs")
pytest.importorskip("moto")
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("numpy_steps")]
ROOT = Path(__file__).parent.parent
GENERATIONS = 5


@pytest.fixture(scope="module")
def server():
    """The environment in which the server is found; this process has it too."""
    with s3_server() as env, pytest.MonkeyPatch.context() as patch:
        for name, value in env.items():
            patch.setenv(name, value)
        yield env


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The small sweep, undisturbed, in a folder, with steps in NumPy as in all tests here."""
    with file_operations.numpy_steps():
        return sweep(tmp_path_factory.mktemp("reference"), generations=GENERATIONS).run()


def test_a_sweep_ends_as_in_a_folder_and_goes_on_there(server, reference):
    address = "s3://bucket/team/run"
    sweep(address, generations=2).run()
    made = sweep(address, generations=GENERATIONS)
    assert_same_tables(made.run(), reference)
    assert any(isinstance(event, events.Resumed) for event in made.events)
    assert all(finding.whole for finding in check_storage(address))
    store = Bucket(address)
    assert len(store.folders("checkpoints")) <= 3  # older ones are pruned
    secret = server["AWS_SECRET_ACCESS_KEY"].encode()
    for text in ("manifest.json", "programs.json", "journal.jsonl", "events.jsonl"):
        assert secret not in store.read(text)


def test_a_second_driver_is_refused(server):
    address = "s3://bucket/held"
    held = Storage(address).lock()
    with pytest.raises(StorageInUse, match=f"process {os.getpid()} on host"):
        sweep(address).run()
    held.release()


def test_a_large_object_is_sent_in_parts_and_is_there_whole_or_not_at_all(server, monkeypatch):
    monkeypatch.setattr(bucket, "ONE_PUT", 1 << 20)
    monkeypatch.setattr(objects, "PART", 5 << 20)  # the smallest that S3 takes
    store, large = Bucket("s3://bucket/large"), np.arange(2_000_000)
    saved = checkpoints.save(store, "tables/a", {"x": large}, {})
    np.testing.assert_array_equal(checkpoints.load(store, saved)[0]["x"], large)
    assert checkpoints.checksum(store, saved.file) == saved.sha256
    calls = []

    def content(file):
        calls.append(file)
        file.write(bytes(12 << 20))
        if len(calls) == 2:
            raise OSError(5, "in the middle")
        return "b-0.arrays"

    with pytest.raises(OSError, match="in the middle"):
        store.write("tables/b", content)
    calls[1].close()
    assert store.names("tables") == [saved.file.rpartition("/")[2]]


def test_errors_name_the_storage_and_no_credentials(server):
    for address, why in (
        ("s3://nowhere/run", "storage 's3://nowhere/run' cannot be written"),
        (
            "s3://BAD_Bucket:x/run",
            'Parameter validation failed: Invalid bucket name "BAD_Bucket:x"',
        ),
    ):
        with pytest.raises(OSError, match=why) as caught:
            sweep(address).run()
        assert server["AWS_ACCESS_KEY_ID"] not in str(caught.value)


def test_a_request_is_not_repeated_by_two_clients_unless_a_user_wants_it(server, monkeypatch):
    assert Objects("s3://bucket/run")._fs.retries == 2
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 7)
    assert Objects("s3://bucket/run")._fs.retries == 7


def test_a_put_to_a_server_that_hangs_ends(server, monkeypatch):
    with ThreadPoolExecutor(1) as pool, socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
        monkeypatch.setattr(s3fs.S3FileSystem, "read_timeout", 0.2)
        put = pool.submit(Objects("s3://bucket/run").put, "a", b"content")
        assert "Read timeout" in str(put.exception(timeout=60))


def test_what_is_asked_for_whole_is_one_request_and_a_text_a_listing_more(server, monkeypatch):
    store, sent = Bucket("s3://bucket/asked"), []
    held = store.lock("storage", "sweep", ("journal.jsonl",))
    store.append("journal.jsonl", b"1\n")
    held.release()
    call = s3fs.S3FileSystem._call_s3

    async def counted(self, method, *args, **kwargs):
        sent.append(method)
        return await call(self, method, *args, **kwargs)

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", counted)
    assert stop_request.asked(store) is None
    assert store.get("driver.lock", 2) == b""
    assert sent == ["get_object"] * 2
    assert store.read("journal.jsonl") == b"1\n"
    assert sent[2:] == ["list_objects_v2", "get_object", "get_object"]


def test_a_sweep_is_described_where_its_store_is_not_reached(server, monkeypatch):
    """As on a laptop without credentials; what runs, or reads, says so."""
    with monkeypatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.delenv(name)
        made = sweep("s3://bucket/described", generations=1)
        assert made.storage == "s3://bucket/described"
        for ask in (made.run, made.result):
            with pytest.raises(Unreachable, match=r"credentials.*s3://bucket/described"):
                ask()
    assert made.run().generations == 1


def test_credentials_that_come_later_are_found(server, monkeypatch):
    store = Bucket("s3://bucket/later")
    with monkeypatch.context() as patch:
        patch.delenv("AWS_ACCESS_KEY_ID")
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
        patch.setenv("AWS_CONFIG_FILE", os.devnull)
        with pytest.raises(Unreachable, match="redentials"):
            store.probe(".probe")
    store.probe(".probe")


OPERATIONS = [("kills", 3, 7, 61), ("freezes", 1, 10, 67)]


def test_sigkill_or_sigstop_at_any_request_changes_no_bit(server, tmp_path):
    """SIGSTOP before a request, or after it, while another takes over: that one's text says so."""
    arguments = [str(tmp_path), *(str(what) for group in OPERATIONS for what in group)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.store_operations", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, **server, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    kills, *said, freezes = done.stdout.splitlines()
    assert int(kills) > 60 / 61
    assert int(freezes) >= 2
    assert len(said) >= 2
    assert all("was taken over from this sweep" in text for text in said)


def test_sigkill_of_a_worker_on_this_machine(server, reference, monkeypatch):
    monkeypatch.setattr(local_processes, "BOOT", boot("Plain"))
    about = {"executor": "processes", "workers": 2, "generations": GENERATIONS}
    made = sweep("s3://bucket/processes", **about)
    assert_same_tables(made.run(killing_a_worker(made)), reference)
    assert any("SIGKILL" in reason for reason in lost(made))
    ready = [event for event in made.events if isinstance(event, events.WorkerReady)]
    assert all(Path(event.log).exists() for event in ready)


def killing_a_worker(made):
    """Return a callback that kills a worker of a sweep after its second generation."""

    def disturb(generation, table):
        del table
        if generation == 2:
            os.kill(workers(made)[0], signal.SIGKILL)

    return disturb
