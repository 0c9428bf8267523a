"""The schedules of docs/schedules.md have the gradients of a loop by hand."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradhpo
from tests import pages
from tests.problems import assert_close
from tests.small import BATCH, RNG

LAM = {
    "peak": {"log_peak": -3.0},
    "ends": {"log_first": -3.0, "log_last": -4.0},
    "cosine": {"log_peak": -3.0, "log_end": -4.0},
    "warmup": {"log_peak": -3.0, "warmup": 2.5},
    "table": {"log_rates": np.linspace(-3, -4, 100)},
    "curve": {"log_knots": np.array([-3.0, -2.5, -4.0]), "log_decay": -4.0},
}
W = RNG.normal(size=3)


def loss(w, lam, batch):
    x, y = batch
    return jnp.mean((x @ w - y) ** 2)


def test_every_recipe_is_tried():
    assert set(re.findall(r"^def (\w+)\(l\):", pages.text("schedules"), re.MULTILINE)) == set(LAM)


@pytest.mark.parametrize("name", LAM)
@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_a_recipe_gets_the_gradient_of_a_loop_by_hand(name):
    inner = pages.run("schedules")[name]
    lam = jax.tree.map(lambda x: jnp.asarray(x, float), LAM[name])
    optimizer = gradhpo.UnrolledOptimizer(inner, unroll_steps=4)
    state = optimizer.init(jnp.asarray(W), lam)
    found = optimizer.compute_hypergradient(state, BATCH, BATCH, loss, loss)

    def objective(lam):
        w, s = jnp.asarray(W), inner(lam).init(jnp.asarray(W))
        for _ in range(4):
            updates, s = inner(lam).update(jax.grad(loss)(w, lam, BATCH), s, w)
            w = w + updates
        return loss(w, lam, BATCH)

    expected = jax.grad(objective)(lam)
    assert_close(found, expected, rtol=1e-9)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(expected))
