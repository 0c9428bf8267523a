"""The inner step: its optimizer's state, hyperparameters inside the optimizer, roots at zero."""

import functools

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
    Task,
)
from gradhpo.finite_derivatives import with_finite_derivatives
from tests import problems
from tests.problems import as_jax, assert_close
from tests.quick import slow_but

pytestmark = pytest.mark.usefixtures("only_x64")

QUADRATIC = (problems.quadratic_train, problems.quadratic_val)
FROZEN = optax.sgd(0.0)


def looping():
    """A transformation with a scan, a branch and a jit of its own around a square root."""

    def update(updates, state, params=None):
        del params

        def halve_twice(x):
            return jax.lax.scan(lambda x, _: (x / 2, None), x, length=2)[0]

        def scale(x):
            rms = jax.jit(jnp.sqrt)(jnp.mean(x**2) + 1)
            return jax.lax.cond(rms > 1.5, halve_twice, lambda x: x, x) / rms

        return jax.tree.map(scale, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


# Adam's ε is large, so that its steps are not the sign of the gradient, which no λ moves.
ADAM = optax.adam(0.05, eps=0.01)
PLAIN = {
    "momentum": optax.sgd(0.1, momentum=0.9),
    "adam": ADAM,
    "adamw": optax.adamw(0.05, eps=0.01, weight_decay=0.1),
}
COMPOSED = {
    "clip and adam": optax.chain(optax.clip_by_global_norm(0.1), ADAM),
    "apply_if_finite": optax.apply_if_finite(ADAM, 2),
    "MultiSteps": optax.MultiSteps(ADAM, 2),
    "inject_hyperparams": optax.inject_hyperparams(optax.adam)(
        optax.linear_schedule(0.1, 0, 20), eps=0.01
    ),
    "scan, cond and jit": optax.chain(looping(), optax.sgd(0.1)),
}


# --- The optimizer's state ---------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def plain_step(inner, w, s, rows):
    return problems.optax_loop(inner, QUADRATIC[0], w, problems.LAM0, [rows], s)


def plain_loop(inner, batches):
    """The weights and the optimizer's state after steps of optax alone."""
    w, s = problems.as_jax(problems.W0), inner.init(problems.as_jax(problems.W0))
    for rows in batches:
        w, s = plain_step(inner, w, s, rows)
    return w, s


@pytest.mark.parametrize(
    ("name", "inner"),
    [("One-Step", inner) for inner in PLAIN]
    + [("FO", "adam"), ("T1-T2 at w*", "adamw"), ("HyperDistill", "momentum")],
)
def test_ten_steps_are_those_of_a_plain_optax_loop(name, inner):
    inner = PLAIN[inner]
    optimizer = {
        "FO": FOOptimizer(inner),
        "One-Step": OneStepOptimizer(inner),
        "T1-T2 at w*": T1T2Optimizer(inner, gamma=0.9),
        "HyperDistill": OnlineHypergradientOptimizer(inner, gamma=0.9),
    }[name]
    state = optimizer.init(problems.W0, problems.LAM0)
    for rows in problems.TRAIN[:10]:
        state = optimizer.step(state, rows, problems.VAL, *QUADRATIC, lr_hyper=0.0)
    expected = plain_loop(inner, problems.TRAIN[:10])
    assert_close((state.params, state.inner_opt_state), expected, rtol=1e-12)
    assert_close(state.hyperparams, problems.LAM0, rtol=0)


def test_ten_steps_of_greedy_are_those_of_a_plain_optax_loop():
    inner = "adam"
    settings = {"outer_optimizer": FROZEN, "unroll_steps": 5, "batches": "stack"}
    optimizer = GreedyOptimizer(PLAIN[inner], **settings)
    state = optimizer.init(problems.W0, problems.LAM0)
    for start in (0, 5):
        state = optimizer.step(state, problems.TRAIN[start : start + 5], problems.VAL, *QUADRATIC)
    expected = plain_loop(PLAIN[inner], problems.TRAIN[:10])
    assert_close((state.params, state.inner_opt_state), expected, rtol=1e-12)


@pytest.mark.parametrize("inner", slow_but(COMPOSED, "clip and adam"))
def test_optimizers_with_branches_and_loops_are_taken_and_differentiated_as_they_are(inner):
    # The differentiated update is a replay of the optimizer's operations: it must be the same.
    inner = COMPOSED[inner]
    optimizer, exact = OneStepOptimizer(inner), exact_last_step(lambda lam: inner, *QUADRATIC)
    state = optimizer.init(problems.W0, problems.LAM0)
    for rows in problems.TRAIN[:4]:
        expected = exact(state, rows)
        found, state = estimate(optimizer, QUADRATIC, state, rows, problems.VAL)
        assert_close(found, expected)
    expected = plain_loop(inner, problems.TRAIN[:4])
    assert_close((state.params, state.inner_opt_state), expected, rtol=1e-12)


@functools.partial(jax.jit, static_argnums=(0, 1))
def estimate(optimizer, losses, state, batch, val_batch):
    """The hypergradient, and the state with its weights moved, from one compilation."""
    done = optimizer.estimate(state, Task(batch, val_batch, *losses))
    moved = {"params": done.params, "inner_opt_state": done.inner_opt_state}
    memory = {"step": state.step + 1, "metadata": dict(done.metadata or {})}
    return done.hypergradient, state.update(**moved, **memory)


@functools.cache
def exact_last_step(optimizer_of, *losses):
    """The gradient through one step of optax, from the optimizer's state, by autodiff."""

    def exact(state, rows):
        arguments = ([rows], problems.VAL, state.inner_opt_state)
        return problems.unrolled(optimizer_of, *losses, state.params, state.hyperparams, *arguments)

    return jax.jit(exact)


# --- Hyperparameters inside the optimizer ------------------------------------------------------

TUNED = {
    "sgd": lambda lam: optax.chain(
        optax.add_decayed_weights(lam["decay_rate"]),
        optax.sgd(jnp.exp(lam["log_lr"]), momentum=lam["momentum"]),
    ),
    "adamw": lambda lam: optax.adamw(
        jnp.exp(lam["log_lr"]), b1=lam["momentum"], eps=0.01, weight_decay=lam["decay_rate"]
    ),
}
TUNED_LAM = {
    "loss": problems.LAM0,
    "log_lr": np.full((), -3.0),
    "momentum": np.full((), 0.8),
    "decay_rate": np.full((), 0.05),
}


def tuned_train(w, lam, rows):
    return problems.quadratic_train(w, lam["loss"], rows)


def tuned_val(w, lam, y):
    return problems.quadratic_val(w, lam["loss"], y)


TUNED_LOSSES = (tuned_train, tuned_val)


@pytest.mark.parametrize(
    ("name", "inner"),
    slow_but(
        [(name, "adamw") for name in ("One-Step", "HyperDistill", "Greedy")]
        + [("One-Step", "sgd")],
        *((name, "adamw") for name in ("One-Step", "HyperDistill", "Greedy")),
    ),
)
def test_learning_rate_momentum_and_decay_get_the_gradient_of_the_exact_step(name, inner):
    inner = TUNED[inner]
    optimizer = {
        "One-Step": OneStepOptimizer(inner, optax.sgd(0.1)),
        "HyperDistill": OnlineHypergradientOptimizer(inner, optax.sgd(0.1), gamma=0.0),
        "Greedy": GreedyOptimizer(inner, optax.sgd(0.1)),
    }[name]
    exact = exact_last_step(inner, *TUNED_LOSSES)
    state = optimizer.init(problems.W0, TUNED_LAM)
    for rows in problems.TRAIN[:3]:
        found, before = exact(state, rows), state
        state = optimizer.step(state, rows, problems.VAL, *TUNED_LOSSES)
        moved = jax.tree.map(lambda old, g: old - 0.1 * g, before.hyperparams, found)
        assert_close(state.hyperparams, moved, rtol=1e-12)
    assert min(abs(found[key]) for key in ("log_lr", "momentum", "decay_rate")) > 1e-4


@functools.cache
def product_at(inner):
    """`w_t`, `s_t`, `g_FO` and `α·B`, with α at `w_t` and B at `(at, s_{t-1})`, by autodiff."""

    def parts(state, at, rows):
        def phi(lam, w):
            return problems.optax_loop(
                inner(lam), tuned_train, w, lam, [rows], state.inner_opt_state
            )

        lam = state.hyperparams
        new, opt_state = phi(lam, state.params)
        alpha, direct = jax.grad(tuned_val, argnums=(0, 1))(new, lam, problems.VAL)
        return new, opt_state, direct, jax.vjp(lambda lam: phi(lam, at)[0], lam)[1](alpha)[0]

    return jax.jit(parts)


@pytest.mark.parametrize(("inner", "name"), [("adamw", "HyperDistill"), ("sgd", "T1-T2")])
def test_the_product_at_w_star_is_taken_with_the_present_state_of_the_optimizer(inner, name):
    gamma, inner = 0.7, TUNED[inner]
    method = {"HyperDistill": OnlineHypergradientOptimizer, "T1-T2": T1T2Optimizer}[name]
    optimizer, exact = method(inner, gamma=gamma), product_at(inner)
    state = optimizer.init(problems.W0, TUNED_LAM)
    for t, rows in enumerate(problems.TRAIN[:3], start=1):
        new = optimizer.step(state, rows, problems.VAL, *TUNED_LOSSES, 0.1)
        *_, direct, second = exact(state, new.metadata["w_star"], rows)
        factor = (1 - gamma**t) / (1 - gamma) if name == "HyperDistill" else 1
        g = jax.tree.map(lambda d, v, f=factor: d + f * v, direct, second)
        moved = jax.tree.map(lambda old, g: old - 0.1 * g, state.hyperparams, g)
        assert_close(new.hyperparams, moved, rtol=1e-9)
        state = new


@pytest.mark.parametrize("inner", ["adamw"])
def test_greedy_accumulates_equation_6_while_the_optimizer_state_advances(inner):
    gamma, T, inner = 0.7, 4, TUNED[inner]
    optimizer = GreedyOptimizer(inner, FROZEN, unroll_steps=T, gamma=gamma, batches="stack")
    start = state = optimizer.init(problems.W0, TUNED_LAM)
    exact, expected = product_at(inner), jax.tree.map(np.zeros_like, TUNED_LAM)
    for rows in problems.TRAIN[:T]:
        w, s, direct, second = exact(state, state.params, rows)
        expected = jax.tree.map(lambda e, v: gamma * e + v, expected, second)
        state = state.update(params=w, inner_opt_state=s)
    found = optimizer.compute_hypergradient(start, problems.TRAIN[:T], problems.VAL, *TUNED_LOSSES)
    assert_close(found, jax.tree.map(np.add, expected, direct))


# --- Square roots at zero ----------------------------------------------------------------------

# Of each kind of root one; every optimizer of optax is in `test_optax`.
DEAD = {
    "adam": ADAM,
    "rmsprop, eps outside": optax.rmsprop(0.05, eps=0.01, eps_in_sqrt=False),
    "clip and sgd": optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.1)),
    # Adam inside a branch.
    "apply_if_finite": COMPOSED["apply_if_finite"],
    "MultiSteps": COMPOSED["MultiSteps"],
}
LOGITS = problems.MLP_LAM["logits"]


