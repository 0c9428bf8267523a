"""Every algorithm against ground truth: closed forms, NumPy transcriptions, autodiff."""

from decimal import Decimal, localcontext

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gradhpo import (
    FOOptimizer,
    GreedyOptimizer,
    OneStepOptimizer,
    OnlineHypergradientOptimizer,
    T1T2Optimizer,
    ema,
)
from tests import problems
from tests.problems import Exact, as_jax, assert_close, assert_same_bits
from tests.quick import slow_but

pytestmark = pytest.mark.usefixtures("only_x64")

LR_HYPER = 0.05
OUTER = optax.sgd(LR_HYPER)
ADAM, MOMENTUM = optax.adam(0.05, eps=0.01), optax.sgd(0.1, momentum=0.9)
QUADRATIC = (problems.quadratic_train, problems.quadratic_val)
NETWORK = (problems.mlp_train, problems.mlp_val)
GAMMAS = [0.0, 0.5, 0.9999, 1.0]
INNER = {
    "optax": {"inner_optimizer": problems.SGD},
    "update_fn": {"update_fn": problems.quadratic_update},
}


def one_of_each(**inner):
    """All five algorithms, with plain gradient descent of step `LR_HYPER` on λ."""
    return {
        "FO": FOOptimizer(**inner),
        "One-Step": OneStepOptimizer(**inner),
        "T1-T2": T1T2Optimizer(**inner),
        "T1-T2 at w*": T1T2Optimizer(**inner, gamma=0.9),
        "HyperDistill": OnlineHypergradientOptimizer(**inner, gamma=0.9),
        "Greedy": GreedyOptimizer(**inner, outer_optimizer=OUTER, unroll_steps=3, gamma=0.8),
    }


def take_step(optimizer, state, batch, val_batch, losses, lr_hyper=LR_HYPER):
    rate = () if optimizer.outer_optimizer is not None else (lr_hyper,)
    return optimizer.step(state, batch, val_batch, *losses, *rate)


def distilled(gamma, w_star, w_prev, t):
    """Eq. 13 as it is written, with its limit at γ = 1."""
    p = (t - 1) / t if gamma == 1 else (gamma - gamma**t) / (1 - gamma**t)
    return p * w_star + (1 - p) * w_prev


def closed_form(name, gamma, theta, w_prev, w, w_star, lam, rows, t):
    """The hypergradient of step t on the quadratic problem, written down from the papers."""
    alpha, direct = Exact.alpha(w, lam, problems.VAL), Exact.direct(w, lam)
    if name == "FO":
        return direct
    if name == "HyperDistill":
        factor = t if gamma == 1 else (1 - gamma**t) / (1 - gamma)
        return direct + theta * factor * alpha @ Exact.dphi_dlam(w_star, rows)
    return direct + alpha @ Exact.dphi_dlam(w_star if gamma > 0 else w_prev, rows)


@pytest.mark.parametrize(
    ("name", "gamma", "inner"),
    slow_but(
        [("FO", 0.0, "optax"), ("One-Step", 0.0, "optax"), ("One-Step", 0.0, "update_fn")]
        + [(name, gamma, "optax") for name in ("T1-T2", "HyperDistill") for gamma in GAMMAS]
        + [(name, 0.5, "update_fn") for name in ("T1-T2", "HyperDistill")],
        *(("FO", 0.0, "optax"), ("One-Step", 0.0, "optax")),
        *((name, gamma, "optax") for name in ("T1-T2", "HyperDistill") for gamma in GAMMAS[1:]),
    ),
)
def test_every_step_on_a_quadratic_equals_the_closed_form(name, gamma, inner):
    inner = INNER[inner]
    optimizer = {
        "FO": lambda: FOOptimizer(**inner),
        "One-Step": lambda: OneStepOptimizer(**inner),
        "T1-T2": lambda: T1T2Optimizer(**inner, gamma=gamma),
        "HyperDistill": lambda: OnlineHypergradientOptimizer(**inner, gamma=gamma),
    }[name]()
    theta, state = 0.7, optimizer.init(problems.W0, problems.LAM0)
    if name == "HyperDistill":
        state = state.update(metadata={"theta": theta})
    w = w_star = problems.W0
    lam = problems.LAM0
    for t, rows in enumerate(problems.TRAIN[:6], start=1):
        w_prev, w_star = w, distilled(gamma, w_star, w, t)
        w = Exact.phi(w, lam, rows)
        expected = closed_form(name, gamma, theta, w_prev, w, w_star, lam, rows, t)
        lam = lam - LR_HYPER * expected
        state = optimizer.step(state, rows, problems.VAL, *QUADRATIC, LR_HYPER)
        assert_close(state.params, w, rtol=1e-8)
        assert_close(state.hyperparams, lam, rtol=1e-8)
        assert_close(state.metadata["hypergrad_norm"], np.linalg.norm(expected), rtol=1e-8)
        assert int(state.step) == t


