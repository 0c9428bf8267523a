import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradhpo
from gradhpo import DivergenceWarning, Problem, solve
from gradhpo.parallel.compilations import CompileCounter
from tests.problems import assert_same_bits
from tests.quick import slow_but
from tests.small import BATCH, X, Y, build, start, train_loss, val_loss

KEY = jax.random.key(7)
KEYS = jax.random.split(KEY, 3)


def batch(key):
    rows = jax.random.choice(key, len(X), (2, 6))
    x, y = jnp.asarray(X)[rows], jnp.asarray(Y)[rows]
    return (x[0], y[0]), (x[1], y[1])


def metrics(params, hyperparams):
    return {"first": params[0], "decay": hyperparams["decay"]}


PROBLEM = Problem(start, train_loss, val_loss, batch=batch, metrics=metrics)


def host_pairs(rng):
    while True:
        rows = rng.choice(len(X), (2, 6))
        yield (X[rows[0]], Y[rows[0]]), (X[rows[1]], Y[rows[1]])


@pytest.mark.parametrize("name", slow_but(["one-step", "hyperdistill", "greedy"], "one-step"))
def test_solve_is_a_loop_of_steps_with_metrics_of_each(name, x64):
    optimizer, step_rate = build(name)
    with_rate = {"lr_hyper": step_rate[0]} if step_rate else {}
    problem = Problem(start, train_loss, val_loss, batch=lambda key: (BATCH, BATCH))
    solution = solve(problem, optimizer, 6, KEY, **with_rate)
    state, losses = optimizer.init(*problem.start(KEY)), []
    if name == "hyperdistill":
        theta = optimizer.estimate_theta(state, [BATCH] * optimizer.T, BATCH, train_loss, val_loss)
        state = state.update(metadata={"theta": theta})
    for _ in range(6):
        state = optimizer.step(state, BATCH, BATCH, train_loss, val_loss, *step_rate)
        losses.append(state.get_metric("val_loss"))
    np.testing.assert_allclose(solution.metrics["val_loss"], losses, rtol=1e-9)
    np.testing.assert_allclose(solution.state.params, state.params, rtol=1e-9)
    assert solution.steps == 6
    assert all(rows.shape == (6,) for rows in solution.metrics.values())


@pytest.mark.slow
def test_episodes_are_those_of_run(x64):
    optimizer, _ = build("one-step", outer=True)
    problem = Problem(start, train_loss, val_loss, batch=lambda key: (BATCH, BATCH))
    solution = solve(problem, optimizer, 12, KEY, episode_length=4, lr_reptile=0.5)
    draw = (lambda: BATCH, lambda: BATCH)
    state = optimizer.init(*problem.start(KEY))
    state = optimizer.run(state, 3, 4, *draw, train_loss, val_loss, lr_reptile=0.5)
    np.testing.assert_allclose(solution.state.params, state.params, rtol=1e-12)
    np.testing.assert_allclose(solution.phi, state.params, rtol=1e-12)


@pytest.mark.parametrize("name", slow_but(["one-step", "hyperdistill", "greedy"], "one-step"))
def test_one_compile_of_the_chunk_whatever_the_number_of_steps(name):
    optimizer, _ = build(name, outer=True)
    other = jax.random.key(1)
    with CompileCounter() as first:
        solve(PROBLEM, optimizer, 5, KEY)
    assert first.count <= 4  # init, chunk, evaluate, and HyperDistill's θ
    with CompileCounter() as second:
        solve(PROBLEM, optimizer, 1234, other, eval_every=500)
    assert second.count == 0


