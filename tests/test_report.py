"""The report of a sweep says what its tables say; its texts are safe, and a look costs little."""

import dataclasses
import html.parser
import http.client
import importlib.util
import json
import os
import re
import types

import numpy as np
import pytest
from typer.testing import CliRunner

import gradhpo
from gradhpo import diagnosis, folder, notebook, progress, saved_diagnosis
from gradhpo.cluster import SearchSpace, cli, event_log, shard
from gradhpo.cluster.columns import PARENT, TRIAL, decision_of
from gradhpo.cluster.events import Note, WorkerLost
from gradhpo.cluster.journal import Journal
from gradhpo.cluster.reporting import costs, descent, write_report
from gradhpo.cluster.reporting.followed import Followed
from gradhpo.cluster.reporting.importance import importance, places
from gradhpo.cluster.reporting.kept_rows import rows_of
from gradhpo.cluster.reporting.sweep_data import SweepData
from gradhpo.cluster.reporting.tail import Tail
from gradhpo.cluster.result import SweepResult
from gradhpo.cluster.storage import Storage
from gradhpo.page import document, packed, plain, unpacked
from gradhpo.page.leaves import leaves_of
from gradhpo.page.plain import in_script
from gradhpo.page.server import PageServer
from gradhpo.page.thinning import thinned, thinned_at
from gradhpo.regime import Regime
from tests import file_operations
from tests.sweeps import SPACE, sweep