@pytest.mark.parametrize("gamma", GAMMAS)
def test_w_star_is_the_weighted_average_of_the_past_weights(gamma):
    # Eq. 13 unrolled: w*_t = Σ_i γ^{t-i} w_{i-1} / Σ_i γ^{t-i}, which no recursion shares.
    optimizer = OnlineHypergradientOptimizer(problems.SGD, gamma=gamma)
    state, history = optimizer.init(problems.W0, problems.LAM0), []
    for t, rows in enumerate(problems.TRAIN[:6], start=1):
        history.append(state.params)
        state = optimizer.step(state, rows, problems.VAL, *QUADRATIC, LR_HYPER)
        weights = gamma ** np.arange(t - 1, -1, -1.0)
        average = weights @ np.stack(history) / weights.sum()
        assert_close(state.metadata["w_star"], average)


@pytest.mark.parametrize(
    ("batches", "gamma", "inner"),
    slow_but(
        [("repeat", 0.8, "optax"), ("stack", 1.0, "optax"), ("stack", 0.8, "update_fn")],
        *(("repeat", 0.8, "optax"), ("stack", 1.0, "optax")),
    ),
)
def test_greedy_on_a_quadratic_equals_equation_6(batches, gamma, inner):
    T, inner = 3, INNER[inner]
    settings = {"outer_optimizer": OUTER, "unroll_steps": T, "gamma": gamma, "batches": batches}
    optimizer = GreedyOptimizer(**inner, **settings)
    state, w, lam = optimizer.init(problems.W0, problems.LAM0), problems.W0, problems.LAM0
    for start in (0, T, 2 * T):
        stack = problems.TRAIN[start : start + T]
        terms = []
        for t in range(1, T + 1):
            rows, w_prev = stack[t - 1 if batches == "stack" else 0], w
            w = Exact.phi(w, lam, rows)
            terms.append(
                gamma ** (T - t) * Exact.alpha(w, lam, problems.VAL) @ Exact.dphi_dlam(w_prev, rows)
            )
        lam = lam - LR_HYPER * (Exact.direct(w, lam) + sum(terms))
        given = stack if batches == "stack" else stack[0]
        state = optimizer.step(state, given, problems.VAL, *QUADRATIC)
        assert_close(state.params, w)
        assert_close(state.hyperparams, lam)


def test_greedy_refuses_a_stack_of_another_length():
    settings = {"outer_optimizer": OUTER, "unroll_steps": 3, "batches": "stack"}
    optimizer = GreedyOptimizer(problems.SGD, **settings)
    state = optimizer.init(problems.W0, problems.LAM0)
    for wrong in (problems.TRAIN[:2], problems.TRAIN[:4]):
        with pytest.raises(ValueError, match="train_batch must have a leading axis of length 3"):
            optimizer.step(state, wrong, problems.VAL, *QUADRATIC)


@pytest.mark.parametrize("inner", slow_but([MOMENTUM, ADAM], ADAM), ids=["momentum", "adam"])
def test_one_step_of_a_network_equals_the_unrolled_gradient(inner):
    batch, val_batch = as_jax(problems.MLP_TRAIN[0]), as_jax(problems.MLP_VAL)
    exact = jax.jit(
        lambda w, lam: problems.unrolled(lambda _: inner, *NETWORK, w, lam, [batch], val_batch)
    )(as_jax(problems.MLP), as_jax(problems.MLP_LAM))
    for optimizer in (
        OneStepOptimizer(inner),
        OnlineHypergradientOptimizer(inner, gamma=0.9),
        GreedyOptimizer(inner, outer_optimizer=OUTER, unroll_steps=1, gamma=0.9),
    ):
        state = optimizer.init(problems.MLP, problems.MLP_LAM)
        found = optimizer.compute_hypergradient(state, batch, val_batch, *NETWORK)
        assert_close(found, exact)