def relu_train(params, logits, batch):
    errors = (problems.predict(params, batch["x"], jax.nn.relu) - batch["y"]) ** 2
    return jnp.mean(jax.nn.sigmoid(logits) * errors)


def relu_val(params, logits, batch):
    del logits
    return jnp.mean((problems.predict(params, batch["x"], jax.nn.relu) - batch["y"]) ** 2)


def with_dead_units(dead):
    return {**problems.MLP, "b1": np.where(np.arange(problems.HIDDEN) < dead, -100.0, 1.0)}


def without_dead_units(dead):
    return jax.tree.map(lambda x: x[..., dead:], with_dead_units(dead))


def hypergradients(optimizer, params, steps=2):
    """One at each step; λ stays."""
    state, found = optimizer.init(params, LOGITS), []
    for batch in problems.MLP_TRAIN[:steps]:
        g, state = estimate(optimizer, (relu_train, relu_val), state, batch, problems.MLP_VAL)
        found.append(g)
    return found


@pytest.mark.parametrize("inner", slow_but(DEAD, "adam"))
def test_dead_units_leave_the_hypergradient_of_the_network_without_them(inner):
    optimizer = OneStepOptimizer(DEAD[inner])
    found = hypergradients(optimizer, with_dead_units(2))
    expected = hypergradients(optimizer, without_dead_units(2))
    assert_close(found, expected, rtol=1e-9)
    assert np.abs(expected[-1]).max() > 1e-6  # there is something to lose