GENERATIONS, POPULATION = 8, 12
with_plotly = pytest.mark.skipif(
    importlib.util.find_spec("plotly") is None, reason="plotly: the extra report"
)


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """A sweep of a few lines of NumPy."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard, "Variant", file_operations.Variant)
        return sweep(tmp_path_factory.mktemp("reported"), generations=GENERATIONS).run()


@pytest.fixture(scope="module")
def data(result):
    return SweepData(result.where).whole()


def rows(result, name):
    return result.table[name].reshape(GENERATIONS, POPULATION)


def test_rows_are_the_table(result, data):
    given = data["rows"]
    loss, rate = unpacked(given["columns"]["val_loss"]), unpacked(given["settings"]["log_rate"])
    np.testing.assert_array_equal(loss, rows(result, "val_loss").astype(np.float32))
    stored = rows(result, "hyperparams.log_rate")
    np.testing.assert_allclose(rate, np.exp(stored), rtol=1e-6)
    np.testing.assert_array_equal(unpacked(given["trial"]), rows(result, "trial"))
    np.testing.assert_array_equal(unpacked(given["parent"]), rows(result, "parent"))
    wanted = np.quantile(rows(result, "val_loss"), [0.1, 0.25, 0.5, 0.75, 0.9], axis=1).T
    np.testing.assert_allclose(unpacked(given["quantiles"]["val_loss"]), wanted, rtol=1e-6)
    best = np.minimum.accumulate(rows(result, "val_loss").min(axis=1))
    np.testing.assert_allclose(unpacked(given["best"]), best, rtol=1e-6)


def test_the_best_trial_is_the_result_s(result, data):
    (kept,) = data["kept"]
    assert (kept["trial"], kept["generation"]) == (result.best.number, result.best.generation)
    assert kept["lineage"] == result.best.lineage
    assert kept["scores"] == pytest.approx(result.best.scores)
    assert kept["settings"] == pytest.approx(result.best.settings)
    lived = unpacked(kept["life"]).reshape(-1, 2).tolist()
    assert lived == [[turn.generation, turn.slot] for turn in result.schedule]
    path = unpacked(data["path"]["metrics"]["val_loss"])
    wanted = [rows(result, "val_loss")[g, s] for g, s in lived]
    np.testing.assert_allclose(path, wanted, rtol=1e-6)


def test_what_the_scheduler_changed_is_told_from_what_steps_moved(result, data):
    """The steps here move no setting: each generation ends with what it began with."""
    followed = Followed(result.where)
    followed.look()
    low, high = (SPACE.settings()["log_rate"].low, SPACE.settings()["log_rate"].high)
    jumps = unpacked(data["rows"]["moved"]["log_rate"]["at"])
    storage, changed = Storage(result.where), set(range(POPULATION))  # all began somewhere
    for generation in range(GENERATIONS):
        begun = followed.setting("log_rate", generation, begun=True)
        ended = followed.setting("log_rate", generation)
        inside = (ended > low) & (ended < high)  # these steps do not clip, as real ones do
        np.testing.assert_allclose(begun[inside], ended[inside], rtol=1e-5)
        if generation:
            mask = decision_of(storage.load_table(generation - 1)).changes["log_rate"].mask
            changed |= set((generation * POPULATION + np.flatnonzero(mask)).tolist())
    assert set(jumps.tolist()) <= changed
    assert len(jumps) > POPULATION


def test_a_file_that_would_be_too_large_keeps_the_extremes(result):
    followed = Followed(result.where)
    followed.look()
    given = rows_of(followed, 0, most=100)
    assert given["thinned"] >= 3
    kept = unpacked(given["columns"]["val_loss"])
    loss = rows(result, "val_loss").astype(np.float32)
    np.testing.assert_array_equal(kept.min(axis=0), loss.min(axis=0))
    np.testing.assert_array_equal(kept.max(axis=0), loss.max(axis=0))
    assert len(unpacked(given["at"])) == len(kept) < GENERATIONS
    assert unpacked(given["quantiles"]["val_loss"]).shape == (GENERATIONS, 5)


def test_leaves_are_named_and_shown():
    arrays = {".h['a'][0].b": np.arange(100.0), ".h": np.float32(2), ".params": np.ones(3)}
    found = leaves_of(arrays, ".h")["leaves"]
    assert list(found) == ["a.0.b", "λ"]
    assert found["λ"]["values"] == [2]
    assert (found["a.0.b"]["least"], found["a.0.b"]["greatest"]) == (0, 99)
    assert sum(found["a.0.b"]["counts"]) == 100


def test_thinning_takes_the_least_and_the_greatest_in_their_order():
    line = np.array([[1.0], [5.0], [np.nan], [2.0], [0.0], [np.nan], [np.nan]])
    np.testing.assert_array_equal(thinned(line, 3)[:, 0], [1, 5, 2, 0, np.nan, np.nan])
    np.testing.assert_array_equal(thinned_at(7, 3), [0, 2, 3, 5, 6, 6])


class Two(file_operations.Variant):
    """Steps with a second metric, some of which diverge."""

    def turn(self, state, order):
        state, columns = super().turn(state, order)
        gone = (order.trials % 5 == 4) & (order.generation == 2)
        columns["val_loss"] = np.where(gone, np.nan, columns["val_loss"])
        rate = columns["hyperparams.log_rate"]
        return state, {**columns, "size": rate**2, "diverged_at": np.where(gone, 3, 0)}


def test_several_objectives_choices_and_what_diverged(tmp_path, monkeypatch):
    monkeypatch.setattr(shard, "Variant", Two)
    space = SearchSpace(SPACE.hyperparams, choices={"method": ["one-step", "first-order"]})
    compared = {"val_loss": "min", "size": "max"}
    result = sweep(tmp_path, generations=4, space=space, metric=compared).run()
    told = SweepData(tmp_path).whole()
    assert told["objectives"] == [{"name": "val_loss", "sign": 1}, {"name": "size", "sign": -1}]
    for kept, trial in zip(told["kept"], result.front, strict=True):
        assert kept["scores"] == pytest.approx(trial.scores)
        assert (kept["choices"], kept["lineage"]) == (trial.choices, trial.lineage)
    gone = np.flatnonzero(result.table["diverged_at"] > 0)
    assert unpacked(told["diverged"]["step"]).tolist() == [3] * told["diverged"]["of"]
    assert set(unpacked(told["diverged"]["trial"])) == set(result.table["trial"][gone])
    assert unpacked(told["rows"]["diverged"]).tolist() == [0, 0, len(gone), 0]
    assert unpacked(told["rows"]["best"]).size == 0
    assert set(told["importance"]) == {"val_loss", "size"}
    variant = unpacked(told["trials"]["variant"])
    assert set(variant.tolist()) == {0, 1}


# --- safe texts ---------------------------------------------------------------------------------

EVIL = "</script><img src=x onerror=alert(1)><!--\u2028\u202e&\x1b"


class Parts(html.parser.HTMLParser):
    """The elements of a page, and what is in its scripts."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts, self.inside = [], {}, None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.inside = dict(attrs).get("id", tag) if tag in ("script", "title") else None

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        if self.inside:
            self.scripts[self.inside] = self.scripts.get(self.inside, "") + data


