"""Where a state stands: roughness on a map known to be chaotic, and the advice, in NumPy."""

import io
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradhpo import Task
from gradhpo.inner import InnerStep
from gradhpo.progress import Bar
from gradhpo.regime import Regime, noise
from gradhpo.roughness import along
from gradhpo.spoken import Spoken
from gradhpo.state import BilevelState
from gradhpo.training_length import training_length

STEPS = 40


def loss(w, lam, batch):
    return jnp.sum((w - lam) ** 2) / 2


def logistic(w, lam, batch):
    """The logistic map: chaotic at λ = 3.9 (errors grow by e^0.5 a step), at rest for 2.5."""
    return lam * w * (1 - w)


def walked(lam, update_fn=logistic, size=64):
    w = jnp.linspace(0.1, 0.9, size)
    state = BilevelState.create(w, jnp.asarray(lam))
    task = Task(jnp.zeros(STEPS), 0.0, loss, loss)
    inner = InnerStep(None, update_fn, loss)
    return jax.jit(along, static_argnums=0)(inner, state, task, jnp.ones(()), 1e-4)


def test_a_chaotic_map_is_smooth_for_as_long_as_errors_are_small():
    found = np.asarray(walked(3.9).smoothness)
    # 1e-4 e^{0.5 t} is of the size of the weights after t = 18.
    assert found[:8].min() > 0.9
    # Of three unrelated numbers, the differences have opposite signs more often than not.
    assert found[25:].max() < 0.3


@pytest.mark.slow
def test_a_map_that_comes_to_rest_is_smooth():
    found = walked(2.5)
    np.testing.assert_allclose(found.smoothness, 1, atol=1e-3)
    assert found.val_losses.shape == (STEPS, 3)
    # At rest at 1 - 1/λ.
    for i, lam in enumerate((2.5, 2.5001, 2.5002)):
        expected = 64 * (1 - 1 / lam - lam) ** 2 / 2
        np.testing.assert_allclose(found.val_losses[-1, i], expected, rtol=1e-4)


@pytest.mark.slow
def test_weights_that_do_not_see_lambda_are_smooth():
    found = walked(2.5, lambda w, lam, batch: 0.9 * w)
    np.testing.assert_array_equal(found.smoothness, 1)


@pytest.mark.slow
def test_weights_that_run_away_are_not_smooth():
    found = np.asarray(walked(2.5, lambda w, lam, batch: 1e10 * lam * w).smoothness)
    np.testing.assert_allclose(found[:3], 1, atol=1e-3)
    np.testing.assert_array_equal(found[4:], 0)


@pytest.mark.slow
@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_the_length_of_training_is_that_of_its_learning_rates(rate):
    w = jnp.linspace(0.1, 0.9, 5)
    state = BilevelState.create(w, jnp.asarray(2.0))
    inner = InnerStep(None, lambda w, lam, batch: w - rate * (w - lam), loss)
    found = training_length(inner, state, Task(jnp.zeros(7), 0.0, loss, loss))
    np.testing.assert_allclose(found, 7 * rate, rtol=1e-5)


def regime(smooth=(1.0,) * 8, noise=0.0, falls=0.0, samples=3, promised=-0.2):
    steps = len(smooth)
    train = np.linspace(1, 1 - falls, steps) * np.ones((samples, 1))
    losses = np.asarray([5.0, 4.9, 4.85]) * np.ones((samples, steps, 1))
    each = np.asarray(smooth) * np.ones((samples, 1))
    return Regime(0.01, each, losses, np.full(samples, promised), train, noise)


def test_nothing_is_advised_where_nothing_is_wrong():
    lines = regime().advice(True, ())
    assert lines == [
        "Along the hypergradient: metasmoothness 1.00 after 1, 1.00 after 4, 1.00 after 8 steps "
        "(1: λ moves the weights as on a line; below 0.5: chaos); "
        "a step of 0.01 on λ gets 50% of what it promises."
    ]


