"""What users bring that a plain example lacks: keys in states, absent rows, reused buffers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gradhpo import (
    OneStepOptimizer,
    OnlineHypergradientOptimizer,
    Problem,
    T1T2Optimizer,
    Task,
    solve,
)
from gradhpo.parallel.compilations import CompileCounter
from tests.problems import assert_close
from tests.quick import slow_but
from tests.small import BATCH, OPTIMIZERS, build, start, train_loss, val_loss

NOISY = optax.chain(optax.add_noise(0.01, 0.55, key=jax.random.key(7)), optax.sgd(0.05))
PROBLEM = Problem(start, train_loss, val_loss, batch=lambda key: (BATCH, BATCH))


@pytest.mark.parametrize("name", slow_but(["one-step", "hyperdistill"]))
def test_an_optimizer_with_a_key_in_its_state(name):
    optimizer, rate = build(name, inner_optimizer=NOISY)
    state = optimizer.init(*start())
    for _ in range(2):
        state = optimizer.step(state, BATCH, BATCH, train_loss, val_loss, *rate)
    rate = {"lr_hyper": rate[0]} if rate else {}
    first = solve(PROBLEM, optimizer, 3, jax.random.key(0), **rate)
    whole = solve(PROBLEM, optimizer, 6, jax.random.key(0), **rate)
    resumed = solve(PROBLEM, optimizer, 6, jax.random.key(0), resume=first, **rate)
    assert_close(resumed.state.params, whole.state.params, rtol=0, atol=0)


@pytest.mark.slow
def test_embedding_rows_that_no_batch_has_used_under_adam(x64):
    # Their v is 0, so Adam's derivative there is 1/1e-8; their mixed derivative is 0.
    rng = np.random.default_rng(0)
    params = {"embedding": rng.normal(size=(10, 4)), "out": rng.normal(size=4)}
    rows = np.arange(6)

    def predict(w, rows):
        return w["embedding"][rows] @ w["out"]

    def train(w, lam, rows):
        return jnp.mean((predict(w, rows) - 1) ** 2 * jnp.exp(lam[rows]))

    def val(w, lam, rows):
        return jnp.mean((predict(w, rows) - 2) ** 2)

    adam, arguments = optax.adam(1e-2), (rows, np.arange(10), train, val)
    optimizer = OneStepOptimizer(adam, optax.sgd(0.0))
    state = optimizer.init(params, np.zeros(10))
    for _ in range(5):
        state = optimizer.step(state, *arguments)

    def after(lam):
        gradient = jax.grad(train)(state.params, lam, rows)
        updates, _ = adam.update(gradient, state.inner_opt_state, state.params)
        return val(optax.apply_updates(state.params, updates), lam, np.arange(10))

    h = 1e-5
    shifted = jax.jit(jax.vmap(after))(h * np.concatenate([np.eye(10), -np.eye(10)]))
    expected = np.asarray(shifted[:10] - shifted[10:]) / (2 * h)
    close = {"rtol": 1e-3, "atol": 1e-3 * np.abs(expected).max()}
    for kind in (OneStepOptimizer, T1T2Optimizer):
        found = kind(adam, optax.sgd(0.0)).compute_hypergradient(state, *arguments)
        np.testing.assert_allclose(found, expected, **close)
    assert np.abs(expected).max() > 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", [OneStepOptimizer, T1T2Optimizer])
def test_rectified_adam_before_its_first_rectified_step(kind, x64):
    optimizer = kind(optax.radam(0.01), optax.sgd(0.0))
    state = optimizer.init(*jax.tree.map(lambda x: np.asarray(x, np.float64), start()))
    for _ in range(4):
        state = optimizer.step(state, BATCH, BATCH, train_loss, val_loss)
        assert 0 < float(state.metadata["hypergrad_norm"]) < 10
    inner = optax.radam(0.01)

    def after(lam):
        gradient = jax.grad(train_loss)(state.params, lam, BATCH)
        updates, _ = inner.update(gradient, state.inner_opt_state, state.params)
        return val_loss(state.params + updates, lam, BATCH)

    found = optimizer.compute_hypergradient(state, BATCH, BATCH, train_loss, val_loss)
    lam, h = state.hyperparams, 1e-6
    ahead, behind = lam | {"decay": lam["decay"] + h}, lam | {"decay": lam["decay"] - h}
    slope = np.subtract(*map(jax.jit(after), (ahead, behind))) / (2 * h)
    np.testing.assert_allclose(found["decay"], slope, rtol=1e-4)


def test_differences_on_a_loss_that_takes_bfloat16_only():
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(3, 3, 1, 2)), jnp.bfloat16)
    images = jnp.asarray(np.random.default_rng(1).normal(size=(4, 6, 6, 1)), jnp.bfloat16)

    def outputs(w):
        layout = ("NHWC", "HWIO", "NHWC")
        made = jax.lax.conv_general_dilated(images, w, (1, 1), "SAME", dimension_numbers=layout)
        return made.astype(jnp.float32)

    def train(w, lam, batch):
        return jnp.mean((outputs(w) - 1) ** 2) * jnp.exp(lam)

    def val(w, lam, batch):
        return jnp.mean((outputs(w) - 2) ** 2)

    found, exact = (
        kind(optax.sgd(0.1), optax.sgd(0.0)).compute_hypergradient(
            kind(optax.sgd(0.1), optax.sgd(0.0)).init(kernel, jnp.zeros(())), 0, 0, train, val
        )
        for kind in (T1T2Optimizer, OneStepOptimizer)
    )
    np.testing.assert_allclose(found, exact, rtol=0.15)


@pytest.mark.slow
def test_host_batches_in_a_buffer_that_is_used_again():
    def reused():
        x, y = np.zeros((12, 3), np.float32), np.zeros(12, np.float32)
        for i in range(8):
            x[:], y[:] = BATCH[0] * (i + 1) / 8, BATCH[1]
            yield (x, y), (x, y)

    fresh = [jax.tree.map(np.copy, pair) for pair in reused()]
    optimizer, _ = build("one-step", outer=True)
    problems = [Problem(start, train_loss, val_loss, batches=b) for b in (reused(), fresh)]
    a, b = (solve(problem, optimizer, 8, jax.random.key(0)) for problem in problems)
    np.testing.assert_array_equal(a.metrics["train_loss"], b.metrics["train_loss"])


def test_a_wrong_loss_is_found_before_anything_compiles():
    problem = Problem(start, lambda w, lam, b: w, val_loss, batch=lambda key: (BATCH, BATCH))
    optimizer, _ = build("one-step", outer=True)
    key = jax.random.key(0)
    message = "train_loss_fn must return one floating-point scalar"
    with CompileCounter() as compiled, pytest.raises(ValueError, match=message):
        solve(problem, optimizer, 3, key)
    assert compiled.count == 0


def test_resume_takes_a_solution_of_the_same_run():
    optimizer, _ = build("one-step", outer=True)
    other, _ = build("hyperdistill", outer=True)
    key = jax.random.key(0)
    solution = solve(PROBLEM, optimizer, 3, key)
    batched = solve(PROBLEM, optimizer, 3, jax.random.split(key, 3))
    with pytest.raises(ValueError, match=r"resume must be .* shape \(\), got \(3,\)"):
        solve(PROBLEM, optimizer, 6, key, resume=batched)
    with pytest.raises(ValueError, match=r"resume must be .* shape \(2,\), got \(3,\)"):
        solve(PROBLEM, optimizer, 6, jax.random.split(key, 2), resume=batched)
    with pytest.raises(
        ValueError, match="resume is of a run with no episode_length, and this one has one"
    ):
        solve(PROBLEM, optimizer, 6, key, resume=solution, episode_length=3)
    with pytest.raises(ValueError, match=r"resume lacks the leaf .*metadata"):
        solve(PROBLEM, other, 6, key, resume=solution)
    with pytest.raises(TypeError, match="resume must be a Solution, got BilevelState"):
        solve(PROBLEM, optimizer, 6, key, resume=solution.state)


@pytest.mark.parametrize("name", ["t1t2", "hyperdistill", "greedy"])
def test_gamma_may_be_an_array(name):
    optimizer, rate = build(name, gamma=jnp.asarray(0.5))
    assert type(optimizer.gamma) is float
    optimizer.step(optimizer.init(*start()), BATCH, BATCH, train_loss, val_loss, *rate)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_first_state_may_be_donated(name):
    optimizer, rate = build(name, **({"gamma": 0.5} if name == "t1t2" else {}))

    def step(state):
        return optimizer.advance(state, Task(BATCH, BATCH, train_loss, val_loss), *rate)

    state = optimizer.init(*start())
    jax.block_until_ready(jax.jit(step, donate_argnums=0)(state))


@pytest.mark.slow
def test_hyperdistill_under_a_rate_that_makes_theta_diverge():
    optimizer = OnlineHypergradientOptimizer(optax.sgd(100.0), T=40)
    with pytest.warns(match="stopped being finite"):
        solution = solve(PROBLEM, optimizer, 40, jax.random.key(0), lr_hyper=0.1)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(solution.state.params))
    assert np.isfinite(solution.state.metadata["theta"])
