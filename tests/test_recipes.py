"""The code of the pages in docs/, as it stands there."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradhpo
from tests.small import BATCH, RNG

pytestmark = pytest.mark.usefixtures("only_x64")

PAGE = Path(__file__).parent.parent / "docs" / "schedules.md"
LAM = {
    "peak": {"log_peak": -3.0},
    "ends": {"log_first": -3.0, "log_last": -4.0},
    "cosine": {"log_peak": -3.0, "log_end": -4.0},
    "warmup": {"log_peak": -3.0, "warmup": 2.5},
    "table": {"log_rates": np.linspace(-3, -4, 100)},
    "curve": {"log_knots": np.array([-3.0, -2.5, -4.0]), "log_decay": -4.0},
}
W = RNG.normal(size=3)


def recipes():
    """What the page's blocks define, run in order."""
    made = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        exec(compile(block, str(PAGE), "exec"), made)
    return made


def loss(w, lam, batch):
    x, y = batch
    return jnp.mean((x @ w - y) ** 2)


@pytest.mark.parametrize("page", ["models"])
def test_the_code_of_a_page_runs(page):
    text, made = (PAGE.parent / f"{page}.md").read_text(), {}
    with jax.enable_x64(False):
        for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
            exec(compile(block, page, "exec"), made)


def test_every_recipe_is_tried():
    assert set(re.findall(r"^def (\w+)\(l\):", PAGE.read_text(), re.MULTILINE)) == set(LAM)


@pytest.mark.parametrize("name", LAM)
def test_a_recipe_gets_the_gradient_of_a_loop_by_hand(name):
    inner = recipes()[name]
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
    for got, right in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, right, rtol=1e-9, atol=1e-12)
        assert np.abs(right).max() > 0
