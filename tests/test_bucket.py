"""Storages in an object store, in this process's own memory: what `test_s3` proves on a server."""

import functools
import itertools
import json
import re
import sys
import threading

import fsspec
import jax
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from typer.testing import CliRunner

from gradhpo import Problem, bucket, bucket_lock, checkpoints, objects, solve
from gradhpo.bucket import Bucket
from gradhpo.checkpoints import DamagedFile, Saved
from gradhpo.cluster import StorageInUse, Sweep, SweepError, SweepResult, cli, events, shard
from gradhpo.cluster.check import check_storage
from gradhpo.cluster.journal import Journal
from gradhpo.cluster.storage import Storage
from gradhpo.files import Unreachable
from gradhpo.lock import ALIVE, LOCK
from gradhpo.objects import Objects
from tests import file_operations
from tests.quick import slow_but
from tests.small import BATCH, build, start, train_loss, val_loss
from tests.sweep_problems import problem
from tests.sweeps import assert_same_tables, sweep

TEXTS = ("manifest.json", "journal.jsonl")


@pytest.fixture
def address(request):
    """An address of this test's own, with nothing below it."""
    yield f"memory://{re.sub('[^a-z_.]', '-', request.node.name)}/run"
    MemoryFileSystem.store.clear()


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The small sweep, undisturbed, in a folder, with steps in NumPy."""
    with file_operations.numpy_steps():
        return sweep(tmp_path_factory.mktemp("expected"), generations=4).run()


@pytest.fixture
def reference(expected, numpy_steps):
    """The same, and steps in NumPy in this test too."""
    return expected


def stored(address):
    """Every object below an address, with its content."""
    root = address.removeprefix("memory:/")
    store = MemoryFileSystem.store
    return {p.removeprefix(root): f.getvalue() for p, f in store.items() if p.startswith(root)}


# --- a sweep, through every door ----------------------------------------------------------------


def test_a_sweep_is_the_one_of_a_folder_through_every_door(address, reference):
    result = sweep(address, generations=4).run()
    assert_same_tables(result, reference)
    assert_same_tables(SweepResult.from_storage(address), reference)
    assert all(finding.whole for finding in check_storage(address))
    kept = {path.split("/")[2] for path in stored(address) if path.startswith("/checkpoints")}
    best = f"{result.best.generation:06d}"
    assert kept == {"000002", "000003", best}  # older ones are pruned
    run = CliRunner()
    said = run.invoke(cli.app, ["status", address])
    assert f"{address}: complete, 4 of 4 generations" in said.output
    assert f"Best: trial {result.best.number}" in run.invoke(cli.app, ["best", address]).output
    assert "4 generations" in run.invoke(cli.app, ["check", address]).output
    more = run.invoke(cli.app, ["resume", address, "--generations", "5"])
    assert more.exit_code == 0, more.output
    assert SweepResult.from_storage(f"{address}/").generations == 5
    again = Sweep.from_storage(address, generations=6, progress=False)
    assert again.storage == address
    assert again.run().generations == 6


def test_an_allowed_change_is_written_down(address, numpy_steps):
    sweep(address, generations=2).run()
    other = problem.__wrapped__()
    changed = {"generations": 3, "optimizer": "tests.sweep_problems:optimizer", "problem": other}
    with pytest.raises(SweepError, match="holds another run: its problem"):
        sweep(address, **changed).run()
    result = sweep(address, **changed).run(allow_changed=("code",))
    assert [tuple(change) for change in result.changes] == [(2, "code")]


def test_a_damaged_object_is_gone_back_from_and_named(address, reference):
    sweep(address, generations=3).run()
    entry = Journal(address).last[-1]
    file = entry["checkpoints"][1].file
    stored = MemoryFileSystem.store[f"{address.removeprefix('memory:/')}/{file}"]
    content = bytearray(stored.getvalue())
    content[len(content) // 2] ^= 1
    fsspec.filesystem("memory").pipe_file(f"{address}/{file}", bytes(content))
    with pytest.raises(DamagedFile, match="checksum"):
        checkpoints.load(address, entry["checkpoints"][1])
    made = sweep(address, generations=4)
    assert_same_tables(made.run(), reference)
    assert [e.generation for e in made.events if isinstance(e, events.Damaged)] == [2]


@pytest.mark.parametrize("text", ["manifest.json", "programs.json", "journal.jsonl"])
def test_a_damaged_text_is_made_again_or_not_used(address, reference, text):
    sweep(address, generations=3).run()
    store = Bucket(address)
    number = store.last(text)
    content = store.get(text, number)
    fsspec.filesystem("memory").pipe_file(f"{address}/{text}/{number:06d}", content[:-9])
    made = sweep(address, generations=4)
    assert_same_tables(made.run(), reference)
    assert any(isinstance(e, events.Damaged | events.Repaired) for e in made.events)


def test_what_a_sweep_cannot_be_kept_in_is_refused_by_name(address, tmp_path, monkeypatch):
    for executor in ("processes", "ray"):
        with pytest.raises(ValueError, match=r"'memory://.*dies with it.*executor=\"local\""):
            sweep(address, executor=executor)
    with pytest.raises(SweepError, match=f"no sweep in '{address}'"):
        Sweep.from_storage(address)
    put = MemoryFileSystem.pipe_file
    monkeypatch.setattr(
        MemoryFileSystem, "pipe_file", lambda self, path, value, mode="": put(self, path, value)
    )
    with pytest.raises(OSError, match=f"storage '{address}' .*does not obey conditional creates"):
        sweep(address).run()
    assert stored(address) == {}


def test_what_is_not_installed_is_named(address, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ImportError, match=r"'gs://bucket/run' needs gcsfs: pip install gcsfs"):
        sweep("gs://bucket/run").run()
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(ImportError, match=r"needs fsspec: pip install gradhpo\[cluster\]"):
        Bucket(address)


def test_one_run_goes_on_from_a_store(address):
    made = functools.partial(
        solve, Problem(start, train_loss, val_loss, batch=lambda key: (BATCH, BATCH)),
        build("one-step", outer=True)[0], key=jax.random.key(0),
    )  # fmt: skip
    expected = made(6)
    made(4, checkpoint=address)
    store = Bucket(address)
    assert len(store.names()) == 1
    found = made(6, checkpoint=address)
    jax.tree.map(np.testing.assert_array_equal, found.state.params, expected.state.params)
    newest = max(store.names())
    fsspec.filesystem("memory").pipe_file(f"{address}/{newest}", b"damaged")
    with pytest.warns(RuntimeWarning, match="is damaged, and goes on from 00000001-step-4"):
        found = made(6, checkpoint=address)
    jax.tree.map(np.testing.assert_array_equal, found.state.params, expected.state.params)
    held = store.lock("checkpoint", "run", ())
    with pytest.raises(StorageInUse, match=f"checkpoint '{address}' is in use by another run"):
        made(7, checkpoint=address)
    held.release()


@pytest.mark.parametrize(
    ("silent", "told", "newest"),
    [(lambda steps, listing: steps >= 4, "step [468] could not be saved", "00000001-step-2"),
     (lambda steps, listing: (steps, listing) == (6, 2),
      "checkpoints before step 6 could not be removed", "00000004-step-8")],
)  # fmt: skip
def test_one_run_goes_on_where_a_store_does_not_answer(address, monkeypatch, silent, told, newest):
    ls, done, listings = MemoryFileSystem.ls, [0], []

    def unanswered(self, *args, **settings):
        listings.append(done[-1])
        if silent(done[-1], listings.count(done[-1])):  # a checkpoint is written between two
            raise TimeoutError("no answer")
        return ls(self, *args, **settings)

    monkeypatch.setattr(MemoryFileSystem, "ls", unanswered)
    problem = Problem(start, train_loss, val_loss, batch=lambda key: (BATCH, BATCH))
    with pytest.warns(RuntimeWarning, match=f"{told}, and the run goes on: no answer"):
        found = solve(
            problem, build("one-step", outer=True)[0], 8, jax.random.key(0), checkpoint=address,
            every=2, eval_every=2, callback=lambda steps, state, evals: done.append(steps),
        )  # fmt: skip
    monkeypatch.undo()
    assert found.steps == 8
    assert max(Bucket(address).names()).startswith(newest)


def test_a_bucket_of_something_else_is_refused(address):
    fsspec.filesystem("memory").pipe_file(f"{address}/thesis.tex", b"important")
    with pytest.raises(SweepError, match=r"holds no sweep \(it has 'thesis.tex'\)"):
        sweep(address).run()
    assert list(stored(address)) == ["/thesis.tex"]


# --- a driver that dies -------------------------------------------------------------------------


class Died(BaseException):
    """What a process that was killed does not do any more."""


def dies_at(monkeypatch, number, done):
    """Let the request of this number, and all that come later, never be sent, or not answered."""
    requests = itertools.count(0)

    def dangerous(function):
        def request(self, *args, **kwargs):
            now = next(requests)
            if now == number and done:
                function(self, *args, **kwargs)
            if now >= number:
                raise Died
            return function(self, *args, **kwargs)

        return request

    for name in ("pipe_file", "rm"):
        monkeypatch.setattr(MemoryFileSystem, name, dangerous(getattr(MemoryFileSystem, name)))


def lives(address, every, number=None, done=False):
    """Run the sweep with a step in NumPy; return what it found, or None if it died."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard, "Variant", file_operations.Variant)
        if number is not None:
            dies_at(patch, number, done)
        try:
            return file_operations.run(address, every)
        except Died:
            return None


