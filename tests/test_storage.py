"""Checkpoints behind the computation, not after every generation; what is removed, and what not."""

import dataclasses
import threading
from typing import ClassVar

import numpy as np
import pytest

from gradhpo.cluster import events, executors
from gradhpo.cluster.incarnations import Incarnations
from gradhpo.cluster.journal import Journal
from gradhpo.cluster.shard import ShardHost
from gradhpo.cluster.storage import Storage
from gradhpo.cluster.writer import Writer
from tests import file_operations
from tests.sweeps import GENERATIONS, assert_same_tables, sweep


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The small sweep, undisturbed, with checkpoints after every generation."""
    return sweep(tmp_path_factory.mktemp("reference")).run()


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The same with steps in NumPy."""
    with file_operations.numpy_steps():
        return sweep(tmp_path_factory.mktemp("expected")).run()


def stopped_after(storage, generation, **changes):
    """Run until this generation is saved, and let an exception end the driver there."""

    def stop(now, table):
        del table
        if now == generation:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        sweep(storage, **changes).run(stop)


def written(storage):
    """The generations whose states are in the journal."""
    entries = Journal(storage).entries()
    return [entry["generation"] for entry in entries if entry["checkpoints"]]


@pytest.mark.parametrize("generation", range(1, GENERATIONS))
def test_with_fewer_checkpoints_the_same_is_computed_again(
    tmp_path, expected, numpy_steps, generation
):
    stopped_after(tmp_path, generation, checkpoint_every=3)
    assert written(tmp_path) == [g for g in (2, 5) if g < generation]
    made = sweep(tmp_path, checkpoint_every=3)
    assert_same_tables(made.run(), expected)
    assert written(tmp_path) == [2, 5, GENERATIONS - 1]
    assert not [
        e for e in made.events if isinstance(e, events.Note)
    ]  # what was computed again gave its tables
    there = {path.parent.name for path in (tmp_path / "checkpoints").glob("*/shard*")}
    assert there <= {"000005", "000006", f"{GENERATIONS - 1:06d}"}


def test_checkpoint_every_may_change_and_the_sweep_may_be_extended(tmp_path, expected, numpy_steps):
    for generations, every in ((2, 5), (4, 1), (7, 3), (GENERATIONS, 2)):
        sweep(tmp_path, generations=generations, checkpoint_every=every).run()
        assert written(tmp_path)[-1] == generations - 1
    assert_same_tables(sweep(tmp_path).result(), expected)


@pytest.mark.parametrize(
    "file", ["tables/000003", "tables/000002", "checkpoints/000002/shard-0001"]
)
def test_damage_among_fewer_checkpoints(tmp_path, expected, numpy_steps, file):
    stopped_after(tmp_path, 5, checkpoint_every=3)
    path = next(tmp_path.glob(f"{file}*"))
    path.write_bytes(path.read_bytes()[:-7])
    made = sweep(tmp_path, checkpoint_every=3)
    assert_same_tables(made.run(), expected)
    assert any(isinstance(e, events.Damaged) for e in made.events)


class Forgetful(executors.FleetExecutor):
    """Whose worker is lost, with all that it holds, before some generations."""

    lost_before: ClassVar[list[int]] = []

    def run(self, orders):
        if orders[0].generation in self.lost_before:
            self.lost_before.remove(orders[0].generation)
            worker = self._processes._worker
            worker.close()
            worker._host = ShardHost(worker._host.spec)
            worker.prepare(0, "map", None)
        return super().run(orders)


@pytest.mark.parametrize("every", [1, 3])
def test_a_lost_worker_is_made_up_for_from_the_last_checkpoints(
    tmp_path, expected, numpy_steps, monkeypatch, every
):
    monkeypatch.setattr(executors, "FleetExecutor", Forgetful)
    monkeypatch.setattr(Forgetful, "lost_before", [1, 5, 6])
    made = sweep(tmp_path, checkpoint_every=every)
    seen = []
    result = made.run(lambda generation, table: seen.append(generation))
    assert not Forgetful.lost_before
    assert_same_tables(result, expected)
    assert seen == list(range(1, GENERATIONS + 1))  # each was told once
    told = [e.what for e in made.events if isinstance(e, events.Note)]
    assert len(told) == 3
    assert all("nobody holds" in what for what in told)


class Crowded(executors.FleetExecutor):
    """Whose worker has room for one of its shards."""

    def prepare(self, layouts, needed):
        made = super().prepare(layouts, needed)
        host = self._processes._worker._host
        host.spec = dataclasses.replace(host.spec, states=1)
        return made


@pytest.mark.slow
def test_states_without_room_come_back_from_their_checkpoints(tmp_path, reference, monkeypatch):
    """Before the journal names them, and where they were not to be written."""
    monkeypatch.setattr(executors, "FleetExecutor", Crowded)
    assert_same_tables(sweep(tmp_path, checkpoint_every=3).run(), reference)


class Held(Storage):
    """A storage whose disk waits for a word."""

    def __init__(self, path):
        super().__init__(path)
        self.word, self.asked = threading.Event(), threading.Semaphore(0)

    def save_checkpoint(self, *args):
        self.asked.release()
        self.word.wait()
        return super().save_checkpoint(*args)


def test_one_state_of_a_shard_is_in_flight_at_most(tmp_path):
    numbers, storage = Incarnations(tmp_path), Held(tmp_path)
    one = numbers.new()
    numbers.own({0: one, 1: one})
    writer, state = Writer(storage), {"x": np.arange(10)}
    writer.start(0, 3, one, state, {})
    writer.start(1, 3, one, state, {})  # of another shard: beside it
    assert [storage.asked.acquire(timeout=60) for _ in range(2)] == [True, True]
    assert writer.newest(0) == ()
    second = threading.Thread(target=writer.start, args=(0, 4, one, state, {}))
    second.start()
    assert not storage.asked.acquire(timeout=0.05)
    storage.word.set()
    second.join()
    assert [made.generation for made in writer.wait(0)] == [3, 4]
    assert storage.load(writer.wait(1)[0].saved)[0]["x"].tolist() == list(range(10))
    writer.forget(0, 4)  # which is computed again
    assert [made.generation for made in writer.wait(0)] == [3]
    writer.close()


def test_old_checkpoints_are_removed_and_no_link_is_followed(tmp_path):
    storage, outside = Storage(tmp_path / "run"), tmp_path / "outside"
    outside.mkdir()
    (outside / "thesis").write_text("important")
    kept, other, new = (
        storage.save_checkpoint(generation, shard, 1, {"x": np.zeros(3)}, {})
        for generation, shard in ((1, 0), (1, 1), (4, 0))
    )
    root = tmp_path / "run/checkpoints"
    (root / "000002").symlink_to(outside)
    (root / "000001/link").symlink_to(outside / "thesis")
    (root / "000003").mkdir()
    storage.prune(4, {kept.file})
    assert [storage.has(saved) for saved in (kept, other, new)] == [True, False, True]
    assert (outside / "thesis").read_text() == "important"
    assert sorted(path.name for path in root.iterdir()) == ["000001", "000002", "000004"]
    root.rename(tmp_path / "elsewhere")
    root.symlink_to(tmp_path / "elsewhere")
    storage.prune(9, set())
    assert storage.has(new)
