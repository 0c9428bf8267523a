"""Storages that a person meets: left by a kill, damaged, with other data, from a stranger."""

import dataclasses
import inspect
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import gradhpo
from gradhpo.cluster import (
    PBT,
    RandomSearch,
    SearchSpace,
    SuccessiveHalving,
    Sweep,
    SweepError,
    SweepResult,
    events,
    shard,
    variant,
)
from gradhpo.cluster.check import check_storage
from gradhpo.cluster.journal import Journal
from gradhpo.cluster.printable import printable
from gradhpo.cluster.settings import Identity, Place, below, folder_of, names
from tests import file_operations, sweep_problems
from tests.sweeps import SPACE, assert_same_tables, sweep

ROOT = Path(__file__).parent.parent
GENERATIONS = 4


class OnOthers(file_operations.Variant):
    """A step in NumPy on other data."""

    data = "another checksum"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The storage of a small sweep after three of its four generations, and the whole one's result.

    To be copied, not used.
    """
    storage = tmp_path_factory.mktemp("begun")
    with file_operations.numpy_steps():
        sweep(storage, generations=3).run()
        return storage, sweep(tmp_path_factory.mktemp("reference"), generations=GENERATIONS).run()


@pytest.fixture
def begun(undisturbed):
    """That storage itself."""
    return undisturbed[0]


@pytest.fixture
def storage(begun, numpy_steps, tmp_path):
    """One of this test's own."""
    return shutil.copytree(begun, tmp_path / "sweep")


@pytest.fixture
def reference(undisturbed):
    """The same sweep, undisturbed."""
    return undisturbed[1]


def told(made, kind):
    return [event for event in made.events if isinstance(event, kind)]


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- from a stranger ----------------------------------------------------------------------------


def test_a_result_is_read_without_running_what_its_storage_names(storage, tmp_path):
    ran = tmp_path / "ran"
    edit(
        storage / "manifest.json",
        scheduler={"function": "os:system", "command": f"touch {ran}"},
        data={"reference": "tests.breaks_on_import:data"},
        problem={"reference": "tests.breaks_on_import:problem"},
        sys_path=[str(tmp_path / "evil")],
    )
    before = list(sys.path)
    result = SweepResult.from_storage(storage)
    assert np.isfinite(result.best.score)
    assert result.best.lineage
    assert Sweep.from_storage(storage).result().best.score == result.best.score
    assert not ran.exists()
    assert sys.path == before
    assert "tests.breaks_on_import" not in sys.modules


@pytest.mark.slow
def test_a_result_made_from_objects_is_read_too(tmp_path):
    made = sweep(tmp_path, generations=1, problem=sweep_problems.problem())
    score = made.run().best.score
    found = SweepResult.from_storage(tmp_path).best
    assert found.score == score
    with pytest.raises(SweepError, match="gave problem as an object"):
        _ = found.state


def test_resuming_says_what_it_imports_before_it_does(storage, capfd, monkeypatch):
    made = Sweep.from_storage(storage, generations=GENERATIONS)
    edit(storage / "manifest.json", problem={"reference": "tests.breaks_on_import:problem"})
    broken = Sweep.from_storage(storage, generations=GENERATIONS)
    monkeypatch.setattr(shard, "Variant", variant.Variant)
    with pytest.raises(ImportError, match="broken on purpose"):
        broken.run()
    monkeypatch.setattr(shard, "Variant", file_operations.Variant)
    assert "importing tests.breaks_on_import:problem" in capfd.readouterr().err
    edit(storage / "manifest.json", problem={"reference": "tests.sweep_problems:problem"})
    made.run()
    assert told(made, events.Importing)[0].references == [
        "tests.sweep_problems:problem",
        "tests.sweep_problems:optimizer",
    ]


def test_escapes_of_a_terminal_are_shown_and_not_sent():
    text = "a\x1b[2Jb\rc\x07\u202ed\nx"
    assert printable(text) == r"a\x1b[2Jb\rc\x07\u202ed\nx"
    assert printable(text, lines=True).endswith("d\nx")
    assert printable("größer → 3") == "größer → 3"


# --- changes on purpose -------------------------------------------------------------------------


def with_data(shift):
    made = sweep_problems.problem()
    rows = np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32) + 1 + shift
    return dataclasses.replace(made, data=lambda key: jnp.asarray(rows))