@pytest.mark.parametrize(("every", "step"), slow_but([(1, 5), (3, 7)]))
def test_a_death_at_any_request_changes_no_bit(tmp_path, every, step):
    expected = lives(tmp_path, every)
    for number in itertools.count(0, step):
        deaths = 0
        for done in (False, True):
            where = f"memory://kills/{every}/{number}/{done}"
            if (found := lives(where, every, number, done)) is None:
                deaths += 1
                lives(where, every, 5 * number % 23, not done)
                found = lives(where, every)
            assert found == expected, f"another result after a death at {number}"
        if not deaths:  # it has fewer requests
            break
    assert number > 30
    MemoryFileSystem.store.clear()


# --- the lock -----------------------------------------------------------------------------------


@pytest.fixture
def strangers(monkeypatch):
    """Every lock is another machine's; they are looked on at for a moment."""
    monkeypatch.setattr(bucket_lock, "_is_mine", lambda about: False)
    monkeypatch.setattr(bucket_lock, "_is_dead", lambda about: False)
    monkeypatch.setattr(bucket_lock, "BEAT", 0.02)
    monkeypatch.setattr(bucket_lock, "PATIENCE", 0.3)


def freeze(lock):
    """Let a holder give no sign of life."""
    lock._end.set()
    lock._thread.join()


