import itertools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradhpo import DivergenceWarning, FOOptimizer, OneStepOptimizer, UnreachedWarning
from gradhpo.parallel.compilations import CompileCounter
from tests.quick import slow_but
from tests.small import (
    BATCH,
    INNER,
    build,
    run_arguments,
    start,
    train_loss,
    val_loss,
)


def run(name, optimizer, M, T=4, **settings):
    rate = {} if name == "greedy" or optimizer.outer_optimizer else {"lr_hyper": 0.05}
    counter = itertools.count()
    settings = {"get_train_batch": lambda: (next(counter), BATCH)[1]} | rate | settings
    get_train_batch = settings.pop("get_train_batch")
    get_val_batch = settings.pop("get_val_batch", lambda: BATCH)
    batches = (get_train_batch, get_val_batch)
    losses = (settings.pop("train_loss", train_loss), settings.pop("val_loss", val_loss))
    state = optimizer.init(*start())
    return optimizer.run(state, M, *run_arguments(name, T), *batches, *losses, **settings)


def sized(name, T, **settings):
    return build(name, **({"T": T} if name in ("t1t2", "hyperdistill") else {}), **settings)[0]


@pytest.mark.parametrize(
    "name", slow_but(["first-order", "greedy", "hyperdistill"], "hyperdistill")
)
def test_run_is_the_loop_that_its_docstring_describes(name, x64):
    M, T, lr_reptile = 3, 4, 0.5
    optimizer = sized(name, T)
    result = run(name, optimizer, M, T, lr_reptile=lr_reptile)

    phi, state = start()[0], optimizer.init(*start())
    fresh = state.inner_opt_state
    for episode in range(1, M + 1):
        state = state.update(params=phi, inner_opt_state=fresh, step=0)
        if name == "hyperdistill":
            state = state.update(metadata={"w_star": phi, "phi": phi})
            if episode == 1:
                theta = optimizer.estimate_theta(state, [BATCH] * T, BATCH, train_loss, val_loss)
                state = state.update(metadata={"theta": theta})
        rate = () if name == "greedy" else (0.05 * (1 - (episode - 1) / M),)
        for _ in range(1 if name == "greedy" else T):
            state = optimizer.step(state, BATCH, BATCH, train_loss, val_loss, *rate)
        phi = phi - lr_reptile * (phi - state.params)
    np.testing.assert_allclose(result.params, phi, rtol=1e-9)
    for leaf, expected in zip(
        jax.tree.leaves(result.hyperparams), jax.tree.leaves(state.hyperparams), strict=True
    ):
        np.testing.assert_allclose(leaf, expected, rtol=1e-9)


@pytest.mark.parametrize("name", slow_but(["one-step", "hyperdistill"], "one-step"))
def test_a_run_compiles_its_step_once_whatever_its_length_and_schedule(name):
    counts = []
    for M, T in ((2, 3), (60, 20)):
        optimizer = sized(name, T)  # T is part of the optimizer, and calibration depends on it
        with CompileCounter() as compiled:
            run(name, optimizer, M, T, callback=lambda episode, state: None)
        counts.append(compiled.count)
    # Begin an episode, step, Reptile, the callback's loss, and HyperDistill's θ: one each.
    assert counts[1] <= 5
    optimizer = sized(name, 20)
    with CompileCounter() as compiled:
        run(name, optimizer, 7, 20, lr_reptile=0.3)
    assert compiled.count == 0


@pytest.mark.parametrize("name", ["greedy", "t1t2"])
@pytest.mark.slow
def test_callback_sees_each_episode_with_its_validation_loss(name):
    seen = []
    result = run(name, sized(name, 4), 3, callback=lambda m, state: seen.append((m, state)))
    assert [episode for episode, _ in seen] == [1, 2, 3]
    for _, state in seen:
        expected = val_loss(state.params, state.hyperparams, BATCH)
        np.testing.assert_allclose(state.get_metric("val_loss"), expected, rtol=1e-5)
        assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    np.testing.assert_allclose(result.params, seen[-1][1].params, rtol=1e-6)


