"""The network of the PES paper: its parts against NumPy, and the script on a few small images."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from typer.testing import CliRunner

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def fashion():
    """The script."""
    return importlib.import_module("pes_fashion")


@pytest.fixture
def folder(tmp_path):
    """A folder with four IDX files of 35 + 7 images of 4x4."""
    for name, count in (("train", 35), ("t10k", 7)):
        images = RNG.integers(0, 256, (count, 4, 4), np.uint8)
        labels = RNG.integers(0, 10, count).astype(np.uint8)
        for values, kind in ((images, "images-idx3"), (labels, "labels-idx1")):
            header = bytes([0, 0, 8, values.ndim]) + np.asarray(values.shape, ">u4").tobytes()
            (tmp_path / f"{name}-{kind}-ubyte").write_bytes(header + values.tobytes())
    return tmp_path


def invoke(fashion, *arguments):
    import typer

    app = typer.Typer()
    app.command()(fashion.main)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_images_are_halved_and_the_last_seventh_is_left(fashion, folder):
    raw = np.frombuffer((folder / "train-images-idx3-ubyte").read_bytes()[16:], np.uint8)
    first = raw[:16].reshape(2, 2, 2, 2).mean((1, 3)).ravel()
    images = fashion.load(folder)
    assert {name: part.x.shape for name, part in images.items()} == {
        "train": (30, 4),
        "val": (6, 4),
    }
    np.testing.assert_allclose(images["train"].x[0], first, atol=1)


@pytest.mark.usefixtures("x64")
def test_the_inner_optimizer_is_momentum_for_each_array(fashion):
    params = [jnp.asarray(RNG.normal(size=shape)) for shape in ((3, 2), (2,))]
    lam = {"log_rate": jnp.log(jnp.asarray([0.1, 0.3])), "logit_momentum": jnp.asarray([0.0, 2.0])}
    optimizer = fashion.inner(lam)
    state, got, expected = optimizer.init(params), params, [np.asarray(p) for p in params]
    traces, rates = [np.zeros_like(p) for p in expected], (0.1, 0.3)
    for _ in range(3):
        grads = [jnp.asarray(RNG.normal(size=p.shape)) for p in params]
        updates, state = optimizer.update(grads, state, got)
        got = optax.apply_updates(got, updates)
        keeps = 1 / (1 + np.exp(-np.asarray([0.0, 2.0])))
        traces = [m * t + np.asarray(g) for m, t, g in zip(keeps, traces, grads, strict=True)]
        expected = [p - r * t for p, r, t in zip(expected, rates, traces, strict=True)]
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)


def test_lambda_starts_in_its_range(fashion):
    params, lam = fashion.start(jax.random.key(0), 4, 3)
    assert [p.shape for p in params[:3]] == [(4, 3), (3,), (3, 3)]
    assert len(params) == 12
    rates, momenta = np.exp(lam["log_rate"]), 1 / (1 + np.exp(-np.asarray(lam["logit_momentum"])))
    assert rates.shape == momenta.shape == (12,)
    assert 1e-4 <= rates.min() < rates.max() <= 1e-2
    assert 0.01 <= momenta.min() < momenta.max() <= 0.9


def test_missing_data_is_said_with_how_to_get_it(fashion, folder):
    (folder / "t10k-labels-idx1-ubyte").unlink()
    figure = folder / "x.png"
    result = invoke(fashion, "--data", folder, "--output", figure)
    assert result.exit_code == 0
    assert "t10k-labels-idx1-ubyte" in result.output.replace("\n", "")
    assert "dataset-fashion-mnist" in result.output
    assert not figure.exists()


@pytest.mark.slow
def test_the_script_runs(fashion, folder, monkeypatch):
    few = fashion.methods(fashion.Setting(20, width=3))
    chosen = {name: few[name] for name in ("PES, K = 10", "One-Step")}
    monkeypatch.setattr(fashion, "methods", lambda setting: chosen)
    figure = folder / "x.png"
    sizes = ["--steps", 10, "--horizon", 20, "--width", 3, "--points", 2]
    result = invoke(
        fashion, "--data", folder, *sizes, "--seeds", 1, "--runs", 1, "--output", figure
    )
    assert result.exit_code == 0, result.output
    for name in (*chosen, "random search"):
        assert name in result.output
    assert figure.stat().st_size > 10_000