@pytest.mark.parametrize(
    ("name", "episode_length", "runs"),
    slow_but(
        [
            ("hyperdistill", 4, "one"),
            ("hyperdistill", None, "batch"),
            ("one-step", 4, "batch"),
            ("greedy", None, "one"),
        ],
        ("hyperdistill", 4, "one"),
    ),
)
def test_same_key_same_bits_and_a_resumed_run_too(name, episode_length, runs):
    key, settings = {"one": KEY, "batch": KEYS}[runs], {}
    if name == "hyperdistill" and episode_length:
        settings = {"estimation_period": 2, "T": episode_length}
    optimizer, _ = build(name, outer=True, **settings)
    settings = {"episode_length": episode_length, "eval_every": 5}
    whole = solve(PROBLEM, optimizer, 21, key, **settings)
    part = solve(PROBLEM, optimizer, 10, key, **settings)
    resumed = solve(PROBLEM, optimizer, 21, key, resume=part, **settings)
    assert_same_bits(whole, resumed)
    assert whole.eval_steps.tolist() == [5, 10, 15, 20, 21]


@pytest.mark.parametrize("name", ["hyperdistill", "greedy"])
@pytest.mark.slow
def test_each_run_of_a_batch_of_keys_is_the_run_of_its_key(name):
    optimizer, _ = build(name, outer=True)
    together = solve(PROBLEM, optimizer, 8, KEYS)
    for i, key in enumerate(KEYS):
        alone = solve(PROBLEM, optimizer, 8, key)
        losses = together.metrics["val_loss"][:, i]
        np.testing.assert_allclose(losses, alone.metrics["val_loss"], rtol=1e-3)


@pytest.mark.compiler  # two programs
@pytest.mark.slow
def test_a_schedule_is_a_function_of_the_step():
    optimizer, _ = build("one-step")

    def until_four(step):
        return jnp.where(step < 4, 0.02, 0)

    constant = solve(PROBLEM, optimizer, 4, KEY, lr_hyper=0.02)
    schedule = solve(PROBLEM, optimizer, 4, KEY, lr_hyper=until_four)
    assert_same_bits(constant, schedule)
    stopped = solve(PROBLEM, optimizer, 9, KEY, lr_hyper=until_four)
    assert_same_bits(stopped.state.hyperparams, constant.state.hyperparams)


@pytest.mark.parametrize("name", slow_but(["one-step", "hyperdistill"], "one-step"))
def test_host_data_gives_the_bits_of_the_same_data_on_the_device(name):
    settings = {"T": 3} if name == "hyperdistill" else {}
    optimizer, _ = build(name, outer=True, **settings)
    # More batches than fit in one stack, with θ's own T batches first.
    drawn = list(itertools.islice(host_pairs(np.random.default_rng(1)), 150 + 3))
    host = Problem(start, train_loss, val_loss, batches=drawn)
    solution = solve(host, optimizer, 150, KEY)
    state = optimizer.init(*host.start(KEY))
    if name == "hyperdistill":
        trains, val = [pair[0] for pair in drawn[:3]], drawn[2][1]
        theta = optimizer.estimate_theta(state, trains, val, train_loss, val_loss)
        state, drawn = state.update(metadata={"theta": theta}), drawn[3:]
    for train, val in drawn[:150]:
        state = optimizer.step(state, train, val, train_loss, val_loss)
    np.testing.assert_allclose(solution.state.params, state.params, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "kind"),
    slow_but(
        [("hyperdistill", "function"), ("one-step", "list"), ("one-step", "iterator")],
        ("one-step", "iterator"),
    ),
)
def test_host_data_resumes_to_the_same_bits(name, kind):
    settings = {"T": 5, "estimation_period": 2} if name == "hyperdistill" else {}
    optimizer, _ = build(name, outer=True, **settings)
    pairs = list(itertools.islice(host_pairs(np.random.default_rng(1)), 300))
    source = {"function": host_pairs, "list": pairs, "iterator": iter(pairs)}[kind]
    problem = Problem(start, train_loss, val_loss, batches=source)
    part = solve(problem, optimizer, 37, KEY, episode_length=5)
    resumed = solve(problem, optimizer, 90, KEY, episode_length=5, resume=part)
    again = {"function": host_pairs, "list": pairs, "iterator": iter(pairs)}[kind]
    problem = Problem(start, train_loss, val_loss, batches=again)
    assert_same_bits(solve(problem, optimizer, 90, KEY, episode_length=5), resumed)