@with_plotly
def test_no_text_leaves_its_place():
    given = plain({"title": EVIL, EVIL: [EVIL, {"x": EVIL}], "number": float("nan")})
    page = document(given)
    parts = Parts(page)
    assert "img" not in parts.tags
    assert parts.tags.count("script") == 4
    assert json.loads(parts.scripts["data"]) == given
    assert "\u202e" not in page
    assert given["number"] is None


def test_json_in_a_script_is_the_same_json():
    value = {"a": ["<", ">", "&", "\u2028", "\u2029", "</script>", "é"], "b": 1.5}
    text = in_script(value)
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text) == value


@with_plotly
def test_the_page_holds_the_data_and_asks_for_nothing(result, data, tmp_path):
    page = write_report(result.where, tmp_path / "report.html").read_text()
    parts = Parts(page)
    told = json.loads(parts.scripts["data"])
    for name in ("rows", "kept", "tree", "trials", "importance", "settings"):
        assert told[name] == data[name], name
    assert not {"img", "iframe", "object", "form"} & set(parts.tags)
    assert "connect-src 'none'" in page
    assert page.index("default-src 'none'") < page.index("<title>")


@with_plotly
def test_ctrl_c_ends_a_watch_with_a_line(result, monkeypatch):
    class Pressed:
        def wait(self):
            raise KeyboardInterrupt

    monkeypatch.setattr(cli, "threading", types.SimpleNamespace(Event=Pressed))
    done = CliRunner().invoke(cli.app, ["report", str(result.where), "--watch"])
    assert done.exit_code == 0
    address, ended = done.output.splitlines()
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/ \(Ctrl-C ends it\)", address)
    assert ended == "No longer served."


def test_without_plotly_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"gradhpo\[report\]"):
        document({"title": "any"})


def test_arrays_come_back_as_they_were():
    for array, kind in ((np.array([[1.5, np.nan], [np.inf, -0.0]]), "<f4"), (np.arange(3), "<i4")):
        found = unpacked(json.loads(json.dumps(packed(array, kind))))
        np.testing.assert_array_equal(found, array)


# --- what is made of the tables -----------------------------------------------------------------


def test_the_tree_of_descent():
    trials = [np.array(row) for row in ([0, 1, 2], [0, 3, 2], [4, 5, 2], [4, 5, 6])]
    parents = [np.array(row) for row in ([-1] * 3, [0, 0, 2], [1, 1, 2], [0, 1, -1])]
    tree = descent.tree(trials, parents)
    assert tree.whole
    found = [(b.first, b.last, b.trial, b.parent) for b in tree.branches]
    assert found == [
        (0, 0, 0, -1), (0, 0, 1, -1), (0, 2, 2, -1), (1, 1, 0, 0), (1, 1, 3, 0),
        (2, 3, 4, 4), (2, 3, 5, 4), (3, 3, 6, -1),
    ]  # fmt: skip
    assert tree.on(descent.life(parents, 1, 3)) == [0, 4, 6]
    places = {b.place for b in tree.branches if b.last == 3}
    assert len(places) == 3
    few = descent.tree(trials, parents, most=0)
    assert not few.whole
    assert [b.trial for b in few.branches] == [3, 4, 5, 6]


def test_the_tree_goes_back_as_the_result_does(result, data):
    tree, last = data["tree"], GENERATIONS - 1
    ends = list(zip(tree["last"], tree["slot"], strict=True))
    for slot in range(POPULATION):
        chain = [ends.index((last, slot))]
        while tree["parent"][chain[-1]] >= 0:
            chain.append(tree["parent"][chain[-1]])
        firsts = [tree["first"][b] for b in chain[::-1]]
        assert firsts == sorted(firsts)
        turns = descent.life(list(rows(result, "parent")), slot, last)
        assert tree["first"][chain[-1]] == turns[0][0]