@pytest.mark.parametrize(
    ("T", "batches"),
    slow_but([(1, "repeat"), (3, "stack"), (4, "repeat")], (3, "stack"), (4, "repeat")),
)
def test_greedy_without_discount_is_the_full_hypergradient_where_a_is_the_identity(batches, T):
    settings = {"outer_optimizer": OUTER, "unroll_steps": T, "gamma": 1.0, "batches": batches}
    optimizer = GreedyOptimizer(problems.SGD, **settings)
    losses, state = (
        (problems.linear_train, problems.linear_val),
        optimizer.init(problems.W0, problems.LAM0),
    )
    stack = as_jax(
        problems.TRAIN[:T] if batches == "stack" else np.repeat(problems.TRAIN[:1], T, axis=0)
    )
    given = stack if batches == "stack" else stack[0]
    found = optimizer.compute_hypergradient(state, given, problems.VAL, *losses)
    exact = problems.unrolled(
        lambda _: problems.SGD, *losses, state.params, state.hyperparams, stack, problems.VAL
    )
    assert_close(found, exact)


@pytest.mark.slow
def test_greedy_without_discount_is_not_the_full_hypergradient_where_a_is_not_the_identity():
    # Guards the test above against a problem on which everything agrees.
    optimizer = GreedyOptimizer(problems.SGD, outer_optimizer=OUTER, unroll_steps=3, gamma=1.0)
    state, rows = optimizer.init(problems.W0, problems.LAM0), as_jax(problems.TRAIN[0])
    found = optimizer.compute_hypergradient(state, rows, problems.VAL, *QUADRATIC)
    steps = [rows] * 3
    exact = problems.unrolled(
        lambda _: problems.SGD, *QUADRATIC, state.params, state.hyperparams, steps, problems.VAL
    )
    assert np.abs(found - exact).max() > 1e-3


def test_hyperdistill_at_gamma_0_is_one_step_to_the_bit():
    inner = ADAM
    ours, same = OneStepOptimizer(inner), OnlineHypergradientOptimizer(inner, gamma=0.0)
    a, b = ours.init(problems.MLP, problems.MLP_LAM), same.init(problems.MLP, problems.MLP_LAM)
    for batch in problems.MLP_TRAIN[:5]:
        a = ours.step(a, batch, problems.MLP_VAL, *NETWORK, LR_HYPER)
        b = same.step(b, batch, problems.MLP_VAL, *NETWORK, LR_HYPER)
        assert_same_bits(a.params, b.params)
        assert_same_bits(a.hyperparams, b.hyperparams)
        assert_same_bits(a.inner_opt_state, b.inner_opt_state)


def test_greedy_with_vanishing_gamma_is_one_step_on_its_last_step():
    T, batch, inner = 4, problems.MLP_TRAIN[0], ADAM
    greedy = GreedyOptimizer(inner, outer_optimizer=OUTER, unroll_steps=T, gamma=1e-12)
    one_step = OneStepOptimizer(inner)
    found = greedy.compute_hypergradient(
        greedy.init(problems.MLP, problems.MLP_LAM), batch, problems.MLP_VAL, *NETWORK
    )
    state = one_step.init(problems.MLP, problems.MLP_LAM)
    for _ in range(T - 1):
        state = one_step.step(state, batch, problems.MLP_VAL, *NETWORK, lr_hyper=0.0)
    assert_close(
        found, one_step.compute_hypergradient(state, batch, problems.MLP_VAL, *NETWORK), 1e-9
    )


@pytest.mark.slow
def test_t1t2_with_gamma_takes_the_darts_difference_at_w_star():
    # On a network the difference is not exact, so its step ε = 0.01/‖u‖ and its place both show.
    gamma, val_batch = 0.9, as_jax(problems.MLP_VAL)

    @jax.jit
    def darts(w, w_star, lam, batch):
        new, _ = problems.optax_loop(problems.SGD, problems.mlp_train, w, lam, [batch])
        alpha, direct = jax.grad(problems.mlp_val, argnums=(0, 1))(new, lam, val_batch)
        u = jax.tree.map(lambda a: -problems.LR * a, alpha)
        eps = 0.01 / optax.tree.norm(u)

        def grad_lambda(eps):
            shifted = jax.tree.map(lambda a, b: a + eps * b, w_star, u)
            return jax.grad(problems.mlp_train, argnums=1)(shifted, lam, batch)

        return jax.tree.map(
            lambda d, p, m: d + (p - m) / (2 * eps), direct, grad_lambda(eps), grad_lambda(-eps)
        )

    optimizer = T1T2Optimizer(problems.SGD, gamma=gamma)
    state = optimizer.init(problems.MLP, problems.MLP_LAM)
    w_star = state.params
    for t, batch in enumerate(as_jax(problems.MLP_TRAIN[:4]), start=1):
        w_star = jax.tree.map(lambda a, b, t=t: distilled(gamma, a, b, t), w_star, state.params)
        expected = darts(state.params, w_star, state.hyperparams, batch)
        found = optimizer.compute_hypergradient(state, batch, problems.MLP_VAL, *NETWORK)
        assert_close(found, expected, rtol=1e-9)
        state = optimizer.step(state, batch, problems.MLP_VAL, *NETWORK, LR_HYPER)


