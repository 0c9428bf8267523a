"""The code of the pages in docs/, as it stands there."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradhpo
from tests.problems import assert_close
from tests.small import BATCH, RNG

DOCS = Path(__file__).parent.parent / "docs"
PAGE = DOCS / "schedules.md"
LAM = {
    "peak": {"log_peak": -3.0},
    "ends": {"log_first": -3.0, "log_last": -4.0},
    "cosine": {"log_peak": -3.0, "log_end": -4.0},
    "warmup": {"log_peak": -3.0, "warmup": 2.5},
    "table": {"log_rates": np.linspace(-3, -4, 100)},
    "curve": {"log_knots": np.array([-3.0, -2.5, -4.0]), "log_decay": -4.0},
}
W = RNG.normal(size=3)


def run(page):
    """Return what the page's blocks define, run in order."""
    made = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        exec(compile(block, str(page), "exec"), made)
    return made


def loss(w, lam, batch):
    x, y = batch
    return jnp.mean((x @ w - y) ** 2)


@pytest.mark.parametrize("page", ["models", "trackers"])
@pytest.mark.slow
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(DOCS / f"{page}.md")


def test_every_recipe_is_tried():
    assert set(re.findall(r"^def (\w+)\(l\):", PAGE.read_text(), re.MULTILINE)) == set(LAM)


@pytest.mark.parametrize("name", LAM)
@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_a_recipe_gets_the_gradient_of_a_loop_by_hand(name):
    inner = run(PAGE)[name]
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


@pytest.mark.slow
def test_the_recipes_for_solve_run():
    made = run(DOCS / "recipes.md")
    first, solution = made["first"], made["solution"]
    assert (first.steps, solution.steps) == (30, 60)
    assert solution.metrics["val_loss"][-1] < solution.metrics["val_loss"][0]
    x, y = made["x"], made["y"]
    for logits in (made["net"](x), jax.vmap(made["model"])(x)):
        assert (logits.argmax(-1) == y).mean() > 0.8