def test_importance_finds_what_decides_and_not_what_does_not():
    rng = np.random.default_rng(1)
    rate, idle = rng.uniform(size=(2, 600))
    generation = np.repeat(np.arange(6), 100)
    place = places((rate - 0.5) ** 2 + 10 * generation, generation)  # no rank correlation sees it
    found = importance(
        {"rate": rate, "idle": idle, "method": (rate > 0.5) * 1.0}, place, ("method",)
    )
    assert found["rate"].share > 0.8
    assert found["rate"].chance < 0.1
    assert found["idle"].share <= 2 * found["idle"].chance
    assert found["method"].share < 0.05
    assert importance({"rate": rate[:10]}, place[:10]) == {}
    assert importance({"rate": np.ones(600)}, place) == {}


def test_places_are_within_a_generation_and_the_diverged_are_last():
    found = places(np.array([5.0, 1.0, np.nan, 7.0, 7.0]), np.array([0, 0, 0, 1, 1]))
    np.testing.assert_array_equal(found, [0.5, 0, 1, 0.5, 0.5])


def test_costs_are_what_the_log_says():
    made = costs.Costs()
    made.add(
        [
            {"event": "starting", "time": 1.0},
            {
                "event": "prepared",
                "time": 2.0,
                "compiles": 1,
                "loads": 0,
                "seconds": [["tracing", 0.5]],
            },
            {
                "event": "prepared",
                "time": 2.5,
                "compiles": 0,
                "loads": 1,
                "seconds": [["loading", 9]],
            },
            {"event": "running", "time": 4.0},
            {"event": "worker lost", "time": 5.0, "reason": "SIGKILL"},
        ]
    )
    told = made.described([1.0, 2.0])
    assert (told["compiles"]["compiles"], told["compiles"]["loads"]) == (1, 1)
    assert told["faults"] == {"workers lost": 1}
    assert told["seconds"] == {"generations": 3.0, "starting": 3.0, "of starting": {"tracing": 0.5}}
    assert [one["event"] for one in told["events"]] == ["starting", "worker lost"]


# --- following ----------------------------------------------------------------------------------


def test_a_text_is_read_from_where_it_was_read_to(tmp_path):
    text, path = Storage(tmp_path).events, tmp_path / "events.jsonl"
    tail = Tail(text)
    assert tail.lines() == (False, [])
    path.write_bytes(b"one\ntwo\nthr")
    assert tail.lines() == (False, [b"one", b"two"])
    assert tail.lines() == (False, [])
    with open(path, "ab") as file:
        file.write(b"ee\nfour\n")
    assert tail.lines() == (False, [b"three", b"four"])
    path.write_bytes(b"one\ntwo\nanother\nfour\nand more of it\n")
    again, lines = tail.lines()
    assert again
    assert len(lines) == 5
    path.write_bytes(b"one\n")
    assert tail.lines() == (True, [b"one"])


class Grown:
    """A sweep's storage that grows by the library's own writers, a generation at a time."""

    def __init__(self, result, where):
        self.storage = Storage(where)
        self.tables = [Storage(result.where).load_table(g) for g in range(GENERATIONS)]
        self.lines = list(Journal(result.where).entries())
        for name in ("manifest.json", "events.jsonl"):
            self.storage.files.replace(name, Storage(result.where).files.read(name))
        self.journal, self.log = Journal(where), event_log.EventLog(where)

    def grow(self):
        at = self.journal.generation + 1
        table = self.tables[at % GENERATIONS]
        if at % GENERATIONS == 0:  # it goes on where it was
            table = table | {PARENT: np.arange(POPULATION), TRIAL: self.tables[-1][TRIAL]}
        saved = self.storage.save_table(at, table)
        line = self.lines[at % GENERATIONS]
        self.journal.append({**line, "generation": at, "table": saved, "best": None})
        self.log.observe(Note(f"generation {at:06d}"))


def counted(monkeypatch):
    """Return what counts the bytes that are read of a folder, by name."""
    read = {}

    def counting(function):
        def call(self, name, *arguments):
            found = function(self, name, *arguments)
            size = len(found) if isinstance(found, bytes) else os.fstat(found.fileno()).st_size
            read[name.partition("-")[0]] = read.get(name.partition("-")[0], 0) + size
            return found

        return call

    for name in ("open", "whole", "read", "since"):
        monkeypatch.setattr(folder.Folder, name, counting(getattr(folder.Folder, name)))
    return read