def test_chaos_is_told_with_where_it_begins():
    found = regime((1.0, 0.9, 0.6, 0.3, 0.7, np.nan, 0.0, 0.0))
    assert (found.smooth_until, found.chaotic) == (3, True)
    told = "Chaotic beyond 3 steps: truncate there"
    assert f"{told}." in found.advice(False, ())
    assert f"{told}, or PESOptimizer." in found.advice(False, ("PESOptimizer",))
    later = regime((1.0,) * 6 + (0.1,) * 2).advice(False, ("PESOptimizer",))
    assert later[1] == "Chaotic beyond 6 steps: T = 4 is below that; take no longer one."


@pytest.mark.parametrize(("promised", "useful"), [(-0.1, True), (-0.2, False), (-0.05, False)])
def test_chaotic_weights_with_a_loss_that_falls_as_promised_are_told_apart(promised, useful):
    found = regime((1.0, 1.0) + (0.1,) * 6, promised=promised)
    assert found.useful is useful
    (told,) = found.advice(False, ())[1:]
    assert told.startswith("Beyond 2 steps" if useful else "Chaotic beyond 2 steps: truncate")
    assert told.endswith("it is of use." if useful else "there.")


@pytest.mark.parametrize(
    ("noise", "told"),
    [
        (0.2, None),
        (0.5, "Noise: over batches .* 0.5 times .* average 3 batches"),
        (5.0, "Noise dominates: .* 5 times .* average 22 batches"),
        (np.inf, "Noise dominates: .* more than were tried"),
        (np.nan, None),
    ],
)
def test_noise_is_told_with_how_many_batches_it_takes(noise, told):
    import re

    lines = [line for line in regime(noise=noise).advice(False, ()) if line.startswith("Noise")]
    assert bool(lines) == (told is not None)
    assert told is None or re.match(told, lines[0])


def test_the_number_of_batches_gives_the_cosine():
    rng = np.random.default_rng(0)
    mean, n = np.ones(50), int(np.ceil(regime(noise=5.0).batches))
    rows = mean + np.sqrt(5.0) * rng.normal(size=(2000, n, 50))
    means = rows.mean(1)
    cosines = means @ mean / np.linalg.norm(means, axis=1) / np.linalg.norm(mean)
    assert 0.89 < cosines.mean() < 0.92
    assert noise(list(rows[:, 0])) == pytest.approx(5.0, rel=0.1)


def test_noise_of_vectors():
    assert noise([np.ones(3)] * 4) == 0
    assert np.isnan(noise([np.ones(3)]))
    assert noise([np.ones(1), -np.ones(1)]) == np.inf
    assert np.isnan(noise([np.full(1, np.inf), np.ones(1)]))
    # Mean 2, variance 2; the square of the mean is 4 - 2/2.
    assert noise([np.asarray([1.0]), np.asarray([3.0])]) == pytest.approx(2 / 3)


def test_a_falling_training_loss_is_no_minimum():
    assert regime(falls=0.2).falls == pytest.approx(0.2, rel=0.25)
    lines = regime(falls=0.2).advice(True, ())
    assert lines[-1].startswith("Not at a minimum: on the walks the training loss falls by")
    assert len(regime(falls=0.2).advice(False, ())) == 1
    rng = np.random.default_rng(0)  # batches that differ, and no fall
    noisy = Regime(0.01, *[np.ones((4, 8, 3))] * 2, np.ones(4), rng.normal(1, 0.3, (4, 8)), 0.0)
    assert noisy.falls == 0


def test_signs_of_life_come_until_it_is_over(monkeypatch):
    lines, told_so = [], threading.Event()

    def write(text):
        lines.append(text)
        if text.startswith("slow work, for "):
            told_so.set()

    bar = Bar(False, total=1, unit="estimate")
    monkeypatch.setattr(bar, "write", write)
    with Spoken(bar, every=1e-3) as spoken:
        spoken.doing("slow work")
        assert told_so.wait(60)
    told = len(lines)
    assert not spoken._thread.is_alive()
    assert len(lines) == told


def test_silence(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr("sys.stderr", out)
    with Spoken(Bar(False, total=1, unit="estimate"), silent=True, every=1e-3) as spoken:
        spoken.say("done")
        assert not spoken._thread.is_alive()
    assert not out.getvalue()