def test_a_holder_that_is_heard_of_is_left_alone(address, strangers, monkeypatch):
    monkeypatch.setattr(bucket_lock, "PATIENCE", 60)
    first, said = Bucket(address), []
    held = first.lock("storage", "sweep", TEXTS)
    with pytest.raises(StorageInUse, match=r"storage .* is in use by another sweep: process"):
        Bucket(address).lock("storage", "sweep", TEXTS)
    with pytest.raises(StorageInUse, match="is in use"):
        Bucket(address).lock("storage", "sweep", TEXTS, tell=said.append)
    assert re.search(r", heard of \d+ s ago$", first.holder())
    held.release()
    held.release()
    assert first.holder() is None
    again = Bucket(address).lock("storage", "sweep", TEXTS)
    assert (again.number, again.took_over) == (2, None)
    again.release()


def test_a_holder_that_was_frozen_can_change_nothing(address, strangers):
    first, second, said = Bucket(address), Bucket(address), []
    frozen = first.lock("storage", "sweep", TEXTS)
    first.append("journal.jsonl", b"1\n")
    freeze(frozen)
    taken = second.lock("storage", "sweep", TEXTS, tell=said.append)
    assert "waiting" in said[0]
    assert taken.took_over.startswith("process ")
    signs = f"/{ALIVE}/{taken.number:06d}"
    before = {**stored(address), signs: None}
    for change in (
        lambda: first.append("journal.jsonl", b"2\n"),
        lambda: first.replace("manifest.json", b"{}\n"),
        first.check_held,
    ):
        with pytest.raises(StorageInUse, match="was taken over from this sweep"):
            change()
    assert {**stored(address), signs: None} == before
    second.append("journal.jsonl", b"2 of the second\n")
    assert second.read("journal.jsonl") == b"1\n2 of the second\n"
    frozen.release()
    assert second.holder() is not None
    taken.release()