@pytest.mark.slow
def test_host_batches_may_hold_keys():
    """The numbers of a device batch with the same keys, typed and not."""

    def noisy(w, lam, batch):
        x, y, *keys = batch
        noise = sum(jax.random.normal(key, x.shape) for key in keys)
        return train_loss(w, lam, (x + noise, y))

    trains = [(*BATCH, jax.random.key(i), jax.random.PRNGKey(i + 6)) for i in range(6)]
    host = Problem(start, noisy, val_loss, batches=[(train, BATCH) for train in trains])
    optimizer, _ = build("one-step", outer=True)
    solution = solve(host, optimizer, 6, KEY)
    state = optimizer.init(*host.start(KEY))
    for train in trains:
        state = optimizer.step(state, train, BATCH, noisy, val_loss)
    np.testing.assert_allclose(solution.state.params, state.params, rtol=1e-4, atol=1e-6)


def test_another_key_does_not_go_on_with_a_solution():
    optimizer, _ = build("one-step", outer=True)
    part = solve(PROBLEM, optimizer, 3, KEY)
    with pytest.raises(ValueError, match="resume must be of a run with this key"):
        solve(PROBLEM, optimizer, 6, jax.random.key(1), resume=part)
    by_hand = dataclasses.replace(part, key_data=None)
    assert solve(PROBLEM, optimizer, 6, jax.random.key(1), resume=by_hand).steps == 6


def test_episodes_of_another_length_than_theta_is_estimated_for_are_refused():
    optimizer, _ = build("hyperdistill", outer=True)
    with pytest.raises(ValueError, match=r"episode_length=5 and T=20"):
        solve(PROBLEM, optimizer, 10, KEY, episode_length=5)
    unit, _ = build("hyperdistill", outer=True, scale="unit")  # needs no θ
    assert solve(PROBLEM, unit, 10, KEY, episode_length=5).steps == 10


def test_host_data_that_ends_early_is_reported_and_what_was_done_is_returned():
    optimizer, _ = build("one-step", outer=True)
    pairs = list(itertools.islice(host_pairs(np.random.default_rng(1)), 70))
    problem = Problem(start, train_loss, val_loss, batches=pairs, metrics=metrics)
    with pytest.warns(RuntimeWarning, match="70 of 100 steps"):
        solution = solve(problem, optimizer, 100, KEY)
    assert solution.steps == 70
    assert len(solution.metrics["val_loss"]) == 70
    assert solution.eval_steps.tolist() == [70]


@pytest.mark.slow
def test_data_of_a_run_is_made_from_its_key():
    def data(key):
        return jnp.asarray(X), jax.random.normal(key, Y.shape)

    problem = Problem(
        start,
        train_loss,
        val_loss,
        batch=lambda key, data: (data, data),
        metrics=lambda params, hyperparams, data: {"mean": data[1].mean()},
        data=data,
    )
    optimizer, _ = build("one-step", outer=True)
    solution = solve(problem, optimizer, 3, KEYS)
    expected = [problem.start_data(key)[1].mean() for key in KEYS]
    np.testing.assert_allclose(solution.evals["mean"][-1], expected, rtol=1e-6)
    assert len(set(solution.evals["mean"][-1].tolist())) == 3


def factored_train(w, lam, batch):
    """The training loss times what a batch holds."""
    return train_loss(w, lam, batch[:2]) * batch[2]


def factored_val(w, lam, batch):
    return val_loss(w, lam, batch[:2])


def poisoned(step_of_poison):
    """A problem whose training loss is NaN from a step on, counted from 1."""

    def pairs():
        for step in itertools.count(1):
            factor = np.float32(np.nan if step >= step_of_poison else 1)
            yield (X, Y, factor), (X, Y, np.float32(1))

    return Problem(start, factored_train, factored_val, batches=pairs())


