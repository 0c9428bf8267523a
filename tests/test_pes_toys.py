"""The two toys of the PES paper: against NumPy, and what each method finds there."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradhpo


@pytest.fixture(scope="module")
def pes():
    """The script."""
    return importlib.import_module("pes")


def summed(theta):
    """The toy's objective at learning rates, in NumPy."""
    x, total = np.ones(2), 0.0
    for t in range(100):
        rate = np.exp(theta[0]) * (100 - t) / 100 + np.exp(theta[1]) * t / 100
        bump = np.exp(-5 * x[0] ** 2)
        down = x[0] / np.sqrt(x[0] ** 2 + 5) - 10 * x[0] * np.sin(x[1]) ** 2 * bump
        across = np.sin(2 * x[1]) * bump + 0.25 * np.sign(x[1] - 100)
        x = x - rate * np.array([down, across])
        bumps = np.sin(x[1]) ** 2 * np.exp(-5 * x[0] ** 2)
        total += np.sqrt(x[0] ** 2 + 5) - np.sqrt(5) + bumps + 0.25 * abs(x[1] - 100)
    return total


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_a_run_and_its_windows_add_up_to_the_objective(pes):
    theta = np.asarray(pes.THETA)
    assert float(pes.objective(jnp.asarray(theta))) == pytest.approx(summed(theta), rel=1e-9)
    problem = gradhpo.Problem(pes.start_toy, pes.loss, pes.loss, batch=pes.nothing)
    optimizer = gradhpo.ESOptimizer(pes.inner, None, pes.K, 2, 1e-9, objective="mean")
    run = gradhpo.solve(
        problem, optimizer, 10, jax.random.key(0), lr_hyper=0.0, episode_length=10, progress=False
    )
    assert pes.K * run.metrics["val_loss"].sum() == pytest.approx(summed(theta), rel=1e-9)


@pytest.mark.slow
def test_on_the_toy_pes_finds_the_valley_and_the_exact_gradient_does_not(pes):
    methods = pes.toy_methods()
    ends = {}
    for name, steps in (("PES, K = 10", 1200), ("exact, T = 100", 1200)):
        optimizer, window = methods[name]
        path = pes.descend(optimizer, window, steps, jax.random.split(jax.random.key(0), 1))
        ends[name] = float(pes.objective(jnp.asarray(path[-1, 0])))
    assert ends["PES, K = 10"] < 700
    assert ends["exact, T = 100"] > 2000


@pytest.mark.slow
def test_pes_balances_influences_and_short_exact_gradients_do_not(pes):
    methods, keys = pes.influence_methods(), jax.random.split(jax.random.key(0), 1)
    ends = {
        name: float(pes.balance(methods[name], 3000, keys)[-1, 0])
        for name in ("PES, K = 1", "exact, K = 10")
    }
    assert ends["PES, K = 1"] == pytest.approx(-1 / 6, abs=1e-3)
    assert ends["exact, K = 10"] > 0.5
