"""The papers' scripts: their numbers against NumPy, their data, and that they run."""

import gzip
import importlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import stats
from typer.testing import CliRunner


def script(name):
    return importlib.import_module(name)


def invoke(name, *arguments):
    import typer

    app = typer.Typer()
    app.command()(script(name).main)
    return CliRunner().invoke(app, arguments)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("name", "reading"),
    list(itertools.product(["full", "IFT(5)", "T1-T2", "Greedy 0.5"], ["anew", "on"])),
)
def test_toy_against_a_numpy_loop(name, reading):
    toy = script("toy")
    T, outer, eta, G = 5, 6, 0.1, np.asarray([1.0, 0.5])
    w_0, lam = np.asarray([2.0, 2.0]), np.asarray([1.0, 1.0])
    trace = toy.descend(toy.methods(T)[name], T, outer, reading, w_0[None], lam[None])
    w, losses, cosines = w_0, [], []
    for _ in range(outer):
        greedy = np.zeros(2)
        for _ in range(T):
            w = w - eta * G * (w - lam)
            alpha = 2 * w + 20 * np.sin(w) * np.cos(w)
            greedy = 0.5 * greedy + eta * G * alpha
        exact = (1 - (1 - eta * G) ** T) * alpha
        g = {
            "full": exact,
            "IFT(5)": (1 - (1 - eta * G) ** 5) * alpha,
            "T1-T2": eta * G * alpha,
            "Greedy 0.5": greedy,
        }[name]
        losses.append(np.sum(w**2 + 10 * np.sin(w) ** 2))
        cosines.append(g @ exact / np.linalg.norm(g) / np.linalg.norm(exact))
        lam = lam - eta * g
        w = w_0 if reading == "anew" else w
    np.testing.assert_allclose(trace.val_loss[0], losses, rtol=1e-9)
    np.testing.assert_allclose(trace.cosine[0], cosines, rtol=1e-9)


@pytest.mark.slow
def test_toy_begins_at_the_papers_start():
    w_0, lam_0 = script("toy").starts(jax.random.key(0), 4)
    assert w_0[0].tolist() == [2, 2]
    assert lam_0[0].tolist() == [1, 1]
    assert len(np.unique(w_0, axis=0)) == 4


def test_sinusoid_tasks():
    sinusoid = script("sinusoid")
    tasks = sinusoid.draw_tasks(jax.random.key(0), 4000)
    for values, low, high in ((tasks.amplitude, 0.1, 5.0), (tasks.phase, 0.0, np.pi)):
        uniform = stats.kstest(np.asarray(values), stats.uniform(low, high - low).cdf)
        assert uniform.pvalue > 0.01
    assert abs(np.corrcoef(tasks.amplitude, tasks.phase)[0, 1]) < 0.05
    points = sinusoid.draw_points(jax.random.key(1), tasks, 10)
    assert points.x.shape == points.y.shape == (4000, 10)
    assert -5 <= points.x.min() < -4.9
    assert 4.9 < points.x.max() <= 5
    expected = np.asarray(tasks.amplitude)[:, None] * np.sin(
        np.asarray(points.x) - np.asarray(tasks.phase)[:, None]
    )
    np.testing.assert_allclose(points.y, expected, atol=1e-5)


@pytest.mark.parametrize("resampled", [False, True])
@pytest.mark.slow
def test_sinusoid_shots_stay_or_are_resampled_but_tasks_stay(resampled):
    sinusoid = script("sinusoid")
    reading = sinusoid.Reading(resampled=resampled, validation=7)
    trains, val = sinusoid.episode_data(jax.random.key(0), reading)
    assert trains.x.shape == (30, 10, 10)
    assert val.x.shape == (10, 7)
    assert bool((trains.x[0] == trains.x[1]).all()) is not resampled
    which = jax.random.split(jax.random.key(0), 3)[0]
    tasks = sinusoid.draw_tasks(which, 10)
    wave = tasks.amplitude[:, None] * jnp.sin(trains.x - tasks.phase[:, None])
    np.testing.assert_allclose(trains.y, wave, atol=1e-5)