def test_a_sweep_takes_a_frozen_ones_storage_over_and_says_so(address, strangers, monkeypatch):
    monkeypatch.setattr(shard, "Variant", file_operations.Variant)
    frozen = Bucket(address).lock("storage", "sweep", TEXTS)
    freeze(frozen)
    made = sweep(address, generations=2)
    assert made.run().generations == 2
    told = [event.what for event in made.events if isinstance(event, events.Note)]
    assert "of which nothing was heard" in told[0]
    assert told[1].startswith("taken over from process")
    assert frozen.lost()


def test_of_a_holder_elsewhere_is_told_how_long_it_was_silent(address, strangers, monkeypatch):
    monkeypatch.setattr(shard, "Variant", file_operations.Variant)
    sweep(address, generations=1).run()
    store = Bucket(address)
    frozen = store.lock("storage", "sweep", TEXTS)
    freeze(frozen)
    sign = json.loads(store.get(ALIVE, frozen.number))
    store.put(ALIVE, frozen.number, json.dumps({**sign, "time": sign["time"] - 1000}).encode())
    assert re.search(r"process \d+ on host .*, not heard of for 1\d\d\d s$", store.holder())
    held, taken, *rest = (finding.text for finding in check_storage(address))
    assert re.search(r"not heard of for .* looking for signs of life", held)
    assert re.search(r"^taken over from process \d+ on host", taken)
    assert "1 generations" in rest[-1]
    assert frozen.lost()
    assert store.holder() is None


def test_check_leaves_a_sweep_alone_whose_driver_is_heard_of(address, strangers, monkeypatch):
    monkeypatch.setattr(bucket_lock, "PATIENCE", 60)
    monkeypatch.setattr(shard, "Variant", file_operations.Variant)
    sweep(address, generations=1).run()
    held = Bucket(address).lock("storage", "sweep", TEXTS)
    said = [finding.text for finding in check_storage(address)]
    assert ", heard of 0 s ago" in said[0]
    assert said[1].endswith("Nothing is repaired")
    assert not held.lost()
    held.release()


def test_of_several_that_come_at_once_one_gets_it(address, strangers):
    together, won, refused = threading.Barrier(8), [], []

    def come():
        store = Bucket(address)
        together.wait()
        try:
            won.append(store.lock("storage", "sweep", TEXTS))
        except StorageInUse as error:
            refused.append(error)

    threads = [threading.Thread(target=come) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(won), len(refused)) == (1, 7)
    won[0].release()


def test_a_second_sweep_of_this_process_is_refused_at_once(address):
    held = Storage(address).lock()
    before = stored(address)
    with pytest.raises(StorageInUse, match="in use by another sweep"):
        sweep(address).run()
    held.release()
    assert {p for p in stored(address) if p not in before} == set()


