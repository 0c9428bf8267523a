"""Files and journal lines that were cut or changed are noticed, and nothing is unpickled."""

import errno
import hashlib
import itertools
import json
import os
import pickle
import signal
import socket
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from gradhpo import checkpoints, lock
from gradhpo.checkpoints import Saved
from gradhpo.cluster import DamagedFile, StorageInUse, incarnations, journal
from gradhpo.cluster.storage import Storage
from tests.full_disk import full_disk

ARRAYS = {
    ".params['w']": np.arange(6, dtype=np.float32).reshape(2, 3),
    ".step": np.asarray([3, 4], np.int32),
    "bfloat16": np.asarray(jnp.asarray([1.5, -2], jnp.bfloat16)),
    "float8": np.asarray(jnp.asarray([1.5, -2], jnp.float8_e4m3fn)),
    "scalar": np.float64(2.5),
    "flags": np.asarray([True, False]),
}


@pytest.fixture
def saved(tmp_path):
    return checkpoints.save(tmp_path, "folder/file", ARRAYS, {"generation": 3})


def test_arrays_come_back_to_the_bit(tmp_path, saved):
    arrays, about = checkpoints.load(tmp_path, saved)
    assert about == {"generation": 3}
    for name, array in ARRAYS.items():
        assert arrays[name].dtype == array.dtype
        assert arrays[name].shape == array.shape
        assert arrays[name].tobytes() == array.tobytes()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.99])
def test_a_flipped_bit_is_noticed(tmp_path, saved, share):
    path = tmp_path / saved.file
    content = bytearray(path.read_bytes())
    content[int(share * len(content))] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedFile, match="checksum"):
        checkpoints.load(tmp_path, saved)
    assert checkpoints.find(tmp_path, "folder/file") is None


def test_a_cut_or_missing_file_is_noticed(tmp_path, saved):
    path = tmp_path / saved.file
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DamagedFile, match=r"folder/file.*checksum"):
        checkpoints.load(tmp_path, saved)
    path.unlink()
    with pytest.raises(DamagedFile, match="cannot be read"):
        checkpoints.load(tmp_path, saved)


def test_a_pickle_is_never_read(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("a pickle was read",))

    path = tmp_path / "file-0.npz"
    np.savez(path, header=np.asarray([Bomb()], object))
    saved = Saved("file-0.npz", checkpoints.checksum(tmp_path, path.name))
    with pytest.raises(DamagedFile, match="not a whole file of gradhpo"):
        checkpoints.load(tmp_path, saved)
    path.write_bytes(pickle.dumps(Bomb()))
    saved = Saved("file-0.npz", checkpoints.checksum(tmp_path, path.name))
    with pytest.raises(DamagedFile, match="not a whole file of gradhpo"):
        checkpoints.load(tmp_path, saved)


def test_a_file_that_cannot_be_written_whole_is_not_there(tmp_path):
    with full_disk(1000), pytest.raises(OSError, match="large"):
        checkpoints.save(tmp_path, "folder/file", {"big": np.zeros(10_000)}, {})
    assert list((tmp_path / "folder").iterdir()) == []


def test_what_older_versions_wrote_is_read(tmp_path):
    """An `.npz` of NumPy's, by its checksum, by its name, and by itself."""
    plain = {k: x.view("u1") if k == "float8" else x for k, x in ARRAYS.items()}
    plain["bfloat16"] = ARRAYS["bfloat16"].view("u2")
    dtypes = [np.asarray(x).dtype.name for x in ARRAYS.values()]
    header = json.dumps({"names": list(ARRAYS), "dtypes": dtypes, "about": {"generation": 3}})
    stored = {f"a{index}": x for index, x in enumerate(plain.values())}
    np.savez(tmp_path / "old.npz", header=np.frombuffer(header.encode(), np.uint8), **stored)
    digest = checkpoints.checksum(tmp_path, "old.npz")
    path = (tmp_path / "old.npz").rename(tmp_path / f"old-{digest[:16]}.npz")
    saved = Saved(path.name, digest)
    assert checkpoints.find(tmp_path, "old") == saved
    ways = (
        checkpoints.load(tmp_path, saved),
        checkpoints.load_named(tmp_path, path.name),
        checkpoints.read(path),
    )
    for arrays, about in ways:
        assert about == {"generation": 3}
        for name, array in ARRAYS.items():
            assert (arrays[name].dtype, arrays[name].shape) == (array.dtype, array.shape)
            assert arrays[name].tobytes() == array.tobytes()
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DamagedFile):
        checkpoints.load_named(tmp_path, path.name)
    with pytest.raises(DamagedFile):
        checkpoints.read(path)