@pytest.mark.slow
@pytest.mark.parametrize("name", ["T1-T2", "HyperDistill", "Greedy"])
def test_dead_units_leave_every_algorithm_what_it_finds_without_them(name):
    optimizer = {
        "T1-T2": T1T2Optimizer(ADAM),
        "HyperDistill": OnlineHypergradientOptimizer(ADAM, gamma=0.9),
        "Greedy": GreedyOptimizer(ADAM, FROZEN, unroll_steps=2),
    }[name]
    found = hypergradients(optimizer, with_dead_units(2))
    expected = hypergradients(optimizer, without_dead_units(2))
    # The differences on ReLU are not those of a smooth loss, but are the same for both networks.
    assert_close(found, expected, rtol=1e-9)


@pytest.mark.slow
def test_dead_units_leave_theta_what_it_is_without_them():
    optimizer = OnlineHypergradientOptimizer(ADAM, gamma=0.9)
    found, expected = (
        optimizer.estimate_theta(
            optimizer.init(params, LOGITS),
            problems.MLP_TRAIN[:4],
            problems.MLP_VAL,
            relu_train,
            relu_val,
        )
        for params in (with_dead_units(2), without_dead_units(2))
    )
    assert_close(found, expected, rtol=1e-9)


@pytest.mark.parametrize("inner", slow_but(DEAD, "adam"))
def test_a_network_with_only_dead_units_has_a_zero_hypergradient(inner):
    # The whole training gradient is 0 then, and so are its norms.
    for found in hypergradients(OneStepOptimizer(DEAD[inner]), with_dead_units(problems.HIDDEN)):
        assert_close(found, np.zeros(problems.ROWS), rtol=0)