def test_a_released_lock_says_nothing_that_a_clock_must_agree_on(address):
    held = Storage(address).lock()
    held.release()
    store = Bucket(address)
    about = json.loads(store.get(LOCK, 1))
    assert {"host", "pid", "machine", "started", "token"} <= set(about)
    assert store.get(ALIVE, 1) == bucket_lock.RELEASED


# --- texts and objects --------------------------------------------------------------------------


def test_a_text_is_read_from_the_last_time_that_it_was_put_whole(address):
    store = Bucket(address)
    assert not store.has("a.jsonl")
    with pytest.raises(FileNotFoundError):
        store.read("a.jsonl")
    expected = b""
    for number in range(40):
        if number % 13 == 7:
            store.replace("a.jsonl", expected)
        store.append("a.jsonl", f"line {number}\n".encode())
        expected += f"line {number}\n".encode()
        assert store.read("a.jsonl") == expected


def test_a_create_whose_answer_was_lost_is_known_as_ones_own(address, monkeypatch):
    create, lost = MemoryFileSystem.pipe_file, iter([True])

    def loses(self, path, value, mode="overwrite"):
        create(self, path, value, mode)
        if mode == "create" and next(lost, False):
            raise ConnectionResetError("the answer is lost")

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", loses)
    store = Bucket(address)
    assert store.create("a", 1, b"mine")
    assert not store.create("a", 1, b"another's")
    assert store.get("a", 1) == b"mine"


def fails(error):
    """Return a function that raises it."""

    def request(self, *args, **kwargs):
        raise error

    return request


def test_a_create_that_cannot_be_read_back_says_so(address, monkeypatch):
    monkeypatch.setattr(MemoryFileSystem, "pipe_file", fails(FileExistsError("conditions")))
    monkeypatch.setattr(MemoryFileSystem, "cat_file", fails(PermissionError("Forbidden")))
    with pytest.raises(Unreachable, match="conditions; and reading it back: Forbidden"):
        Bucket(address).create("a", 1, b"mine")
    monkeypatch.setattr(MemoryFileSystem, "cat_file", fails(FileNotFoundError("a")))
    with pytest.raises(Unreachable, match="conditions: 'memory"):
        Bucket(address).create("a", 1, b"mine")


def test_a_create_is_not_tried_again_for_ever(address, monkeypatch):
    sent = []

    def hangs(self, path, *args, **kwargs):
        sent.append(path)
        raise TimeoutError("no answer")

    monkeypatch.setattr(objects, "AGAIN", -1)
    monkeypatch.setattr(MemoryFileSystem, "pipe_file", hangs)
    monkeypatch.setattr(MemoryFileSystem, "cat_file", hangs)
    with pytest.raises(Unreachable, match="no answer"):
        Bucket(address).create("a", 1, b"mine")
    assert len(sent) == 1


def test_a_request_without_an_answer_is_told_while_it_is_waited_for(address, monkeypatch):
    told = threading.Event()
    monkeypatch.setattr(objects, "SLOW", 0.01)
    monkeypatch.setattr(objects.warnings, "warn", lambda *about: (said.append(about), told.set()))
    monkeypatch.setattr(MemoryFileSystem, "ls", lambda *args, **kwargs: told.wait(30) and [])
    said = []
    assert Bucket(address).names() == []
    assert re.match(f"no answer from '{address}' since .*: waiting", said[0][0])


def test_an_object_that_cannot_be_asked_for_is_not_taken_for_gone(address, monkeypatch):
    store = Bucket(address)
    saved = checkpoints.save(store, "tables/a", {"x": np.zeros(3)}, {})
    assert store.exists(saved.file)
    assert not store.exists("tables/b")
    assert not store.exists("tables")
    monkeypatch.setattr(MemoryFileSystem, "info", fails(PermissionError("Forbidden")))
    with pytest.raises(Unreachable, match="Forbidden"):
        store.exists(saved.file)