@pytest.mark.parametrize("inner", slow_but(INNER, "optax"))
def test_first_order_is_exactly_zero_where_lambda_is_not_in_the_validation_loss(inner):
    optimizer = FOOptimizer(**INNER[inner], outer_optimizer=optax.adam(0.1))
    losses = (problems.quadratic_train, problems.quadratic_val_without_lambda)
    start = state = optimizer.init(problems.W0, problems.LAM0)
    for rows in problems.TRAIN[:3]:
        assert_same_bits(
            optimizer.compute_hypergradient(state, rows, problems.VAL, *losses),
            np.zeros(problems.N),
        )
        state = optimizer.step(state, rows, problems.VAL, *losses)
    assert_same_bits(state.hyperparams, start.hyperparams)
    adam, fresh = state.outer_opt_state[0], start.outer_opt_state[0]
    assert_same_bits((adam.mu, adam.nu), (fresh.mu, fresh.nu))
    assert int(adam.count) == 3  # the outer optimizer did run


@pytest.mark.parametrize(
    ("name", "inner"),
    slow_but(
        [(name, "optax") for name in ("FO", "T1-T2", "T1-T2 at w*", "HyperDistill", "Greedy")]
        + [(name, "update_fn") for name in ("One-Step", "T1-T2 at w*")],
        *((name, "optax") for name in ("T1-T2 at w*", "HyperDistill", "Greedy")),
    ),
)
def test_step_applies_the_hypergradient_that_compute_hypergradient_returns(name, inner):
    optimizer = one_of_each(**INNER[inner])[name]
    state = optimizer.init(problems.W0, problems.LAM0)
    for rows in problems.TRAIN[:3]:
        expected = optimizer.compute_hypergradient(state, rows, problems.VAL, *QUADRATIC)
        new = take_step(optimizer, state, rows, problems.VAL, QUADRATIC)
        assert_close(new.hyperparams, state.hyperparams - LR_HYPER * expected)
        assert_close(new.metadata["hypergrad_norm"], jnp.linalg.norm(expected))
        state = new


# --- The coefficients of the distilled point ---------------------------------------------------


@pytest.mark.parametrize(("precision", "rtol"), [(True, 1e-12), (False, 2e-6)], ids=["f64", "f32"])
@pytest.mark.parametrize("gamma", [0.0, 1e-12, 0.5, 0.99, 0.9999, 1.0])
def test_the_coefficients_equal_those_in_100_digits(gamma, precision, rtol):
    # In float32 1 - γ^t is 0 for γ close to 1, unless computed by expm1.
    times, exact = [1, 2, 3, 10, 100, 1000, 10000], []
    with localcontext(prec=100):
        g = Decimal(gamma)
        for t in times:
            total, before = (
                Decimal(n) if g == 1 else (1 - g**n if n else Decimal(0)) / (1 - g)
                for n in (t, t - 1)
            )
            exact.append([float(x) for x in (total, g * before / total, before / total)])
    with jax.enable_x64(precision):
        functions = (ema.geometric_sum, ema.keep_fraction, ema.keep_fraction_backward)
        all_at = jax.jit(lambda t: jnp.stack([f(gamma, t) for f in functions]))
        found = np.stack([all_at(t) for t in times])
    np.testing.assert_allclose(found, exact, rtol=rtol)
    assert_same_bits(found[0, 1:], np.zeros(2))  # p_1 is 0 exactly: w*_1 = w_0


@pytest.mark.parametrize("gamma", [0.9999, 1.0])
def test_hyperdistill_in_float32_follows_float64(gamma):
    optimizer = OnlineHypergradientOptimizer(problems.SGD, gamma=gamma)
    final = []
    for precision in (True, False):
        with jax.enable_x64(precision):
            state = optimizer.init(problems.W0, problems.LAM0)
            for rows in problems.TRAIN:
                state = optimizer.step(state, rows, problems.VAL, *QUADRATIC, 1e-3)
            final.append((state.hyperparams, state.metadata["w_star"]))
    assert final[1][0].dtype == jnp.float32
    assert_close(final[1], final[0], rtol=1e-4, atol=1e-5)


def test_a_w_star_that_is_not_kept_cannot_leak_into_the_new_one():
    old, new = jnp.array([jnp.nan, jnp.inf]), jnp.array([1.0, 2.0])
    assert_same_bits(ema.distilled_point(old, new, jnp.asarray(0.0)), new)