@pytest.mark.parametrize(
    ("name", "bad_step"),
    slow_but(
        [("hyperdistill", 5), ("one-step", 5), ("one-step", 1), ("one-step", 100)],
        ("one-step", 5),
    ),
)
def test_divergence_is_reported_and_the_last_finite_state_returned_to_the_bit(name, bad_step):
    optimizer, _ = build(name, outer=True, **({"scale": "unit"} if name == "hyperdistill" else {}))
    with pytest.warns(DivergenceWarning, match=rf"train_loss .* step {bad_step}: the state after"):
        solution = solve(poisoned(bad_step), optimizer, 300, KEY)
    assert solution.steps == bad_step - 1
    assert solution.diverged_at == bad_step
    for rows in solution.metrics.values():
        assert np.isfinite(rows[:-1]).all()
        assert np.isnan(rows[-1])
        assert len(rows) == bad_step
    if bad_step > 1:
        healthy = solve(poisoned(bad_step), optimizer, bad_step - 1, KEY)
        assert_same_bits(healthy.state, solution.state)


@pytest.mark.slow
def test_in_a_batch_the_other_runs_go_on():
    def init(key):
        return jax.random.normal(key, (3,)), {"l": jnp.ones(3), "decay": jnp.float32(-3)}

    def loss(w, lam, batch):
        # Some runs start beyond the bound, and some cross it while they train.
        return train_loss(w, lam, batch) + jnp.where(jnp.abs(w[0]) > 1.2, jnp.nan, 0)

    problem = Problem(init, loss, val_loss, batch=lambda key: (BATCH, BATCH), metrics=metrics)
    keys = jax.random.split(jax.random.key(3), 6)
    optimizer, _ = build("one-step", outer=True)
    with pytest.warns(DivergenceWarning, match="of run"):
        solution = solve(problem, optimizer, 60, keys)
    failed = solution.diverged_at > 0
    assert 0 < failed.sum() < 6
    losses = solution.metrics["train_loss"]
    assert losses.shape == (60, 6)
    for i, step in enumerate(solution.diverged_at):
        assert np.isnan(losses[:, i]).sum() == (60 - step + 1 if step else 0)
    assert np.isfinite(solution.state.params).all()
    assert (np.asarray(solution.state.step)[~failed] == 60).all()
    np.testing.assert_array_equal(
        np.asarray(solution.state.step)[failed], solution.diverged_at[failed] - 1
    )


@pytest.mark.slow
def test_a_diverged_run_goes_on_from_its_last_finite_state_with_a_lower_rate():
    optimizer, _ = build("one-step")
    with pytest.warns(DivergenceWarning, match="hyperparam_norm .* step 7"):
        failed = solve(
            PROBLEM, optimizer, 40, KEY, lr_hyper=lambda t: jnp.where(t == 6, jnp.inf, 0.01)
        )
    mended = solve(PROBLEM, optimizer, 40, KEY, lr_hyper=0.01, resume=failed)
    assert (failed.steps, mended.steps) == (6, 40)
    assert np.isfinite(mended.metrics["train_loss"]).all()
    assert_same_bits(mended.state, solve(PROBLEM, optimizer, 40, KEY, lr_hyper=0.01).state)


def test_solution_is_a_pytree_and_survives_a_round_trip_to_the_host():
    optimizer, _ = build("one-step", outer=True)
    part = solve(PROBLEM, optimizer, 5, KEY)
    on_host = jax.device_get(part)
    assert_same_bits(
        solve(PROBLEM, optimizer, 9, KEY, resume=on_host),
        solve(PROBLEM, optimizer, 9, KEY, resume=part),
    )


def test_callback_and_progress(capsys):
    seen = []
    optimizer, _ = build("one-step", outer=True)
    solve(
        PROBLEM,
        optimizer,
        12,
        KEY,
        eval_every=5,
        callback=lambda steps, state: seen.append((steps, int(state.step))),
        progress=True,
    )
    assert seen == [(5, 5), (10, 10), (12, 12)]
    assert "12/12" in capsys.readouterr().err


@pytest.mark.slow
def test_distilled_data_in_solve():
    optimizer = gradhpo.OnlineHypergradientOptimizer(
        build("one-step")[0].inner_optimizer, gamma=0.9, T=3, distill_data=True
    )
    solution = solve(PROBLEM, optimizer, 9, KEYS, lr_hyper=0.01, episode_length=3)
    assert np.isfinite(solution.metrics["val_loss"]).all()
