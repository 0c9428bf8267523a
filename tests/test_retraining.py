"""`Solution.schedule`: λ(t) of a run, for a training without gradhpo."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradhpo
from gradhpo import Problem, solve
from tests.small import BATCH, build, start, train_loss, val_loss

KEY = jax.random.key(7)
OPTIMIZER = build("one-step", outer=True)[0]
PROBLEM = Problem(start, train_loss, val_loss, lambda key: (BATCH, BATCH))


@pytest.mark.slow
def test_a_schedule_is_exact_at_every_step(x64):
    """λ is the rate itself: a loop with the schedule takes the steps of the run to 1e-12."""

    def loss(w, lam, batch):
        return train_loss(w, {"l": 0, "decay": -3.0}, batch)

    problem = Problem(
        lambda key: (jnp.ones(3), {"rate": jnp.asarray(0.01)}),
        loss,
        lambda w, lam, batch: val_loss(w, {"l": jnp.zeros(3)}, batch),
        lambda key: (BATCH, BATCH),
    )
    tuner = gradhpo.OneStepOptimizer(lambda lam: optax.adam(lam["rate"]), optax.sgd(1e-3))
    found = solve(problem, tuner, 9, KEY)
    assert len(set(found.record["rate"].tolist())) == 9
    rate = found.schedule("rate")
    optimizer, w = optax.adam(rate), jnp.ones(3)
    state = optimizer.init(w)

    @jax.jit
    def step(w, state):
        updates, state = optimizer.update(jax.grad(loss)(w, None, BATCH), state, w)
        return optax.apply_updates(w, updates), state

    for _ in range(9):
        w, state = step(w, state)
    np.testing.assert_allclose(w, found.state.params, rtol=1e-12)
    assert rate(0) == 0.01
    assert rate(100) == found.record["rate"][-1]
    np.testing.assert_array_equal(jax.jit(jax.vmap(rate))(jnp.arange(1, 10)), found.record["rate"])


@pytest.mark.slow
def test_a_resumed_run_has_the_schedule_of_the_whole():
    whole = solve(PROBLEM, OPTIMIZER, 9, KEY).schedule("decay", jnp.exp)
    part = solve(PROBLEM, OPTIMIZER, 4, KEY)
    found = solve(PROBLEM, OPTIMIZER, 9, KEY, resume=part).schedule("decay", jnp.exp)
    counts = jnp.arange(12)
    np.testing.assert_array_equal(jax.vmap(found)(counts), jax.vmap(whole)(counts))
    assert whole(0) == jnp.exp(-3.0)


@pytest.mark.slow
def test_runs_of_a_batch_and_leaves_that_are_no_scalars():
    keys = jax.random.split(KEY, 3)
    found = solve(PROBLEM, OPTIMIZER, 5, keys, record=["l"])
    np.testing.assert_array_equal(found.schedule("l", run=2)(4), found.record["l"][3, 2])
    np.testing.assert_array_equal(found.schedule("l", run=1)(0), jnp.ones(3))
    with pytest.raises(ValueError, match="run must be one of 3 runs, got None"):
        found.schedule("l")
    with pytest.raises(ValueError, match="run must be one of 3 runs, got 3"):
        found.schedule("l", run=3)
    with pytest.raises(ValueError, match="name must be one of what was recorded, 'l'; got 'lr'"):
        found.schedule("lr", run=0)
    with pytest.raises(ValueError, match="run must be None: there is one run, got 0"):
        solve(PROBLEM, OPTIMIZER, 5, KEY).schedule("decay", run=0)


@pytest.mark.slow
def test_a_diverged_run_ends_before_that():
    def loss(w, lam, batch):
        return train_loss(w, lam, batch) + jnp.where(lam["decay"] < -2.85, 0, jnp.nan)

    problem = Problem(start, loss, val_loss, lambda key: (BATCH, BATCH))
    with pytest.warns(gradhpo.DivergenceWarning):
        found = solve(problem, OPTIMIZER, 40, jax.random.split(KEY, 2))
    decay = found.schedule("decay", run=0)
    last = int(found.diverged_at[0]) - 1
    assert np.isnan(found.record["decay"][last:, 0]).all()
    assert decay(39) == found.record["decay"][last - 1, 0]