@pytest.mark.slow
def test_other_data_are_refused_by_name_and_can_be_allowed(tmp_path):
    sweep(tmp_path, problem=with_data(0), generations=1).run()
    changed = sweep(tmp_path, problem=with_data(1), generations=2)
    with pytest.raises(SweepError, match=r"the data are others.*allow_changed=\(\"data\",\)"):
        changed.run()
    with pytest.raises(SweepError, match="the data are others"):
        changed.run(allow_changed=("code",))
    result = changed.run(allow_changed=("data",))
    assert result.changes == [(1, "data")]
    assert told(changed, events.Changed) == [events.Changed("data", 1)]
    again = sweep(tmp_path, problem=with_data(1), generations=3).run()
    assert again.changes == [(1, "data")]


@pytest.mark.slow
def test_other_code_can_be_allowed(tmp_path):
    made = sweep_problems.problem()
    sweep(tmp_path, problem=made, generations=1).run()
    other = dataclasses.replace(made, val_loss=lambda w, lam, x: 2 * made.val_loss(w, lam, x))
    with pytest.raises(SweepError, match=r"computes something else.*allow_changed=\(\"code\",\)"):
        sweep(tmp_path, problem=other, generations=2).run()
    assert sweep(tmp_path, problem=made, generations=2).run().generations == 2
    result = sweep(tmp_path, problem=other, generations=3).run(allow_changed=("code",))
    assert result.changes == [(2, "code")]


@pytest.mark.parametrize("where", ["manifest.json", "programs.json"])
def test_a_storage_of_another_version_goes_on(storage, reference, where):
    """That computes otherwise, as far as its programs tell; as with another JAX."""
    programs = json.loads((storage / "programs.json").read_text())
    for entry in programs:
        entry["key"]["computation"] = "another"
    if where == "manifest.json":  # as versions before 0.3 left it
        del programs[0]["gradhpo"]
        about = json.loads((storage / where).read_text())
        (storage / where).write_text(json.dumps(about | {"gradhpo": "0.2.0"}))
    else:
        programs[0]["gradhpo"] = "0.2.0"
    (storage / "programs.json").write_text(json.dumps(programs))
    made = sweep(storage, generations=GENERATIONS)
    assert_same_tables(made.run(), reference)
    notes = [event.what for event in told(made, events.Note)]
    (note,) = [text for text in notes if "gradhpo was 0.2.0 and is" in text]
    assert "cannot be told" in note
    assert made.run().changes == []


def test_a_storage_without_the_checksum_goes_on(storage, reference):
    path = storage / "programs.json"
    entries = json.loads(path.read_text())
    path.write_text(json.dumps([{k: entry[k] for k in ("batching", "key")} for entry in entries]))
    made = sweep(storage, generations=GENERATIONS)
    assert_same_tables(made.run(), reference)
    assert any("no checksum" in event.what for event in told(made, events.Note))
    assert json.loads(path.read_text())[0]["data"] == entries[0]["data"]


@pytest.mark.parametrize("given", ["data", ("everything",)])
def test_what_may_change_is_checked(tmp_path, given):
    with pytest.raises(ValueError, match="allow_changed must be a tuple of names"):
        sweep(tmp_path / "new").run(allow_changed=given)
    assert not (tmp_path / "new").exists()


# --- damage -------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["manifest.json", "programs.json"])
@pytest.mark.parametrize("content", [None, "[]", '{"a'])
def test_a_description_that_can_be_made_again_is(storage, reference, file, content):
    (storage / file).unlink()
    if content is not None:
        (storage / file).write_text(content)
    made = sweep(storage, generations=GENERATIONS)
    assert_same_tables(made.run(), reference)
    assert file in told(made, events.Repaired)[0].what
    again = sweep(storage, generations=GENERATIONS + 1)
    again.run()
    assert not told(again, events.Repaired)


@pytest.mark.parametrize("changes", [{"seed": 3}, {"scheduler": PBT(quantile=0.2)}])
def test_a_lost_manifest_is_not_made_again_for_another_sweep(storage, changes):
    (storage / "manifest.json").unlink()
    with pytest.raises(SweepError, match="these are others"):
        sweep(storage, generations=GENERATIONS, **changes).run()
    assert not (storage / "manifest.json").exists()


def test_both_descriptions_lost_is_the_end(storage):
    (storage / "manifest.json").unlink()
    (storage / "programs.json").unlink()
    with pytest.raises(SweepError, match=r"programs.json.*missing or damaged"):
        sweep(storage, generations=GENERATIONS).run()


