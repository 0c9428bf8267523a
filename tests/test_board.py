"""The board's page: what is plugged in, the images, and the tables and figures that are written."""

import functools
import gzip
import importlib
import pickle
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradhpo
from tests import problems
from tests.public import ROOT

BOARD = ROOT / "benchmarks" / "bilevel_board"
sys.path += [str(BOARD), str(BOARD / "plugged" / "benchmark_utils")]

import board  # noqa: E402
import board_page  # noqa: E402
import gradhpo_methods as methods  # noqa: E402

PAGE = ROOT / "docs" / "board.md"


def train_loss(w, lam, batch):
    return problems.quadratic_train(w, lam, jnp.asarray(problems.TRAIN)[batch["start"]])


def val_loss(w, lam, batch):
    return problems.quadratic_val(w, lam, problems.VAL + batch["start"])


@pytest.mark.parametrize("name", methods.CALLS)
def test_every_method_takes_a_step_of_what_the_board_gives(name):
    optimizer = methods.optimizer_of(name, 0.1, 10.0, 20, 3)
    stacked = name in methods.EVERY_BATCH
    numbers = jnp.arange(methods.INNER_STEPS) if stacked else jnp.asarray(0)
    train, val = ({"start": x, "index": x} for x in (numbers, jnp.asarray(0)))
    state = optimizer.init(*map(jnp.asarray, (problems.W0, problems.LAM0)))
    task = gradhpo.Task(train, val, train_loss, val_loss)
    after = jax.eval_shape(optimizer.advance, state, task)
    assert jax.tree.structure(after) == jax.tree.structure(state)


def test_rates_fall_with_the_steps_of_lambda():
    rate = methods._rate(0.4, 0.5, steps=10)
    assert [float(rate(count)) for count in (0, 9, 10, 39)] == pytest.approx(
        [0.4, 0.4, 0.4 / 2**0.5, 0.2]
    )
    assert methods._rate(0.4, 0) == 0.4


def write_idx(path, values):
    header = bytes([0, 0, 8, values.ndim]) + np.asarray(values.shape, ">u4").tobytes()
    path.write_bytes(gzip.compress(header + values.tobytes()))


def test_images_are_written_as_the_board_reads_them(tmp_path):
    images = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    labels = np.array([7, 1], np.uint8)
    for kind, shift in (("train", 0), ("t10k", 100)):
        write_idx(tmp_path / f"{kind}-images-idx3-ubyte.gz", images + np.uint8(shift))
        write_idx(tmp_path / f"{kind}-labels-idx1-ubyte.gz", labels)
    board.write_images(tmp_path, tmp_path)
    kept = pickle.loads((tmp_path / "mnist.pkl").read_bytes())
    assert sorted(kept) == ["test_images", "test_labels", "training_images", "training_labels"]
    np.testing.assert_array_equal(kept["test_images"], images.reshape(2, 9) + 100)
    np.testing.assert_array_equal(kept["training_labels"], labels)


def test_missing_images_are_told_with_where_they_come_from(tmp_path):
    assert board.missing_images(tmp_path) is None
    reason = board.missing_images(tmp_path / "nowhere")
    assert "nowhere is not there" in reason
    assert "dataset-fashion-mnist" in reason


def test_an_unknown_run_is_told_by_its_name():
    with pytest.raises(board.typer.BadParameter, match=r"--runs takes small, .*; got large"):
        board.main(runs="small,large")


def found():
    rows = [[{"value": v / s} for v in (4.0, 2.0, 1.0)] for s in (1, 2, 4)]
    curve = {"calls": 400, "every": 100, "seconds": 5e-4, "seeds": rows}
    gone = [*rows[1:], [*rows[0][:1], {"value": float("nan")}]]
    return {
        "machine": "a machine",
        "small": {
            "curves": {"saba": curve, "SABA": curve, "F2SA": {**curve, "seeds": gone}},
            "pairs": {
                "saba:SABA": {
                    "steps": 10,
                    "ours": [0.01, 0.02, 0.03],
                    "theirs": [0.02, 0.04, 0.08],
                    "ratio": [0.4, 0.5, 0.6],
                }
            },
        },
    }