@pytest.mark.slow
def test_sinusoid_adapts_each_task_on_its_own():
    """The gradient of the summed loss in a task's weights is that of the task alone."""
    sinusoid = script("sinusoid")
    *lam, w = sinusoid.init_layers(jax.random.key(0), "torch")
    tasks = sinusoid.draw_tasks(jax.random.key(1), 3)
    points = sinusoid.draw_points(jax.random.key(2), tasks, 10)
    stacked = jax.tree.map(lambda x: jnp.stack([x] * 3), w)
    together = jax.grad(sinusoid.train_loss)(stacked, lam, points)
    for i in range(3):
        alone, own = (jax.tree.map(lambda x: x[i : i + 1], tree) for tree in (stacked, points))  # noqa: B023
        expected = jax.grad(sinusoid.train_loss)(alone, lam, own)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a[i], b[0], rtol=1e-4, atol=1e-6),  # noqa: B023
            together,
            expected,
        )


@pytest.mark.parametrize(("side", "stride"), [(8, 1), (28, 2), (7, 2)])
def test_a_convolution_of_one_channel_is_a_product_with_patches(side, stride):
    conv = nnx.Conv(1, 8, (3, 3), stride, padding=1, rngs=nnx.Rngs(1))
    conv.bias[...] = jnp.arange(8.0)
    x = jax.random.normal(jax.random.key(0), (3, side, side, 1))
    found = script("hypercleaning").of_one_channel(conv, x)
    np.testing.assert_allclose(found, conv(x), rtol=1e-5, atol=1e-5)


def test_gamma_is_chosen_on_validation_tasks_not_on_test_tasks():
    sinusoid = script("sinusoid")
    traces = {
        "HyperDistill 0.9": sinusoid.Trace(np.ones(2), 2 * np.ones(2), np.ones((2, 1))),
        "HyperDistill 0.99": sinusoid.Trace(2 * np.ones(2), np.ones(2), np.ones((2, 1))),
        "HyperDistill 1": sinusoid.Trace(np.zeros(2), np.full(2, np.nan), np.ones((2, 1))),
        "FO": sinusoid.Trace(np.zeros(2), np.zeros(2), np.ones((2, 1))),
    }
    assert sinusoid.choose_gamma(traces) == "HyperDistill 0.99"


IMAGES = np.random.default_rng(0).integers(0, 256, (5, 4, 4), np.uint8)
LABELS = np.asarray([3, 1, 9, 0, 7], np.uint8)


def idx(values):
    header = bytes([0, 0, 8, values.ndim]) + np.asarray(values.shape, ">u4").tobytes()
    return header + values.tobytes()