@pytest.mark.parametrize("generation", [0, 1, 2])
def test_a_damaged_table_costs_its_own_numbers_alone(storage, begun, generation):
    whole = SweepResult.from_storage(begun).best
    next((storage / "tables").glob(f"{generation:06d}-*")).unlink()
    best = SweepResult.from_storage(storage).best
    assert (best.number, best.score, best.lineage) == (whole.number, whole.score, whole.lineage)
    assert best.metrics["val_loss"] == best.score
    with pytest.raises(gradhpo.cluster.DamagedFile, match=str(storage)):
        _ = SweepResult.from_storage(storage).table


@pytest.mark.parametrize("file", ["manifest.json", "programs.json"])
def test_a_kill_at_a_first_rename_costs_nothing(tmp_path, numpy_steps, file):
    (tmp_path / "driver.lock").touch()
    if file != "manifest.json":
        sweep(tmp_path, generations=1)
    (tmp_path / f"{file}.123.tmp").write_text("{")
    (tmp_path / "notes.tmp").write_text("mine")
    with pytest.raises(SweepError, match=r"holds no sweep.*notes.tmp"):
        sweep(tmp_path, generations=1).run()
    (tmp_path / "notes.tmp").unlink()
    assert sweep(tmp_path, generations=1).run().generations == 1
    assert not list(tmp_path.glob("*.tmp"))


def test_a_whole_storage_is_said_to_be(storage):
    before = (storage / "journal.jsonl").read_bytes()
    (finding,) = check_storage(storage)
    assert finding.whole
    assert "3 generations" in finding.text
    assert (storage / "journal.jsonl").read_bytes() == before


@pytest.mark.parametrize("kind", ["checkpoints/000002/shard-0001", "tables/000002"])
def test_check_drops_a_last_generation_that_is_damaged(storage, reference, kind):
    next((storage / kind).parent.glob(f"{Path(kind).name}*")).unlink()
    (storage / "programs.json").write_text("[{")
    found = list(check_storage(storage))
    assert any("made again from manifest.json" in finding.text for finding in found)
    assert any("generation 3 is dropped" in finding.text for finding in found)
    assert all(finding.whole or "winner" in finding.text for finding in found)
    made = sweep(storage, generations=GENERATIONS)
    assert_same_tables(made.run(), reference)
    assert not told(made, events.Damaged)


def test_check_names_what_it_cannot_repair(storage):
    for generation in ("000001", "000002"):
        next((storage / "checkpoints" / generation).glob("shard-0002*")).unlink()
    next((storage / "tables").glob("000000*")).unlink()
    left = [finding.text for finding in check_storage(storage) if not finding.whole]
    assert any("tables/000000" in text and "the sweep goes on" in text for text in left)
    assert any("nor the one before is whole" in text for text in left)
    with pytest.raises(SweepError, match="there is no sweep"):
        list(check_storage(storage / "nothing"))


# --- names and numbers --------------------------------------------------------------------------


def test_where_a_storage_is(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert sweep("~/runs/a").storage == tmp_path / "runs/a"
    assert sweep(f"file://{tmp_path}/my%20run").storage == tmp_path / "my run"
    for address, what in (
        ("ftp://host/run", "be a folder"),
        ("file://host/run", "be a folder"),
        ("s3://bucket", "name a folder in a bucket"),
        ("s3://bucket/run?versionId=1", r"be an address without any of \['\?'\]"),
        (Path("s3://b/c"), ".*a text, as a Path loses a slash"),
        ("s3:bucket/run", 'be "protocol://bucket/path"'),
        ("S3:/bucket/run", 'be "protocol://bucket/path"'),
        ("simplecache::s3://bucket/run", 'be "protocol://bucket/path"'),
    ):
        with pytest.raises(ValueError, match=f"storage must {what}"):
            sweep(address)
    for address in ("s3://bucket/run", "s3://bucket//run/"):
        assert folder_of(address) == "s3://bucket/run"
    assert below("s3://bucket/run", "a", "b") == "s3://bucket/run/a/b"
    for path in ("C:/runs", "c:runs", "run:3", "runs/s3:a", "runs/a@b"):
        assert folder_of(path) == Path(path).absolute()


@pytest.mark.parametrize(
    "address",
    [
        "s3://key:hush@bucket/run",
        "s3://KEY:hush/def@bucket/run",
        "http://user:hush/word@host",
        "s3:/KEY:hush@bucket/run",
        "s3:KEY:hush@bucket/run",
        "simplecache::s3://KEY:hush@bucket/run",
        Path("s3://KEY:hush@bucket/run"),
    ],
)
def test_credentials_in_an_address_are_refused_and_not_told(address):
    with pytest.raises(ValueError, match="without credentials") as caught:
        folder_of(address)
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "plain"),
    [
        ("population", np.int64(12), 12),
        ("batching", np.int64(4), 4),
        ("mesh", {"trial": np.int64(1)}, {"trial": 1}),
        ("scheduler", PBT(np.float32(0.25), factors=np.array([0.5, 2])), PBT(0.25, 0.25, (0.5, 2))),
        ("scheduler", SuccessiveHalving(np.int64(2)), SuccessiveHalving(2)),
        ("scheduler", RandomSearch(np.int64(2)), RandomSearch(2)),
        ("space", dataclasses.replace(SPACE, choices={"a": [np.int64(3)]}), None),
        ("space", SearchSpace(lr_hyper=np.float32(0.5)), SearchSpace(lr_hyper=0.5)),
    ],
)
def test_numbers_of_numpy_are_settings_too(tmp_path, name, value, plain):
    made = sweep(tmp_path / "new", **{name: value})
    json.dumps(made.identity.describe())
    if plain is not None:
        assert getattr(made.identity, name) == plain