@pytest.mark.parametrize("generations", [24, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_look_reads_the_same_however_long_the_sweep_is(
    result, tmp_path, monkeypatch, generations
):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # what is written, not how safely
    grown, read = Grown(result, tmp_path), counted(monkeypatch)
    shown, known, sizes = SweepData(tmp_path), 0, []
    for until in (10, generations):
        while grown.journal.generation + 1 < until:
            grown.grow()
        assert shown.since(known, 1)["rows"]["count"] == until - known
        read.clear()
        assert shown.since(until, 1)["rows"]["count"] == 0
        idle = sum(read.values())
        assert not [name for name in read if name.startswith("tables/")]
        grown.grow()
        read.clear()
        assert shown.since(until, 1)["rows"]["count"] == 1
        assert [name for name in read if name.startswith("tables/")] == [f"tables/{until:06d}"]
        sizes.append((len(read), sum(read.values()), idle))
        known = until + 1
    (files, new, idle), (later_files, later, later_idle) = sizes
    assert files == later_files
    assert later <= new + 64  # a digit more in a line
    assert later_idle <= idle + 64


def test_a_journal_that_went_back_is_another_epoch(result, tmp_path):
    grown = Grown(result, tmp_path)
    for _ in range(5):
        grown.grow()
    shown = SweepData(tmp_path)
    first = shown.since(0, 0)
    assert (first["epoch"], first["rows"]["count"]) == (1, 5)
    grown.journal.drop_after(2)
    grown.grow()
    again = shown.since(5, 1)
    assert (again["epoch"], again["rows"]["first"], again["rows"]["count"]) == (2, 0, 4)
    assert shown.since(4, 2)["rows"]["count"] == 0


def test_a_damaged_table_is_told_and_left_out(result, tmp_path):
    grown = Grown(result, tmp_path)
    for _ in range(4):
        grown.grow()
    (table,) = tmp_path.glob("tables/000001-*")
    table.write_bytes(table.read_bytes()[:-9])
    told = SweepData(tmp_path).whole()
    assert told["done"] == 4
    assert "000001" in told["damaged"][0]
    loss = unpacked(told["rows"]["columns"]["val_loss"])
    assert np.isnan(loss[1]).all()
    assert np.isfinite(loss[[0, 2, 3]]).all()


def test_a_sweep_that_has_done_nothing_yet(result, tmp_path):
    Grown(result, tmp_path)
    told = SweepData(tmp_path).whole()
    assert (told["done"], told["kept"], told["trials"]["of"]) == (0, [], 0)


# --- the server ---------------------------------------------------------------------------------


def asked(server, path="/", method="GET", **headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    found = answer.status, dict(answer.getheaders()), answer.read()
    connection.close()
    return found


def test_the_server_answers_its_own_page_alone():
    seen = []

    def since(after, epoch):
        seen.append((after, epoch))
        if after == 9:
            raise OSError("the storage is away")
        return {"epoch": epoch}

    with PageServer("<p>é</p>", since) as server:
        assert server.address == f"http://127.0.0.1:{server.port}/"
        status, headers, body = asked(server)
        assert (status, body.decode()) == (200, "<p>é</p>")
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert not [name for name in headers if name.startswith("Access-Control")]
        status, _, body = asked(server, "/data?after=3&epoch=2")
        assert (status, json.loads(body), seen) == (200, {"epoch": 2}, [(3, 2)])
        assert "away" in json.loads(asked(server, "/data?after=9")[2])["error"]
        assert asked(server, "/data?after=x")[0] == 400
        assert asked(server, "/etc/passwd")[0] == 404
        for name in ("evil.example", f"evil.example:{server.port}", "127.0.0.1", ""):
            assert asked(server, Host=name)[0] == 403, name
        assert asked(server, Host=f"localhost:{server.port}")[0] == 200
        for method in ("POST", "PUT", "DELETE", "OPTIONS", "HEAD"):
            assert asked(server, method=method)[0] == 501
    assert len(seen) == 2


@with_plotly
def test_the_command(result, tmp_path):
    run = CliRunner().invoke
    done = run(cli.app, ["report", result.where, "--output", str(tmp_path / "a.html")])
    assert done.exit_code == 0
    assert "a.html: " in done.output
    (tmp_path / "empty").mkdir()
    failed = run(cli.app, ["report", str(tmp_path / "empty")])
    assert "nothing to report" in str(failed.exception)


# --- what stands beside a sweep, and in a notebook ----------------------------------------------


def row(name, cosine, time):
    two = np.array([cosine, cosine])
    return diagnosis.Row(name, two, np.ones(2), np.full(2, 0.5), np.array([time]), time)


def test_a_diagnosis_is_saved_beside_a_sweep_and_shown(result, tmp_path):
    grown = Grown(result, tmp_path)
    grown.grow()
    twice, losses = np.ones((2, 20)), np.ones((2, 20, 3))
    twice[:, 5:] = 0
    made = gradhpo.Diagnosis(
        [row("one-<step>", 0.95, 2.0)], row("exact", 1.0, 9.0), 10, 1e-3, ("n",),
        Regime(0.1, twice, losses, np.ones(2), twice, 3.0),
    )  # fmt: skip
    made.save(tmp_path)
    back = gradhpo.Diagnosis.load(tmp_path)
    assert str(back) == str(made)
    assert dataclasses.asdict(back).keys() == dataclasses.asdict(made).keys()
    shown = SweepData(tmp_path).whole()["diagnosis"]
    assert shown["recommended"] == made.recommended.name
    assert any("Chaotic beyond 5 steps" in note for note in shown["notes"])
    assert shown["rows"] == [one.cells() for one in (*made.rows, made.exact)]
    (tmp_path / saved_diagnosis.DIAGNOSIS).write_text("{")
    assert "damaged" in SweepData(tmp_path).whole()["diagnosis"]["error"]
    with pytest.raises(ValueError, match="damaged"):
        gradhpo.Diagnosis.load(tmp_path)


def test_a_diagnosis_does_not_keep_a_sweep_from_its_folder(tmp_path):
    gradhpo.Diagnosis([], row("exact", 1.0, 9.0), 10, 1e-3).save(tmp_path)
    assert Storage(tmp_path).strangers() == []


def test_results_show_themselves_in_a_notebook(result):
    made = gradhpo.Diagnosis([row("<b>", 0.95, 2.0)], row("exact", 1.0, 9.0), 10, 1e-3)
    assert "&lt;b&gt;" in made._repr_html_()
    assert "<b>" not in made._repr_html_().replace("<b></b>", "")
    shown = SweepResult.from_storage(result.where)._repr_html_()
    assert f"{result.best.score:.6g}" in shown
    assert f"{result.best.settings['log_rate']:.6g}" in shown
    assert "8 generations, complete" in shown


@pytest.mark.parametrize("runs", [(), (12,)])
def test_a_solution_shows_itself(runs):
    found = gradhpo.Solution(
        state=None, metrics={"val_loss<": np.ones((3, *runs)) * 0.25}, evals={}, steps=3, phi=None,
        eval_steps=np.zeros(0, int), diverged_at=np.zeros(runs, int), stopped="the <end>",
    )  # fmt: skip
    shown = found._repr_html_()
    assert "3 steps, stopped: the &lt;end&gt;" in shown
    assert "val_loss&lt;" in shown
    assert shown.count("0.25") == (1 if runs == () else 10)
    assert ("and 2 runs more" in shown) == (runs == (12,))


class Kernel:
    """What IPython has where a notebook runs."""

    kernel = object()

    @classmethod
    def get_ipython(cls):
        return cls


def test_a_notebook_is_somebody_who_looks(monkeypatch, capsys):
    assert not notebook.in_notebook()
    assert not progress.watched()
    monkeypatch.setitem(notebook.sys.modules, "IPython", Kernel)
    assert notebook.in_notebook()
    with progress.Bar(None, 3, "step") as bar:
        assert bar.drawn
        bar.advance(3)
    assert "3/3" in capsys.readouterr().err


def test_workers_that_were_lost_are_counted(result, tmp_path):
    grown = Grown(result, tmp_path)
    grown.grow()
    grown.log.observe(WorkerLost("was killed", 3, ("host:1",)))
    told = SweepData(tmp_path).whole()["costs"]
    assert told["faults"] == {"workers lost": 1}
    assert told["compiles"]["compiles"] >= 1