def test_adam_at_a_zero_gradient_that_depends_on_lambda_has_the_limit():
    # w_1 = w_0 - η g/(|g| + ε) with g = λ: at λ = 0 the slope is -η/ε, from both sides.
    lr, eps = 0.05, 0.1
    optimizer = OneStepOptimizer(optax.adam(lr, eps=eps))
    state = optimizer.init(np.ones(2), np.zeros(2))
    losses = (lambda w, lam, _: w @ lam, lambda w, lam, _: jnp.sum(w) + 0 * jnp.sum(lam))
    at_zero, near = (
        optimizer.compute_hypergradient(state.update(hyperparams=lam), None, None, *losses)
        for lam in (jnp.zeros(2), jnp.array([1e-7, -1e-7]))
    )
    assert_close(at_zero, np.full(2, -lr / eps))
    assert_close(at_zero, near, rtol=1e-5)


@pytest.mark.parametrize("inner", {**PLAIN, **COMPOSED})
def test_safe_roots_leave_the_values_unchanged(inner):
    optimizer = {**PLAIN, **COMPOSED}[inner]
    weights, gradient = as_jax(problems.W0), jnp.array([0.3, 0.0, -2.0])  # a root at zero

    def update(gradient, state):
        return optimizer.update(gradient, state, weights)

    state, plain, safe = (
        optimizer.init(weights),
        jax.jit(update),
        jax.jit(with_finite_derivatives(update)),
    )
    for _ in range(2):
        new = plain(gradient, state)
        assert_close(safe(gradient, state), new, rtol=1e-15, atol=0)
        state = new[1]


def test_safe_roots_have_slope_zero_at_zero_and_their_own_elsewhere():
    slope = jax.vmap(jax.grad(with_finite_derivatives(jax.jit(jnp.sqrt))))
    assert_close(slope(jnp.array([0.0, 4.0, 1e-300])), np.array([0.0, 0.25, 0.5e150]))
