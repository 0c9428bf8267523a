"""Trackers get every number once, whatever fails, is killed or goes on."""

import contextlib
import csv
import functools
import importlib.util
import json
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradhpo
from gradhpo.cluster import events, shard
from gradhpo.cluster.journal import Journal
from gradhpo.observers import CSV, JSONLines, MLflow, OtherRunError, StepsDone, TensorBoard, WandB
from gradhpo.observers.named import named
from tests import file_operations
from tests.small import BATCH, INNER, OUTER, start, train_loss, val_loss
from tests.sweeps import assert_same_tables, sweep, wait_until

PROBLEM = gradhpo.Problem(
    start, train_loss, val_loss, batch=lambda key: (BATCH, BATCH),
    metrics=lambda w, lam: {"norm": abs(w).sum(), "of": {"first": w[0], "all": w}},
)  # fmt: skip
OPTIMIZER = gradhpo.OneStepOptimizer(INNER, OUTER)


def needs(module):
    missing = importlib.util.find_spec(module) is None
    return pytest.mark.skipif(missing, reason=f"{module} is not installed (the extra trackers)")


def solve(steps, key=None, **settings):
    key = jax.random.key(0) if key is None else key
    return gradhpo.solve(PROBLEM, OPTIMIZER, steps, key, progress=False, **settings)


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def read_json(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


class Trackers:
    """The real packages, and what each of them says that it was given: best by generation."""

    def __init__(self, kind, folder):
        self.kind, self.folder = kind, folder

    def make(self):
        if self.kind == "csv":
            return CSV(self.folder / "a.csv")
        if self.kind == "json":
            return JSONLines(self.folder / "a.jsonl")
        if self.kind == "tensorboard":
            return TensorBoard(self.folder / "board")
        if self.kind == "mlflow":
            return MLflow("digits", str(self.folder / "mlruns"))
        return WandB("digits", self.folder, mode="offline", settings={"silent": True})

    def read(self, name):
        """Return the steps and values of a series, as they were written."""
        return getattr(self, f"_{self.kind}")(name)

    def ended(self):
        """Return why the run ended, as the package has it."""
        if self.kind == "mlflow":
            return self._run_of_mlflow().data.tags["gradhpo.ended"]
        told = [
            json.loads(item.value_json)
            for record in self._records_of_wandb()
            for item in record.summary.update
            if (item.key or item.nested_key[0]) == "ended"
        ]
        return told[-1] if told else None

    def _tensorboard(self, name):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        found = EventAccumulator(str(self.folder / "board"), size_guidance={"scalars": 0})
        return [(event.step, event.value) for event in found.Reload().Scalars(name)]

    def _mlflow(self, name):
        run = self._run_of_mlflow()
        assert run.info.status == "FINISHED"
        assert run.data.params["population"] == "12"
        history = self._client.get_metric_history(run.info.run_id, name)
        return [(metric.step, metric.value) for metric in history]

    @functools.cached_property
    def _client(self):
        import mlflow

        return mlflow.MlflowClient(str(self.folder / "mlruns"))

    def _run_of_mlflow(self):
        where = self._client.get_experiment_by_name("digits").experiment_id
        (run,) = self._client.search_runs([where])
        return run

    def _wandb(self, name):
        rows = []
        for record in self._records_of_wandb():
            items = {i.key or i.nested_key[0]: i.value_json for i in record.history.item}
            if name in items:
                rows.append((record.history.step.num, json.loads(items[name])))
        return rows

    def _records_of_wandb(self):
        from wandb.proto.wandb_internal_pb2 import Record

        for path in sorted(self.folder.glob("wandb/offline-run-*/*.wandb")):
            yield from map(Record.FromString, records_of_wandb(path.read_bytes()))


def records_of_wandb(data):
    """Yield the records of W&B's file, a log as LevelDB has it, after a header of its own."""
    position, block, head, record = 7, 32768, 7, b""
    while position + head <= len(data):
        if (left := block - position % block) < head:
            position += left
            continue
        length, kind = struct.unpack("<HB", data[position + 4 : position + head])
        if position + head + length > len(data):  # it is being written
            return
        part = data[position + head : position + head + length]
        position += head + length
        record = part if kind in (1, 2) else record + part
        if kind in (1, 4):
            yield record


REAL = [
    pytest.param("tensorboard", marks=[needs("tensorboardX"), needs("tensorboard")]),
    pytest.param("mlflow", marks=[needs("mlflow"), pytest.mark.slow]),
    pytest.param("wandb", marks=needs("wandb")),
]


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of other people's packages
@pytest.mark.parametrize("kind", REAL)
def test_a_sweep_that_goes_on_is_written_once_by_the_real_package(
    tmp_path, kind, monkeypatch, numpy_steps
):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a database takes 20 s to be made
    trackers = Trackers(kind, tmp_path)
    storage = tmp_path / "sweep"
    sweep(storage, generations=2).run(observers=[trackers.make()])
    sweep(storage, generations=3).run()  # nobody watches
    result = sweep(storage, generations=5).run(observers=[trackers.make()])
    losses = result.table["val_loss"].reshape(5, -1)
    best = np.minimum.accumulate(losses.min(axis=1))
    # W&B's own process may write the end of its file after `finish` has returned.
    wait_until(lambda: len(trackers.read("best")) >= 5, 60, "the file of the tracker is not whole")
    if kind != "tensorboard":
        wait_until(lambda: trackers.ended() == "complete", 60, "why it ended is not there")
    for name, expected in (("best", best), ("median/val_loss", np.median(losses, axis=1))):
        steps, values = zip(*trackers.read(name), strict=True)
        assert steps == (1, 2, 3, 4, 5)
        np.testing.assert_allclose(values, expected, rtol=1e-6)


@pytest.mark.parametrize("kind", ["csv", "json"])
def test_a_file_cut_short_is_gone_on_with(tmp_path, kind, numpy_steps):
    trackers, storage = Trackers(kind, tmp_path), tmp_path / "sweep"
    sweep(storage, generations=3).run(observers=[trackers.make()])
    path = trackers.make().path
    path.write_bytes(path.read_bytes()[:-30])  # as a kill leaves it
    result = sweep(storage, generations=4).run(observers=[trackers.make()])
    rows = read_csv(path) if kind == "csv" else read_json(path)
    assert len(rows) == 4 * 12
    for name in ("val_loss", "trial", "hyperparams.log_rate"):
        found = np.asarray([row[name] for row in rows]).astype(result.table[name].dtype)
        np.testing.assert_array_equal(found, result.table[name], err_msg=name)
    assert [int(row["generation"]) - 1 for row in rows] == result.table["generation"].tolist()
    assert [int(row["slot"]) for row in rows] == result.table["slot"].tolist()


def test_observers_get_the_names_of_the_workers_environment_and_no_values(tmp_path, numpy_steps):
    told = []

    class Keeps:
        def observe(self, event):
            told.append(event)

    env, more = {"WANDB_API_KEY": "a secret"}, {"env_vars": {"TOKEN": "a secret"}}
    made = sweep(tmp_path / "sweep", generations=1, env=env, runtime_env=more)
    made.run(observers=[Keeps()])
    how = told[0].settings["how"]
    assert (how["env"], how["runtime_env"]) == (["WANDB_API_KEY"], ["env_vars"])
    assert "a secret" not in repr(told)
    assert "a secret" in (tmp_path / "sweep" / "manifest.json").read_text()


def test_a_tracker_is_told_why_nothing_more_comes(tmp_path):
    """A condition, an error, and the end, each when it is so; the last of them holds."""

    class Kept(JSONLines):
        def ended(self, why):
            told.append(why)

    def fails(steps, state):
        raise OSError("the callback fails")

    told, about = [], {"eval_every": 1, "checkpoint": tmp_path / "run"}
    stop = gradhpo.Stop(target=1e9)
    solve(5, **about, stop=stop, observers=[Kept(tmp_path / "a.jsonl")])
    with pytest.raises(OSError, match="the callback fails"):
        solve(5, **about, callback=fails, observers=[Kept(tmp_path / "a.jsonl")])
    solve(5, **about, observers=[Kept(tmp_path / "a.jsonl")])
    assert "target=1e+09" in told[0]
    assert told[1:] == ["OSError: the callback fails", "complete"]


def test_what_an_observer_misses_it_gets_later(tmp_path, numpy_steps):
    class Flaky(JSONLines):
        def write(self, event, after):
            if event.last == 2 and not self.failed:
                self.failed = True
                with open(self.path, "a") as file:
                    file.write('{"generation": 2, "trial')
                raise OSError("the disk is full")
            super().write(event, after)

    flaky = Flaky(tmp_path / "a.jsonl")
    flaky.failed = False
    sweep(tmp_path / "sweep", generations=4).run(observers=[flaky])
    rows = read_json(flaky.path)
    assert [row["generation"] for row in rows] == np.repeat([1, 2, 3, 4], 12).tolist()


class Changed(file_operations.Variant):
    """Another program than the one that a sweep begins with."""

    def prepare(self, blobs):
        return super().prepare(blobs)._replace(key={"computation": "another"})

    def turn(self, state, order):
        state, columns = super().turn(state, order)
        return state, columns | {"val_loss": columns["val_loss"] / 2}


def changes_after_the_third(monkeypatch, folder, tracker):
    """Return a sweep with checkpoints after the third of its generations, whose program changes."""
    monkeypatch.setattr(shard, "Variant", file_operations.Variant)
    made = functools.partial(sweep, folder, checkpoint_every=3)

    def stop(generation, table):
        if generation == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made(generations=8).run(stop, observers=[tracker] if tracker else [])
    assert Journal(folder).generation == 4
    monkeypatch.setattr(shard, "Variant", Changed)
    return made


@pytest.mark.filterwarnings("default")  # of other people's packages
@pytest.mark.parametrize("kind", ["csv", "json", *REAL[:2]])
def test_what_is_computed_again_by_changed_code_is_written_anew(tmp_path, kind, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    trackers = Trackers(kind, tmp_path)
    made = changes_after_the_third(monkeypatch, tmp_path / "sweep", trackers.make())
    observers = [trackers.make()]
    made(generations=6).run(observers=observers, allow_changed=("code",))
    result = made(generations=8).run(observers=observers)
    assert [tuple(change) for change in result.changes] == [(3, "code")]
    losses = result.table["val_loss"].reshape(8, -1)
    if kind in ("csv", "json"):
        path = trackers.make().path
        rows = read_csv(path) if kind == "csv" else read_json(path)
        assert [float(row["val_loss"]) for row in rows] == losses.ravel().tolist()
        return
    found = trackers.read("median/val_loss")
    found = list(dict(found).items()) if kind == "mlflow" else found  # which has the old ones, too
    steps, values = zip(*found, strict=True)
    assert steps == tuple(range(1, 9))
    np.testing.assert_allclose(values, np.median(losses, axis=1), rtol=1e-6)


def test_a_change_and_a_damaged_checkpoint_before_it_leave_no_old_row(tmp_path, monkeypatch):
    path = tmp_path / "a.csv"
    made = changes_after_the_third(monkeypatch, tmp_path / "sweep", CSV(path))
    saved = Journal(tmp_path / "sweep").durable[-1]["checkpoints"][0]
    (tmp_path / "sweep" / saved.file).write_bytes(b"damaged")
    changed = made(generations=8)
    result = changed.run(observers=[CSV(path)], allow_changed=("code",))
    assert [e.generation for e in changed.events if isinstance(e, events.Damaged)] == [0]
    assert [float(row["val_loss"]) for row in read_csv(path)] == result.table["val_loss"].tolist()


def test_a_kill_as_a_change_is_taken_in_leaves_nothing_from_before(tmp_path, monkeypatch):
    class KilledError(BaseException):
        pass

    def kill(self, generation):
        raise KilledError

    def run(name, killed):
        made = changes_after_the_third(monkeypatch, tmp_path / name, None)
        with monkeypatch.context() as patched, contextlib.suppress(KilledError):
            if killed:
                patched.setattr(Journal, "drop_after", kill)
            return made(generations=8).run(allow_changed=("code",))
        path = tmp_path / "a.csv"
        result = made(generations=8).run(observers=[CSV(path)])
        rows = [float(row["val_loss"]) for row in read_csv(path)]
        assert rows == result.table["val_loss"].tolist()
        return result

    assert_same_tables(run("killed", True), run("whole", False))


@pytest.mark.parametrize(
    "text", [b'{"rate": 0.1}', b"{\n}\n", b"my notes", b"my,notes\n", b"\n", b"generations,1"]
)
@pytest.mark.parametrize("kind", [CSV, JSONLines])
def test_a_file_of_something_else_is_refused_and_stays(tmp_path, kind, text):
    path = tmp_path / "config"
    path.write_bytes(text)
    with pytest.raises(OtherRunError, match=r"config'\) must begin with '.*step.*, has b'"):
        solve(1, observers=[kind(path)])
    assert path.read_bytes() == text


@pytest.mark.parametrize("left", [0, 1, 4, 8, 20])
@pytest.mark.parametrize("kind", [CSV, JSONLines])
def test_a_file_cut_short_in_its_first_line_is_begun_again(tmp_path, kind, left):
    path = tmp_path / "a"
    solve(2, observers=[kind(path)])
    whole = path.read_bytes()
    path.write_bytes(whole[:left])
    solve(2, observers=[kind(path)])
    assert path.read_bytes() == whole


def test_a_solve_gives_a_row_for_each_step_with_its_evaluations(tmp_path):
    path = tmp_path / "a.csv"
    found = solve(9, eval_every=4, observers=[CSV(path)])
    rows = read_csv(path)
    assert [int(row["step"]) for row in rows] == list(range(1, 10))
    for name, values in found.metrics.items():
        assert [float(row[name]) for row in rows] == [float(x) for x in values]
    assert [row["norm"] != "" for row in rows] == [n in (4, 8, 9) for n in range(1, 10)]
    firsts = [float(row["of.first"]) for row in rows if row["of.first"]]
    assert firsts == [float(x) for x in found.evals["of"]["first"]]
    assert "of.all" not in rows[0]


def test_a_batch_of_runs_has_a_row_for_each(tmp_path):
    keys = jax.random.split(jax.random.key(0), 3)
    found = solve(2, keys, observers=[JSONLines(tmp_path / "a.jsonl")])
    rows = read_json(tmp_path / "a.jsonl")
    assert [(row["step"], row["run"]) for row in rows] == [(s, r) for s in (1, 2) for r in range(3)]
    assert [row["val_loss"] for row in rows] == found.metrics["val_loss"].ravel().tolist()
    event = StepsDone("step", 1, found.metrics)
    assert dict(event.points(1))[2]["val_loss/1"] == found.metrics["val_loss"][1, 1]


def test_a_solve_goes_on_with_its_file_and_another_is_refused(tmp_path):
    path = tmp_path / "a.csv"
    part = solve(4, eval_every=2, observers=[CSV(path)])
    whole = solve(7, eval_every=2, resume=part, observers=[CSV(path)])
    rows = read_csv(path)
    assert [float(row["val_loss"]) for row in rows] == whole.metrics["val_loss"].tolist()
    assert [row["norm"] != "" for row in rows] == [n in (2, 4, 6, 7) for n in range(1, 8)]
    with pytest.raises(OtherRunError, match=r"a.csv'\) holds another run, up to step 7"):
        solve(4, observers=[CSV(path)])
    assert read_csv(path) == rows


@pytest.mark.slow
def test_a_step_that_diverged_is_told_when_it_is_taken_anew(tmp_path):
    path, plain, key = tmp_path / "a.csv", gradhpo.OneStepOptimizer(INNER), jax.random.key(0)

    def bad_at_the_fourth(step):
        return jnp.where(step == 3, jnp.inf, 1e-3)

    def run(rate, **settings):
        about = {"lr_hyper": rate, "progress": False, "observers": [CSV(path)]}
        return gradhpo.solve(PROBLEM, plain, 6, key, **about, **settings)

    with pytest.warns(gradhpo.DivergenceWarning):
        bad = run(bad_at_the_fourth)
    assert bad.steps == 3
    assert [row["step"] for row in read_csv(path)] == ["1", "2", "3"]
    good = run(1e-3, resume=bad)
    rows = read_csv(path)
    assert [float(row["val_loss"]) for row in rows] == good.metrics["val_loss"].tolist()
    assert [int(row["step"]) for row in rows] == list(range(1, 7))


def test_a_run_of_a_folder_is_known_again_before_its_first_checkpoint(tmp_path):
    path, folder = tmp_path / "a.jsonl", tmp_path / "run"

    class KilledError(Exception):
        pass

    def kill(steps, state):
        if steps == 6:
            raise KilledError

    about = {"eval_every": 3, "checkpoint": folder, "every": 100}
    with pytest.raises(KilledError):
        solve(9, **about, callback=kill, observers=[JSONLines(path)])
    assert len(read_json(path)) == 3
    found = solve(9, **about, observers=[JSONLines(path)])
    rows = read_json(path)
    assert [row["step"] for row in rows] == list(range(1, 10))
    assert [row["val_loss"] for row in rows] == found.metrics["val_loss"].tolist()


def test_episodes_are_told_too(tmp_path):
    state = OPTIMIZER.init(*start())
    draw = lambda: BATCH  # noqa: E731
    about = (state, 3, 2, draw, draw, train_loss, val_loss)
    OPTIMIZER.run(*about, progress=False, observers=[CSV(tmp_path / "a.csv")])
    rows = read_csv(tmp_path / "a.csv")
    assert [int(row["episode"]) for row in rows] == [1, 2, 3]
    assert all(float(row["val_loss"]) > 0 for row in rows)


def test_an_error_of_an_observer_of_a_solve_is_warned_of_once():
    class Broken:
        def observe(self, event):
            raise OSError("gone")

        def __str__(self):
            return "Broken()"

    with pytest.warns(RuntimeWarning, match=r"observer Broken\(\) failed: OSError: gone") as told:
        assert solve(3, eval_every=1, observers=[Broken()]).steps == 3
    assert len(told) == 1
    with pytest.raises(TypeError, match="observers must have a method observe, got 3"):
        solve(3, observers=[3])


def test_trackers_by_a_word(tmp_path):
    assert str(named(f"csv={tmp_path}/a=b.csv")) == f"CSV('{tmp_path}/a=b.csv')"
    assert isinstance(named("json=a.jsonl"), JSONLines)
    for wrong in ("csv", "csv=", "excel=a"):
        with pytest.raises(ValueError, match=f"track must be one of csv=…, json=.* got '{wrong}'"):
            named(wrong)


def test_what_is_not_installed_is_said_with_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install mlflow-skinny, or .*gradhpo\[trackers\]"):
        MLflow("a")
    with pytest.raises(ImportError, match="TensorBoard needs tensorboardX"):
        TensorBoard("a")
    with pytest.raises(ImportError, match="WandB needs wandb"):
        WandB("a")