def test_arrays_lie_as_they_can_be_used_and_written_to(tmp_path):
    turned = np.arange(6.0).reshape(2, 3).T
    swapped = np.arange(3, dtype=">f4")
    large = np.arange(5_000_000, dtype=np.int64)  # several pieces, hashed by another thread
    arrays = {"turned": turned, "swapped": swapped, "none": np.zeros((3, 0)), "large": large}
    saved = checkpoints.save(tmp_path, "file", arrays, {})
    assert hashlib.sha256((tmp_path / saved.file).read_bytes()).hexdigest() == saved.sha256
    found = checkpoints.load(tmp_path, saved)[0]
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].flags.c_contiguous
        assert found[name].flags.writeable
        assert found[name].dtype.isnative
        assert not found[name].nbytes or found[name].ctypes.data % 64 == 0


@pytest.mark.parametrize("array", [np.asarray(["a"]), np.asarray([None]), np.zeros(2, "i4,i4")])
def test_what_is_no_plain_number_is_refused_by_name(tmp_path, array):
    with pytest.raises(TypeError, match="cannot write words, an array of"):
        checkpoints.save(tmp_path, "file", {"words": array}, {})
    assert not list(tmp_path.iterdir())


def test_a_newer_format_is_refused_by_name(tmp_path, saved):
    content = (tmp_path / saved.file).read_bytes()
    (tmp_path / "newer").write_bytes(content.replace(b"arrays 1", b"arrays 2", 1))
    with pytest.raises(DamagedFile, match=r"newer: .*was written by a newer gradhpo"):
        checkpoints.read(tmp_path / "newer")


def entry(generation):
    best = {
        "score": 0.1,
        "trial": 3,
        "slot": 1,
        "generation": generation,
        "checkpoint": Saved("c", "d"),
    }
    made = [Saved(f"c{s}", "d") for s in range(2)]
    return journal.Entry(
        generation=generation, table=Saved("t", "e"), checkpoints=made, best=best, seconds=0.5
    )


def written(tmp_path, count):
    made = journal.Journal(tmp_path)
    for generation in range(count):
        made.append(entry(generation))
    return tmp_path / "journal.jsonl"


def test_a_journal_comes_back(tmp_path):
    written(tmp_path, 5)
    again = journal.Journal(tmp_path)
    assert list(again.entries()) == [entry(g) for g in range(5)]
    assert again.last == [entry(3), entry(4)]
    assert (again.generation, again.damaged) == (4, [])


@pytest.mark.parametrize("kept", range(1, 60, 7))
def test_a_last_line_cut_short_is_dropped(tmp_path, kept):
    path = written(tmp_path, 3)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2]) + lines[2][:kept])
    again = journal.Journal(tmp_path)
    assert again.generation == 1
    assert again.damaged == [f"journal.jsonl: line 3 is damaged ({kept} bytes), and not used"]
    again.append(entry(2))
    assert [e["generation"] for e in journal.Journal(tmp_path).entries()] == [0, 1, 2]


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 0.9])
def test_a_flipped_bit_in_a_line_is_noticed(tmp_path, share):
    path = written(tmp_path, 3)
    lines = path.read_bytes().splitlines(keepends=True)
    changed = bytearray(lines[1])
    changed[int(share * len(changed))] ^= 1
    path.write_bytes(lines[0] + changed + lines[2])
    again = journal.Journal(tmp_path)
    assert [e["generation"] for e in again.entries()] == [0, 2]
    assert len(again.damaged) == 1


def test_the_last_lines_can_be_dropped(tmp_path):
    written(tmp_path, 4)
    made = journal.Journal(tmp_path)
    made.drop_after(2)
    assert made.last == [entry(1), entry(2)]
    assert journal.Journal(tmp_path).generation == 2