def test_what_json_cannot_say_is_named(tmp_path):
    with pytest.raises(TypeError, match="runtime_env must be of strings"):
        sweep(tmp_path, runtime_env={"a": object()})
    with pytest.raises(TypeError, match="batching must be of strings"):
        sweep(tmp_path, batching=object())


def test_a_resumed_sweep_remembers_where_it_ran(tmp_path, numpy_steps):
    made = sweep(tmp_path, generations=1, address="10.0.0.1:6379", wait=3)
    made.run()
    again = Sweep.from_storage(tmp_path)
    assert (again.place.address, again.place.wait) == ("10.0.0.1:6379", 3)


def test_the_sweep_and_its_settings_have_the_same_arguments_and_defaults():
    parameters = inspect.signature(Sweep).parameters
    assert sorted(parameters) == sorted(names())
    for kind in (Identity, Place):
        for field in dataclasses.fields(kind):
            if field.default is not dataclasses.MISSING:
                assert parameters[field.name].default == field.default, field.name


# One process imports, and a fork of it, before JAX has started, is killed at each instant.
KILLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
import jax
from tests import file_operations
from tests.sweeps import sweep
file_operations.shard.Variant = file_operations.Variant
jax.process_index, jax.process_count = lambda: 0, lambda: 1  # they would start a backend
def counted(function, storage, left):
    def wrapped(*args, **kwargs):
        if storage in str(args[0]):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return wrapped
for storage, instant in {lives!r}:
    if (child := os.fork()) == 0:
        left = [instant]
        os.replace = counted(os.replace, storage, left)
        os.mkdir = counted(os.mkdir, storage, left)
        sweep(storage, generations=2).run()
        os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, instant
"""


@pytest.mark.slow
def test_a_kill_at_any_of_the_first_file_operations_costs_nothing(tmp_path, numpy_steps):
    """At renames and new folders: a storage that a driver leaves is never refused."""
    expected = sweep(tmp_path / "whole", generations=2).run()
    lives = [(str(tmp_path / f"at-{instant}"), instant) for instant in range(1, 9)]
    code = KILLED.format(root=str(ROOT), lives=lives)
    killed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert killed.returncode == 0, killed.stdout + killed.stderr
    for storage, _ in lives:
        assert_same_tables(sweep(storage, generations=2).run(), expected)


def test_an_allowed_change_begins_where_states_are_known(tmp_path, numpy_steps, monkeypatch):
    """Generations after the last checkpoints are computed again, by the changed program."""
    settings = {"generations": 6, "checkpoint_every": 3}

    def stop(generation, table):
        del table
        if generation == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(tmp_path, **settings).run(stop)
    assert Journal(tmp_path).generation == 3
    monkeypatch.setattr(shard, "Variant", OnOthers)
    changed = sweep(tmp_path, **settings)
    with pytest.raises(SweepError, match="data"):
        changed.run(allow_changed=("code",))
    assert Journal(tmp_path).generation == 3  # what is refused costs nothing
    result = changed.run(allow_changed=("data",))
    assert [tuple(change) for change in result.changes] == [(3, "data")]