def test_the_page_has_medians_with_quartiles_and_figures(tmp_path, monkeypatch):
    (tmp_path / "draw.py").write_text((ROOT / "docs/pictures/draw.py").read_text())
    monkeypatch.setattr(board_page, "PICTURES", tmp_path)
    page = tmp_path / "page.md"
    page.write_text("Before <!-- measured: begin --> old <!-- measured: end --> after")
    board_page.write(found(), page)
    written = page.read_text()
    text = written.replace("\u2060", "").replace("−", "-")  # where no line is broken
    assert text.startswith("Before ")
    assert text.endswith(" after")
    # within 64,000 calls, of which an evaluation is 40,000, and at the end
    ends = "3 | 1.0e+00 (5.0e-01–2.0e+00) | 5.0e-01 (2.5e-01–1.0e+00) | 80,000 | 0.50 |"
    assert f"| **SABA** | {ends}" in text
    assert f"| SABA, the board's | {ends}" in text
    gone = "1.0e+00 (5.0e-01–inf) | 5.0e-01 (2.5e-01–inf)"
    assert f"| F2SA, the board's | 3 | {gone} | 80,000 |" in text
    assert "| SABA : SABA | 2.00 (1.00–3.00) | 4.00 (2.00–8.00) | 0.50 (0.40–0.60) |" in text
    first = (tmp_path / "board-small.svg").read_bytes()
    assert len(first) < 100_000
    board_page.write(found(), page)
    assert page.read_text() == written
    assert (tmp_path / "board-small.svg").read_bytes() == first


@pytest.fixture
def measure(monkeypatch):
    """The script that runs in the board's environment, without the board."""
    package = types.ModuleType("benchopt.benchmark")
    monkeypatch.setattr(package, "Benchmark", None, raising=False)
    monkeypatch.setitem(sys.modules, "benchopt", types.ModuleType("benchopt"))
    monkeypatch.setitem(sys.modules, "benchopt.benchmark", package)
    monkeypatch.delitem(sys.modules, "measure", raising=False)
    yield importlib.import_module("measure")
    sys.modules.pop("measure", None)


def test_a_folded_batch_has_the_loss_and_the_gradients_of_its_samples(measure, x64):
    del x64
    n, rng = 3 * measure.BATCH, np.random.default_rng(3)
    C, h, a = (jnp.asarray(rng.standard_normal((n, d))) for d in (3, 5, 5))

    def loss(w, lam, start=0, batch_size=1):
        c, k, b = (jax.lax.dynamic_slice_in_dim(x, start, batch_size) for x in (C, h, a))
        return jnp.mean((c @ w) ** 2 + (k @ jnp.concatenate([w, lam])) ** 2 + b[:, :3] @ w + 2)

    w, lam = jnp.arange(1.0, 4), jnp.asarray([0.5, -1.0])
    folded = measure.Folded(loss, n, w, lam)
    for start, size in ((128, 64), (0, n)):
        got, truth = (
            jax.jit(jax.value_and_grad(functools.partial(f, start=start, batch_size=size), (0, 1)))
            for f in (folded, loss)
        )
        problems.assert_close(got(w, lam), truth(w, lam), 1e-10)
    with pytest.raises(ValueError, match="100 samples are no whole number of batches of 64"):
        measure.Folded(loss, 100, w, lam)


def test_the_page_has_its_marks_and_names_figures_that_are_there():
    text = PAGE.read_text()
    board_page.filled(text, "")
    for name in board_page.PROBLEMS:
        picture = f"pictures/board-{name.replace('.', '-')}.svg"
        assert (picture in text) == (PAGE.parent / picture).exists()