def test_a_second_driver_is_refused_with_the_first_ones_name(tmp_path):
    first = lock.FolderLock(tmp_path, "storage", "sweep")
    with pytest.raises(StorageInUse, match=f"process {os.getpid()} on host {socket.gethostname()}"):
        lock.FolderLock(tmp_path, "storage", "sweep")
    assert str(os.getpid()) in lock.holder(tmp_path)
    first.release()
    assert lock.holder(tmp_path) is None
    lock.FolderLock(tmp_path, "storage", "sweep").release()


FORKS = """
import os, sys, time
from pathlib import Path
from gradhpo.lock import FolderLock
held = FolderLock(Path(sys.argv[1]), "storage", "sweep")
child = os.fork()
if child == 0:
    os.closerange(0, 3)
    time.sleep(60)
    os._exit(0)
print(child, flush=True)
time.sleep(60)
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_a_killed_holders_forked_child_does_not_hold_on(tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", FORKS, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        child = int(process.stdout.readline())
        try:
            with pytest.raises(StorageInUse, match=f"process {process.pid}"):
                lock.FolderLock(tmp_path, "storage", "sweep")
            process.kill()
            process.wait()
            os.kill(child, 0)  # it lives
            lock.FolderLock(tmp_path, "storage", "sweep").release()
        finally:
            os.kill(child, signal.SIGKILL)


def test_a_disk_that_is_full_leaves_no_lock_behind(tmp_path):
    refused = pytest.raises(OSError, match=f"storage '{tmp_path}' cannot be written: .*large")
    with full_disk(0), refused:
        lock.FolderLock(tmp_path, "storage", "sweep")
    lock.FolderLock(tmp_path, "storage", "sweep").release()


def test_incarnations_are_never_given_twice(tmp_path):
    first = incarnations.Incarnations(tmp_path)
    old = first.new()
    first.own({0: old, 1: old})
    incarnations.check_owner(Storage(tmp_path), 0, old)
    new = incarnations.Incarnations(tmp_path).new()  # another driver
    assert new > old
    second = incarnations.Incarnations(tmp_path)
    second.own({0: new})
    with pytest.raises(incarnations.Superseded, match=f"incarnation {new}, not {old}"):
        incarnations.check_owner(Storage(tmp_path), 0, old)
    incarnations.check_owner(Storage(tmp_path), 1, old)


def test_every_bit_of_a_file_without_a_checksum_in_its_name_is_guarded(tmp_path):
    path = tmp_path / "file"
    checkpoints.write(path, ARRAYS, {"steps": 3})
    content = path.read_bytes()
    for at in range(0, len(content), 7):
        changed = bytearray(content)
        changed[at] ^= 1 << (at % 8)
        path.write_bytes(changed)
        with pytest.raises(DamagedFile):
            checkpoints.read(path)
    path.write_bytes(content[:-20])
    with pytest.raises(DamagedFile, match="not a whole file of gradhpo"):
        checkpoints.read(path)
    with pytest.raises(DamagedFile, match=r"other: cannot be read"):
        checkpoints.read(tmp_path / "other")


@pytest.mark.parametrize("failing", [1, 2])
def test_what_the_disk_could_not_write_is_not_saved(tmp_path, monkeypatch, failing):
    """Linux tells of an error once: whoever asks first must pass it on."""
    calls, fsync = itertools.count(1), os.fsync

    def failed(descriptor):
        if next(calls) == failing:
            raise OSError(errno.EIO, "Input/output error")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", failed)
    with pytest.raises(OSError, match="Input/output error"):
        checkpoints.save(tmp_path, "large", {"x": np.zeros(3 << 20)}, {})
    assert not list(tmp_path.iterdir())


def test_a_generation_that_is_told_twice_counts_once_and_one_that_is_missing_is_told(tmp_path):
    """As a damaged object of a store may leave a journal."""
    made = journal.Journal(tmp_path)
    entries = [entry(generation) for generation in (0, 1, 2, 0, 1, 2, 3, 5)]
    for one in entries:
        made.append(one)
    again = journal.Journal(tmp_path)
    assert [one["generation"] for one in again.entries()] == [0, 1, 2, 3, 5]
    assert again.damaged == ["journal.jsonl: line 5: the generations before it are missing"]
