"""The three texts and their model, and the claims on mixtures of them, at a tiny size."""

import importlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from gradhpo import mixture

script = importlib.import_module


@pytest.fixture
def few_rows(monkeypatch):
    """The texts cut to a few rows, and a model that knows the byte before alone."""
    text_domains = script("text_domains")
    cut = {name: rows[:30] for name, rows in text_domains.texts().items()}
    monkeypatch.setattr(text_domains, "texts", lambda: cut)
    monkeypatch.setattr(script("mixture_evidence"), "texts", lambda: cut)

    def loss(table, rows):
        x = rows.astype(int)
        logits = jax.nn.log_softmax(table[x[:, :-1]])
        return -jnp.take_along_axis(logits, x[:, 1:, None], axis=-1).mean((1, 2))

    table = jnp.zeros((text_domains.BYTES, text_domains.BYTES))
    monkeypatch.setattr(text_domains, "model", lambda width: ((lambda key: table), loss))


def test_windows_are_the_text_without_its_end():
    text_domains = script("text_domains")
    text = "".join(map(chr, range(32, 127))) + "é"
    rows = text_domains.windows(text)
    assert rows.shape == (2, text_domains.LENGTH + 1)
    assert rows.tobytes().decode() == text[:66]
    assert text_domains.windows("é" * 33).max() < text_domains.BYTES


def test_docstrings_are_those_of_the_module_and_of_what_it_holds(tmp_path):
    (tmp_path / "m.py").write_text(
        '"""one"""\nx = "no"\nclass A:\n    """two"""\n    def f(self):\n        "three"\n'
    )
    assert script("text_domains").docstrings(tmp_path / "m.py").split() == ["one", "two", "three"]


def test_no_row_for_test_is_trained_on():
    rows = script("text_domains").texts()
    assert set(rows) == {"python", "reference", "licences", "validation", "test"}
    assert abs(len(rows["validation"]) - len(rows["test"])) <= 1
    seen = {row.tobytes() for name in rows if name != "test" for row in rows[name]}
    shared = [row for row in rows["test"] if row.tobytes() in seen]
    assert len(shared) < 0.02 * len(rows["test"])
    assert all(part.max() < script("text_domains").BYTES for part in rows.values())


def test_a_missing_text_is_named(tmp_path, monkeypatch):
    text_domains = script("text_domains")
    monkeypatch.setattr(text_domains, "LICENCES", tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="nowhere is missing: Debian's package base-files"):
        text_domains.texts.__wrapped__()


@pytest.mark.parametrize(("width", "weights"), [(32, 50_176), (64, 182_272)])
def test_the_models_have_as_many_weights_as_the_page_says(width, weights):
    init, loss = script("text_domains").model(width)
    shapes = jax.eval_shape(init, jax.random.key(0))
    assert sum(x.size for x in jax.tree.leaves(shapes)) == weights
    rows = jax.ShapeDtypeStruct((5, 33), np.uint8)
    assert jax.eval_shape(loss, shapes, rows).shape == (5,)


@pytest.mark.slow
@pytest.mark.usefixtures("few_rows")
def test_the_first_claims_are_printed(monkeypatch):
    ways = [*mixture.comparison.BASELINES, "One-Step"]
    weights, losses = np.full((2, 3), 1 / 3), dict.fromkeys(ways, np.ones(2))
    flops = {**dict.fromkeys(ways, 50.0), "swarm": 1000.0}
    names, grid = ("python", "reference", "licences"), mixture.simplex_grid(3, 1)
    given = [names, "test", dict.fromkeys(ways, weights), losses, flops, 10.0, grid, None, {}]
    made = mixture.Comparison(*given)
    monkeypatch.setattr(mixture, "compare", lambda mix, tuners, *_, **settings: made)
    app = typer.Typer()
    app.command()(script("mixture_evidence").main)
    done = CliRunner().invoke(app, ["--steps", "4", "--seeds", "1", "--rows", "3"])
    assert done.exit_code == 0, done.exception
    said = " ".join(done.output.split())
    assert "FLOPs of One-Step, of the swarm's: 5.0%." in said
    assert "1.0000 ± 0.0000" in said
    assert "python │ reference │ licences │ random bytes" in re.sub(r"[┃|]", "│", said)