def test_batches_are_drawn_in_order_train_before_val_and_theta_first():
    drawn = []
    optimizer, _ = build("hyperdistill", T=2, estimation_period=2)
    run(
        "hyperdistill",
        optimizer,
        3,
        get_train_batch=lambda: (drawn.append("t"), BATCH)[1],
        get_val_batch=lambda: (drawn.append("v"), BATCH)[1],
        callback=lambda episode, state: drawn.append("|"),
    )
    assert "".join(drawn) == "ttv" + "tvtvv|" + "tvtvv|" + "ttv" + "tvtvv|"


def test_a_state_given_to_run_stays_usable():
    optimizer, _ = build("one-step")
    state = optimizer.init(*start())
    for _ in range(2):
        optimizer.run(state, 2, 3, lambda: BATCH, lambda: BATCH, train_loss, val_loss, lr_hyper=0.1)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("name", slow_but(["one-step", "greedy", "hyperdistill"], "one-step"))
def test_divergence_is_reported_with_its_step_and_the_last_finite_state_is_returned(name):
    poisoned = (np.full_like(BATCH[0], np.nan), BATCH[1])
    T = 1 if name == "greedy" else 4
    calm = 3 * T + (T if name == "hyperdistill" else 0)  # θ takes T batches first
    supply = itertools.chain(itertools.repeat(BATCH, calm + (T > 1)), itertools.repeat(poisoned))
    with pytest.warns(
        DivergenceWarning, match=rf"train_loss .* at step {1 + (T > 1)} of episode 4"
    ):
        result = run(name, sized(name, T), 10, T, get_train_batch=lambda: next(supply))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result))
    assert result.step == (1 if T > 1 else 0)


def test_no_episode_returns_the_state_as_it_was():
    optimizer, _ = build("one-step")
    np.testing.assert_array_equal(run("one-step", optimizer, 0).params, start()[0])


def test_greedy_says_that_it_ignores_lr_hyper():
    optimizer, _ = build("greedy")
    with pytest.warns(UserWarning, match="ignores lr_hyper"):
        run("greedy", optimizer, 1, lr_hyper=0.1)


def test_progress_bar_counts_steps(capsys):
    optimizer, _ = build("one-step")
    run("one-step", optimizer, 5, T=4, progress=True)
    assert "20/20" in capsys.readouterr().err


def test_users_optimizer_needs_two_methods_only():
    from gradhpo import BilevelOptimizer, BilevelState

    class Sign(BilevelOptimizer):
        def init(self, params, hyperparams):
            inner = self.inner_optimizer.init(params)
            return BilevelState.create(params, hyperparams, inner)

        def compute_hypergradient(self, state, train_batch, val_batch, train_loss, val_loss):
            gradient = jax.grad(val_loss, argnums=1)(state.params, state.hyperparams, val_batch)
            return jax.tree.map(jnp.sign, gradient)

    optimizer = Sign(INNER, None)
    optimizer.T = 3
    state = optimizer.init(*start())
    with CompileCounter() as compiled:
        state = optimizer.run(
            state, 4, lambda: BATCH, lambda: BATCH, train_loss, val_loss, lr_hyper=0.1
        )
    assert compiled.count <= 4
    expected = 1 - 0.1 * 3 * (1 + 0.75 + 0.5 + 0.25)
    np.testing.assert_allclose(state.hyperparams["l"], expected, rtol=1e-5)


@pytest.mark.slow
def test_first_order_run_equals_one_step_where_lambda_is_only_in_validation():
    def plain_loss(w, lam, batch):
        x, y = batch
        return jnp.mean((x @ w - y) ** 2)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", UnreachedWarning)  # the decay
        results = [
            run("one-step", cls(INNER), 3, train_loss=plain_loss)
            for cls in (FOOptimizer, OneStepOptimizer)
        ]
    np.testing.assert_allclose(results[0].hyperparams["l"], results[1].hyperparams["l"], rtol=1e-6)