def test_a_large_object_is_read_in_large_pieces(address, monkeypatch):
    store = Bucket(address)
    saved = checkpoints.save(store, "tables/a", {"x": np.arange(2_500_000)}, {})
    asked, read = [], MemoryFileSystem.cat_file
    monkeypatch.setattr(
        MemoryFileSystem, "cat_file", lambda *args, **k: asked.append(args) or read(*args, **k)
    )
    assert checkpoints.checksum(store, saved.file) == saved.sha256
    assert len(asked) == 3
    loaded = checkpoints.load(store, saved)[0]["x"]
    np.testing.assert_array_equal(loaded, np.arange(2_500_000))
    assert len(asked) == 6


def test_a_client_that_failed_is_made_anew(address, monkeypatch):
    """It keeps the credentials, or that there were none."""
    store = Objects(address)
    first = store._fs
    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "ls", fails(RuntimeError("no credentials")))
        with pytest.raises(Unreachable):
            store.listed("", "file")
    assert store._fs is not first
    assert Objects(address)._fs is not store._fs


def test_a_probe_that_another_driver_removes_is_made_once_more(address, monkeypatch):
    create, removed = Objects.create, iter([True])

    def disturbed(self, name, content):
        made = create(self, name, content)
        if next(removed, False):
            self.remove([name])
        return made

    monkeypatch.setattr(Objects, "create", disturbed)
    Bucket(address).probe(".probe")
    assert stored(address) == {}


def test_a_draft_that_cannot_be_discarded_is_never_made_an_object(address, monkeypatch):
    class Draft:
        closed = False
        discard = fails(ConnectionResetError("gone"))

    monkeypatch.setattr(MemoryFileSystem, "open", lambda *args, **kwargs: Draft)
    with pytest.raises(Unreachable):
        Objects(address).send("a", fails(OSError("in the middle")))
    assert Draft.closed


def test_errors_of_any_client_are_of_the_system_and_have_a_text(address, monkeypatch):
    class OddError(Exception):
        pass

    monkeypatch.setattr(MemoryFileSystem, "ls", fails(OddError("no credentials\nand more")))
    with pytest.raises(OSError, match=rf"OddError: no credentials: '{address}'$") as caught:
        Bucket(address).names()
    assert caught.value.strerror == "OddError: no credentials"
    monkeypatch.setattr(MemoryFileSystem, "ls", fails(OddError("failed:\nthe name\nat x")))
    with pytest.raises(Unreachable, match="OddError: failed: the name: "):
        Bucket(address).names()
    monkeypatch.setattr(MemoryFileSystem, "ls", fails(TimeoutError()))
    with pytest.raises(Unreachable, match=r"no answer in time \(.*\): 'memory"):
        Bucket(address).names()
    with pytest.raises(FileNotFoundError, match="No such file or directory"):
        Objects(address).get("nothing")


def test_a_store_that_does_not_answer_is_no_damage(address, numpy_steps, monkeypatch):
    """No generation is dropped for it."""
    sweep(address, generations=2).run()
    before, read = stored(address), MemoryFileSystem.cat_file

    def silent(self, path, *args, **kwargs):
        if path.endswith(checkpoints.ENDING):
            raise TimeoutError("no answer")
        return read(self, path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "cat_file", silent)
        with pytest.raises(OSError, match=f"no answer: '.*{address.removeprefix('memory:/')}"):
            sweep(address, generations=3).run()
        with pytest.raises(Unreachable, match="no answer"):
            list(check_storage(address))
    assert Journal(address).generation == 1
    assert {p for p in before if "/checkpoints/" in p} <= set(stored(address))
    assert sweep(address, generations=3).run().generations == 3
    with pytest.raises(DamagedFile, match=r"x: cannot be read"):
        checkpoints.load(address, Saved("x", ""))


def test_a_large_content_is_not_kept_twice():
    draft = bucket._Draft(100)
    draft.write(np.zeros(60, np.uint8))
    assert draft.whole
    draft.write(memoryview(np.zeros(6)).cast("B"))
    assert not draft.whole
    assert draft.getvalue() == b""