@pytest.mark.slow
@pytest.mark.usefixtures("few_rows")
@pytest.mark.parametrize("method", ["uniform", "One-Step", "HyperDistill", "swarm"])
def test_every_way_is_judged_by_the_same_models(monkeypatch, method):
    evidence, claims, trained = script("mixture_evidence"), script("claims"), []

    def train_fixed(mix, every, inner, steps, keys):
        trained.append((np.asarray(every), jax.random.key_data(keys)))
        third = np.asarray(every)[:, 2]
        return {"target/manual": -third, "test": third + np.arange(len(every)) % 2}

    monkeypatch.setattr(mixture, "train_fixed", train_fixed)
    settings = claims.load("mixture-swarm").settings_of("texts", tiny=True)
    keys = jax.random.split(jax.random.key(0), 2)
    found = evidence.evidence(settings, method, keys)
    every, fresh = trained[-1]
    assert every.shape == (4, 3)
    assert len(np.unique(fresh, axis=0)) == 4
    own = jax.random.split(jax.random.split(keys[0])[1], 2)
    assert np.array_equal(fresh[:2], jax.random.key_data(own))
    np.testing.assert_allclose(found["test_loss"], every[::2, 2] + 0.5)
    np.testing.assert_allclose(found["licences"], every[::2, 2])
    if method == "swarm":
        assert [len(each) for each, _ in trained] == [6, 4]  # three corners, two seeds
        assert found["licences"].tolist() == [1, 1]
    costs = {"uniform": (0, 0), "One-Step": (4, 6), "HyperDistill": (5, 7), "swarm": (3, 3)}
    low, high = costs[method]
    assert low <= found["cost"][0] <= high


@pytest.mark.slow
@pytest.mark.usefixtures("few_rows")
def test_a_changed_domain_begins_with_its_share():
    evidence, began = script("mixture_evidence"), []
    tuned = evidence.tuned

    def watched(mix, steps, *more):
        began.append((steps, mix.first_weights.tolist(), mix.domains["reference"], more[1:]))
        return tuned(mix, steps, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evidence, "tuned", watched)
        settings = {"part": "changed", "steps": 4, "rows": 3, "pricing_rate": 0.2}
        keys = jax.random.split(jax.random.key(0), 1)
        found = evidence.evidence(settings, "priced anew", keys)
    (_, uniform, text, _), (steps, again, noise, rates) = began
    assert (steps, rates) == (1, (0.2,))
    assert uniform == pytest.approx([1 / 3] * 3)
    assert again[1] == pytest.approx(1 / 3)
    assert not np.array_equal(text, noise)
    assert found["end"].shape == found["mean"].shape == (1,)
    assert 100 * 0.005 <= found["end"][0] <= 100


@pytest.mark.slow
@pytest.mark.usefixtures("few_rows")
def test_the_place_of_a_mixture_is_counted_in_the_larger_model(monkeypatch):
    evidence, trained = script("mixture_evidence"), []
    losses = iter([[3.0, 1.0, 2.0, 9.0, 9.0], [6.0, 4.0, 5.0, 8.0, 4.5]])

    def train_fixed(mix, every, inner, steps, keys):
        trained.append(np.asarray(every))
        return {"test": np.asarray(next(losses))}

    monkeypatch.setattr(evidence.mixture, "train_fixed", train_fixed)
    settings = {"steps": 4, "rows": 3, "parts": 1, "widths": [16, 16]}
    found = evidence.transfer(settings, "One-Step", jax.random.split(jax.random.key(0), 1))
    assert found["correlation"] == pytest.approx([1.0])
    assert found["place"].tolist() == [2]
    assert (found["best"], found["uniform"], found["found"]) == ([4.0], [8.0], [4.5])
    np.testing.assert_allclose(trained[0][-1], found["weights"][0])
