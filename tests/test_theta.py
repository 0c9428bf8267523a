"""HyperDistill's θ (Algorithm 4), distilled batches (eq. 14) and the unit scale."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gradhpo import OnlineHypergradientOptimizer, T1T2Optimizer, Task
from tests import problems
from tests.problems import Exact, assert_close, assert_same_bits
from tests.quick import slow_but

pytestmark = pytest.mark.usefixtures("only_x64")

QUADRATIC = (problems.quadratic_train, problems.quadratic_val)


def ignores_lambda(w, lam, rows):
    del lam
    return problems.quadratic_train(w, np.zeros(problems.N), rows)


def algorithm_4(gamma, batches, w_0, lam, y):
    """θ with explicit Jacobians, line by line from the paper."""
    T = len(batches)
    w = [w_0]
    for rows in batches:
        w.append(Exact.phi(w[-1], lam, rows))
    alpha_T = alpha = Exact.alpha(w[T], lam, y)
    g_so, w_star, x, y_ = np.zeros(problems.N), None, [], []
    for t in range(T, 0, -1):
        s, rows = T - t + 1, batches[t - 1]
        w_hat = (1 - (t - 1) / T) * w_0 + (t - 1) / T * w[T]
        g_so = g_so + alpha @ Exact.dphi_dlam(w_hat, rows)
        alpha = alpha @ Exact.dphi_dw(lam)
        if s == 1:
            w_star = w[T - 1]
        else:
            p = (s - 1) / s if gamma == 1 else (1 - gamma ** (s - 1)) / (1 - gamma**s)
            w_star = p * w_star + (1 - p) * w[T - s]
        v = alpha_T @ Exact.dphi_dlam(w_star, rows)
        x.append(np.linalg.norm(v) * sum(gamma**i for i in range(s)))
        y_.append(v / np.linalg.norm(v) @ g_so)
    return np.dot(x, y_) / np.dot(x, x)


BY_SGD = {"inner_optimizer": problems.SGD}


@pytest.mark.parametrize(
    ("gamma", "T", "inner"),
    slow_but(
        [(g, 5, BY_SGD) for g in (0, 0.5, 0.9, 0.9999, 1)]
        + [(0.5, 1, BY_SGD), (1, 1, BY_SGD), (0, 2, BY_SGD), (0.9, 2, BY_SGD), (1, 2, BY_SGD)]
        + [(0.9, 5, {"update_fn": problems.quadratic_update})],
        *((g, 5, BY_SGD) for g in (0, 0.9, 1)),
    ),
)
def test_theta_equals_algorithm_4_from_a_list_and_from_a_stack(gamma, T, inner):
    optimizer = OnlineHypergradientOptimizer(**inner, gamma=gamma, T=T)
    state, stack = optimizer.init(problems.W0, problems.LAM0), problems.TRAIN[:T]
    expected = algorithm_4(gamma, stack, problems.W0, problems.LAM0, problems.VAL)
    for batches in (stack, list(stack)):
        theta = optimizer.estimate_theta(state, batches, problems.VAL, *QUADRATIC)
        assert theta.shape == ()
        assert_close(theta, expected)
    if T == 1:
        assert_close(theta, 1.0)  # one step has nothing to distill


def test_theta_is_1_without_a_second_order_signal():
    optimizer = OnlineHypergradientOptimizer(problems.SGD, T=3)
    state = optimizer.init(problems.W0, problems.LAM0)
    losses = (ignores_lambda, problems.quadratic_val)
    assert float(optimizer.estimate_theta(state, problems.TRAIN[:3], problems.VAL, *losses)) == 1


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "train_batches gave no batches"),
        ([problems.TRAIN[0], problems.TRAIN[1][:2]], "train_batches: batch 1 has shape"),
        (
            [{"a": problems.TRAIN[0]}, {"b": problems.TRAIN[0]}],
            "train_batches: batch 1 lacks the leaf",
        ),
        (
            (problems.TRAIN[:3], problems.TRAIN[:2]),
            "train_batches must have a leading axis of length 3",
        ),
        (problems.TRAIN[:4], "train_batches must have a leading axis of length 3, got shape"),
        (np.zeros(()), "train_batches must have a leading axis"),
        ({}, "train_batches has no arrays"),
    ],
    ids=["empty", "shapes", "structures", "lengths", "length", "scalar", "no leaves"],
)
def test_a_wrong_stack_of_batches_is_refused(batches, message):
    optimizer = OnlineHypergradientOptimizer(problems.SGD, T=3)
    state = optimizer.init(problems.W0, problems.LAM0)
    with pytest.raises(ValueError, match=message):
        optimizer.estimate_theta(state, batches, problems.VAL, *QUADRATIC)


@pytest.mark.slow
def test_calibrate_stores_theta_and_the_step_uses_it():
    optimizer = OnlineHypergradientOptimizer(problems.SGD, gamma=0.9)
    state = optimizer.init(problems.W0, problems.LAM0)
    assert float(state.metadata["theta"]) == 1
    calibrated = optimizer.calibrate(state, Task(problems.TRAIN[:5], problems.VAL, *QUADRATIC))
    theta = algorithm_4(0.9, problems.TRAIN[:5], problems.W0, problems.LAM0, problems.VAL)
    assert_close(calibrated.metadata["theta"], theta)
    w = Exact.phi(problems.W0, problems.LAM0, problems.TRAIN[0])
    second = Exact.alpha(w, problems.LAM0, problems.VAL) @ Exact.dphi_dlam(
        problems.W0, problems.TRAIN[0]
    )
    found = optimizer.compute_hypergradient(calibrated, problems.TRAIN[0], problems.VAL, *QUADRATIC)
    assert_close(found, Exact.direct(w, problems.LAM0) + theta * second)


# --- Distilled batches -------------------------------------------------------------------------

ROWS, STEPS, GAMMA = 9, 6, 0.8


def numbered(t):
    """A batch whose rows say where they came from, in two leaves that must stay together."""
    ids = 100 * t + np.arange(ROWS)
    x = np.random.default_rng(t).normal(size=(ROWS, problems.N))
    return {"x": x, "id": ids.astype(float)}


def numbered_train(w, lam, batch):
    return problems.quadratic_train(w, lam, batch["x"])


def distilling_run(key, gamma=GAMMA):
    optimizer = OnlineHypergradientOptimizer(problems.SGD, gamma=gamma, distill_data=True)
    state = optimizer.init(problems.W0, problems.LAM0, numbered(0), key)
    states = [state]
    for t in range(1, STEPS + 1):
        losses = (numbered_train, problems.quadratic_val)
        states.append(optimizer.step(states[-1], numbered(t), problems.VAL, *losses, 0.01))
    return states


@pytest.mark.parametrize("gamma", [0.0, GAMMA, 1.0])
def test_the_distilled_batch_keeps_round_p_n_of_the_old_rows(gamma):
    states = distilling_run(jax.random.key(0), gamma)
    for t, (before, after) in enumerate(itertools.pairwise(states), start=1):
        p = (t - 1) / t if gamma == 1 else (gamma - gamma**t) / (1 - gamma**t)
        old, new = before.metadata["d_star"], after.metadata["d_star"]
        kept = np.asarray(new["id"] == old["id"])
        assert kept.sum() == round(p * ROWS)
        batch = numbered(t)
        assert_same_bits(new["id"], np.where(kept, old["id"], batch["id"]))
        assert_same_bits(new["x"], np.where(kept[:, None], old["x"], batch["x"]))


def test_distilled_batches_are_random_and_reproducible():
    first, again, other = (
        [np.asarray(s.metadata["d_star"]["id"]) for s in distilling_run(jax.random.key(seed))]
        for seed in (0, 0, 1)
    )
    assert_same_bits(first, again)
    assert any((a != b).any() for a, b in zip(first, other, strict=True))


def test_the_hypergradient_is_taken_on_the_distilled_batch():
    # At lr_hyper = 0.01 and θ = 1: λ moves by eq. 15 with v at (w*_t, D*_t), read from the state.
    states = distilling_run(jax.random.key(3))
    for t, (before, after) in enumerate(itertools.pairwise(states), start=1):
        w_star, rows = after.metadata["w_star"], np.asarray(after.metadata["d_star"]["x"])
        lam = before.hyperparams
        assert_close(after.params, Exact.phi(before.params, lam, numbered(t)["x"]))
        alpha = Exact.alpha(after.params, lam, problems.VAL)
        second = (1 - GAMMA**t) / (1 - GAMMA) * alpha @ Exact.dphi_dlam(w_star, rows)
        g = Exact.direct(after.params, lam) + second
        assert_close(after.hyperparams, lam - 0.01 * g)


@pytest.mark.slow
def test_theta_with_distilled_batches_is_theta_where_all_rows_are_the_same():
    plain = OnlineHypergradientOptimizer(problems.SGD, gamma=GAMMA, T=5)
    distilling = OnlineHypergradientOptimizer(problems.SGD, gamma=GAMMA, T=5, distill_data=True)
    batches = np.broadcast_to(problems.TRAIN[0, 0], (5, 4, problems.N))
    a = plain.init(problems.W0, problems.LAM0)
    b = distilling.init(problems.W0, problems.LAM0, batches[0], jax.random.key(0))
    arguments = (batches, problems.VAL, *QUADRATIC)
    assert_close(distilling.estimate_theta(b, *arguments), plain.estimate_theta(a, *arguments))


# --- The unit scale ----------------------------------------------------------------------------


def test_the_unit_scale_adds_the_direction_of_v_with_length_1():
    # With γ, w*_t leaves w_{t-1} from the second step on.
    optimizer = OnlineHypergradientOptimizer(problems.SGD, gamma=GAMMA, scale="unit")
    assert optimizer.calibration_period == 0
    state = optimizer.init(problems.W0, problems.LAM0).update(
        metadata={"theta": 5.0}
    )  # plays no part
    for rows in problems.TRAIN[:4]:
        g = optimizer.compute_hypergradient(state, rows, problems.VAL, *QUADRATIC)
        lam, state = state.hyperparams, optimizer.step(state, rows, problems.VAL, *QUADRATIC, 0.01)
        second = g - Exact.direct(state.params, lam)
        v = Exact.alpha(state.params, lam, problems.VAL) @ Exact.dphi_dlam(
            state.metadata["w_star"], rows
        )
        assert_close(jnp.linalg.norm(second), 1.0)
        assert_close(second, v / np.linalg.norm(v))


def test_the_unit_scale_of_no_signal_is_zero_not_nan():
    optimizer = OnlineHypergradientOptimizer(
        problems.SGD, scale="unit", outer_optimizer=optax.sgd(0.1)
    )
    state = optimizer.init(problems.W0, problems.LAM0)

    def val(w, lam, y):
        return problems.quadratic_val_without_lambda(w, lam, y) + 0 * jnp.sum(lam)

    losses = (ignores_lambda, val)
    g = optimizer.compute_hypergradient(state, problems.TRAIN[0], problems.VAL, *losses)
    assert_same_bits(g, np.zeros(problems.N))


@pytest.mark.slow
def test_an_estimate_that_diverges_leaves_theta_as_it_was():
    optimizer = OnlineHypergradientOptimizer(optax.sgd(1e30), T=5)
    state = optimizer.init(problems.W0, problems.LAM0).update(metadata={"theta": 0.5})
    arguments = (problems.TRAIN[:5], problems.VAL, *QUADRATIC)
    assert not np.isfinite(optimizer.estimate_theta(state, *arguments))
    assert float(optimizer.calibrate(state, Task(*arguments)).metadata["theta"]) == 0.5


@pytest.mark.parametrize("kind", ["hyperdistill", "t1t2"])
def test_the_average_of_bfloat16_weights_does_not_stall(kind):
    """Weights that move for four steps and rest: w* follows them, in float32."""
    kinds = {"hyperdistill": OnlineHypergradientOptimizer, "t1t2": T1T2Optimizer}

    def move(w, lam, batch):
        return (w.astype(jnp.float32) + batch).astype(w.dtype)

    def loss(w, lam, batch):
        return jnp.sum(w.astype(jnp.float32) ** 2) * (1 + lam)

    gamma, expected = 0.99, 0.0
    optimizer = kinds[kind](update_fn=move, gamma=gamma, outer_optimizer=optax.sgd(0.0))
    state = optimizer.init(jnp.ones(1, jnp.bfloat16), jnp.zeros(()))
    for t in range(1, 151):
        p = (gamma - gamma**t) / (1 - gamma**t)
        expected = p * expected + (1 - p) * float(state.params[0])
        state = optimizer.step(state, jnp.float32(0.0625 if t < 5 else 0), 0.0, loss, loss)
    assert state.metadata["w_star"].dtype == jnp.float32
    np.testing.assert_allclose(state.metadata["w_star"], [expected], rtol=1e-5)
    assert optimizer.reset(state, state.params).metadata["w_star"].dtype == jnp.float32