def write_mnist(folder, compress=False):
    sets = {"train": (IMAGES, LABELS), "t10k": (IMAGES[:2] // 2, LABELS[:2])}
    for name, (images, labels) in sets.items():
        for values, kind in ((images, "images-idx3"), (labels, "labels-idx1")):
            raw, ending = idx(values), ".gz" if compress else ""
            path = folder / f"{name}-{kind}-ubyte{ending}"
            path.write_bytes(gzip.compress(raw) if compress else raw)


@pytest.mark.parametrize("compress", [False, True])
def test_mnist_files(tmp_path, compress):
    write_mnist(tmp_path, compress)
    (images, labels), (test_images, test_labels) = script("mnist").parts(tmp_path)
    np.testing.assert_array_equal(images[..., 0], IMAGES)
    np.testing.assert_array_equal(test_images[..., 0], IMAGES[:2] // 2)
    assert labels.tolist() == LABELS.tolist()
    assert test_labels.tolist() == LABELS[:2].tolist()


def spoil(folder, how):
    images = folder / "train-images-idx3-ubyte"
    labels = folder / "t10k-labels-idx1-ubyte"
    raw = images.read_bytes()
    if how == "missing":
        labels.unlink()
    elif how == "cut":
        images.write_bytes(raw[:-1])
    elif how == "header":
        images.write_bytes(raw[:9])
    elif how == "long":
        images.write_bytes(raw + b"0")
    elif how == "empty":
        images.write_bytes(b"")
    elif how == "swapped":
        images.write_bytes(labels.read_bytes())
    elif how == "count":
        labels.write_bytes(idx(LABELS[:1]))
    elif how == "label":
        labels.write_bytes(idx(LABELS[:2] + 10))
    elif how == "gzip":
        images.unlink()
        images.with_name(images.name + ".gz").write_bytes(gzip.compress(raw)[:-20])


@pytest.mark.parametrize(
    ("how", "error", "match"),
    [
        ("missing", FileNotFoundError, "t10k-labels-idx1-ubyte"),
        ("cut", ValueError, "train-images-idx3-ubyte is cut.*80 bytes; there are 79"),
        ("header", ValueError, "header has 16 bytes, there are 9"),
        ("long", ValueError, "left over"),
        ("empty", ValueError, "begins with nothing"),
        ("swapped", ValueError, "00 00 08 01, not 00 00 08 03"),
        ("count", ValueError, "2 images.*1 labels"),
        ("label", ValueError, "labels 0 to 9"),
        ("gzip", ValueError, "not a whole gzip file"),
    ],
)
def test_a_wrong_mnist_file_is_named(tmp_path, monkeypatch, how, error, match):
    folder = tmp_path / "mnist"
    folder.mkdir()
    write_mnist(folder)
    spoil(folder, how)
    with pytest.raises(error, match=match):
        script("mnist").parts(folder)
    monkeypatch.setenv("GRADHPO_DATA_SETS", str(tmp_path))
    result = invoke("hyperclean", "--data", "mnist", "--output", str(tmp_path / "x.png"))
    assert result.exit_code == 2


@pytest.mark.parametrize("name", ["toy", "sinusoid", "hyperclean", "cosine"])
def test_an_output_that_cannot_be_written_is_said_before_computing(tmp_path, name):
    (tmp_path / "file").touch()
    for output in (tmp_path / "file" / "x.png", tmp_path / "x.nonsense", tmp_path):
        assert invoke(name, "--output", str(output)).exit_code == 2
    assert not (tmp_path / "x.nonsense").exists()


def test_intervals_are_students():
    report = script("report")
    values = [1.0, 2.0, 4.0, 5.0]
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    assert report.half_width(values) == pytest.approx((high - low) / 2)
    assert report.interval([1.0, np.nan, 1.0]) == "1.000 ± 0.000 (1/3 diverged)"
    assert report.interval([np.nan]) == "diverged"


class Linear(nnx.Module):
    """A model in place of the CNN, which the demo of hyper-cleaning compiles."""

    side = 8

    def __init__(self, strides, rngs):
        self.out = nnx.Linear(self.side**2, 10, rngs=rngs)

    def __call__(self, x):
        return self.out(x.reshape(len(x), self.side**2))


def few(name, monkeypatch):
    """Leave a script some of its methods, readings and images, and a small model."""
    module = script(name)
    if name == "cosine":
        monkeypatch.setattr(module, "GAMMAS", (0.0, 0.99))
        monkeypatch.setattr(script("sinusoid"), "READINGS", script("sinusoid").READINGS[:1])
        return
    every, some = module.methods, ("full", "no HPO", "T1-T2", "IFT(5)", "Greedy 0.9")
    monkeypatch.setattr(
        module, "methods", lambda *T: {n: made for n, made in every(*T).items() if n in some}
    )
    if name == "toy":
        monkeypatch.setattr(module, "READINGS", {"on": module.READINGS["on"]})
    else:
        monkeypatch.setattr(script("hypercleaning"), "CNN", Linear)
        x, y, _ = script("data_sets").read("digits")
        small = script("data_sets").DataSet(x[:150], y[:150])
        monkeypatch.setattr(script("data_sets"), "read", lambda name: small)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("toy", ["--outer-steps", "4", "--seeds", "2"], ["Greedy 0.9", "IFT(5)", "Published"]),
        (
            "hyperclean",
            ["--train", "40", "--validation", "20", "--outer-steps", "2", "--seeds", "2"],
            ["77.7", "Greedy above T1-T2"],
        ),
        ("cosine", ["--episodes", "2", "--seeds", "2"], ["HyperDistill 0.99", "second order"]),
    ],
)
def test_the_scripts_run(tmp_path, monkeypatch, name, settings, words):
    few(name, monkeypatch)
    figure = tmp_path / "figure.png"
    result = invoke(name, *settings, "--output", str(figure))
    assert result.exit_code == 0, result.output
    for word in words:
        assert word in result.output
    assert figure.stat().st_size > 10_000
