"""DARTS and coordinate differences against the exact vector-Jacobian product."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gradhpo import OneStepOptimizer, T1T2Optimizer, Task
from gradhpo.hypergradient import coordinate_differences, gradient_difference
from tests import problems
from tests.problems import as_jax, assert_close, assert_same_bits
from tests.quick import slow_but

pytestmark = [
    pytest.mark.usefixtures("only_x64"),
    # One λ serves several inner optimizers, and each uses a part of it.
    pytest.mark.filterwarnings("ignore::gradhpo.UnreachedWarning"),
]

rng = np.random.default_rng(1)
PARAMS = {"W": rng.normal(size=(3, 2)), "b": rng.normal(size=2)}
LAM = {
    "matrix": rng.normal(size=(3, 2)) - 2,
    "nested": [rng.normal(size=4), {"scalar": np.full((), -1.0)}],
    "lr": np.full((), 0.05),
    "momentum": np.full((), 0.8),
}
BATCH = {"x": rng.normal(size=(4, 3)), "y": rng.normal(size=(4, 2))}
VAL = {"x": rng.normal(size=(5, 3)), "y": rng.normal(size=(5, 2))}


def train(params, lam, batch):
    """Quadratic in the weights, whatever λ: its central differences in w are exact."""
    errors = jnp.sum((batch["x"] @ params["W"] + params["b"] - batch["y"]) ** 2, axis=1)
    weights, decay = lam["nested"]
    penalty = jnp.sum(jnp.exp(lam["matrix"]) * params["W"] ** 2)
    return weights @ errors / 4 + penalty + jnp.exp(decay["scalar"]) * jnp.sum(params["b"] ** 2)


def train_without_lambda(params, lam, batch):
    del lam
    return train(params, LAM, batch)


def val(params, lam, batch):
    errors = (batch["x"] @ params["W"] + params["b"] - batch["y"]) ** 2
    return jnp.mean(errors) + jnp.sum(lam["matrix"] ** 2)


def val_without_params(params, lam, batch):
    del params, batch
    return jnp.sum(lam["matrix"] ** 2)


def update(params, lam, batch):
    """The user's own step, nonlinear in λ, through the learning rate too."""
    gradient = jax.grad(train)(params, lam, batch)
    return jax.tree.map(lambda w, g: w - jnp.sin(lam["lr"]) * g, params, gradient)


INNER = {
    "sgd": {"inner_optimizer": optax.sgd(0.1)},
    "nesterov": {"inner_optimizer": optax.sgd(0.1, momentum=0.9, nesterov=True)},
    "adam": {"inner_optimizer": optax.adam(0.05, eps=0.01)},
    "polyak": {"inner_optimizer": optax.polyak_sgd(10.0, f_min=-2.0)},  # looks at the loss
    "sgd of λ": {"inner_optimizer": lambda lam: optax.sgd(lam["lr"], momentum=lam["momentum"])},
    "adamw of λ": {
        "inner_optimizer": lambda lam: optax.adamw(
            lam["lr"], eps=0.01, weight_decay=lam["momentum"]
        )
    },
    "update_fn": {"update_fn": update},
}


@functools.cache
def exact(name, losses=(train, val), steps=3):
    """A state after steps that fill the optimizer's, and the exact product there."""
    optimizer = OneStepOptimizer(**INNER[name])
    step = jax.jit(lambda state: optimizer.estimate(state, Task(BATCH, VAL, *losses))[:3])
    state = optimizer.init(PARAMS, LAM)
    for _ in range(steps):
        _, params, opt_state = step(state)
        state = state.update(params=params, inner_opt_state=opt_state)
    return state, step(state)[0]


def differences(inner, state, losses=(train, val), **settings):
    """What differences give at a state."""
    optimizer = T1T2Optimizer(**inner, **settings)
    return optimizer.compute_hypergradient(state, BATCH, VAL, *losses)


def started(inner):
    """The state before the first step."""
    return T1T2Optimizer(**inner).init(PARAMS, LAM)


@pytest.mark.parametrize("name", slow_but(INNER, "adam", "update_fn"))
def test_differences_equal_the_exact_product_in_every_coordinate(name):
    state, expected = exact(name)
    assert_close(differences(INNER[name], state), expected, rtol=1e-8, atol=1e-9)
    assert np.unique(expected["nested"][0]).size == 4  # a whole leaf shifted at once would show
    if name in ("sgd of λ", "adamw of λ", "update_fn"):
        assert abs(expected["lr"]) > 1e-3  # the optimizer's own, direct term


def sama(w, lam, adam, batch, val_batch, *, lr, b1=0.9, b2=0.999, eps=1e-8):
    """SAMA's hypergradient written out (Choe et al. 2023), from Adam's `(mu, nu, count)`."""
    count = adam.count + 1
    gradient = jax.grad(problems.mlp_train)(w, lam, batch)
    m = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, adam.mu, gradient)
    v = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g**2, adam.nu, gradient)

    def moments(m, v):
        return m / (1 - b1**count), jnp.sqrt(v / (1 - b2**count))

    def move(w, m, v):
        m, root = moments(m, v)
        return w - lr * m / (root + eps)

    def adaptation(m, v, g):
        # ∂u/∂g of u = m̂/(√v̂ + ε), coordinate by coordinate.
        m, root = moments(m, v)
        d_root = (1 - b2) * g / (1 - b2**count) / root
        return (1 - b1) / (1 - b1**count) / (root + eps) - m * d_root / (root + eps) ** 2

    new = jax.tree.map(move, w, m, v)
    meta, direct = jax.grad(problems.mlp_val, argnums=(0, 1))(new, lam, val_batch)
    v = jax.tree.map(lambda m, v, g, a: adaptation(m, v, g) * a, m, v, gradient, meta)
    step = 0.01 / optax.tree.norm(v)

    def grad_lambda(step):
        shifted = optax.tree.add_scale(w, step, v)
        return jax.grad(problems.mlp_train, argnums=1)(shifted, lam, batch)

    difference = optax.tree.sub(grad_lambda(step), grad_lambda(-step))
    return optax.tree.add_scale(direct, -lr / (2 * step), difference)


@pytest.mark.slow
def test_with_adam_it_is_sama():
    # On a network the differences are not exact, so the direction and the step both show.
    optimizer = T1T2Optimizer(optax.adam(0.05))
    state = optimizer.init(problems.MLP, problems.MLP_LAM)
    written_out = jax.jit(functools.partial(sama, lr=0.05))
    for batch in problems.MLP_TRAIN[:3]:
        arguments = (batch, problems.MLP_VAL)
        adam = state.inner_opt_state[0]
        expected = written_out(state.params, state.hyperparams, adam, *map(as_jax, arguments))
        losses = (problems.mlp_train, problems.mlp_val)
        new = optimizer.step(state, *arguments, *losses, 0.1)
        moved = optax.tree.add_scale(state.hyperparams, -0.1, expected)
        assert_close(new.hyperparams, moved, rtol=1e-9)
        state = new
    exact = OneStepOptimizer(optax.adam(0.05)).compute_hypergradient(state, *arguments, *losses)
    found = optimizer.compute_hypergradient(state, *arguments, *losses)
    assert 1e-9 < optax.tree.norm(optax.tree.sub(found, exact)) < 0.05 * optax.tree.norm(exact)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "eps"), [("sgd", 1e-1), ("update_fn", 1e-4)])
def test_differences_hold_for_any_reasonable_eps(name, eps):
    state, expected = exact(name)
    error = 1e-9 / eps if name == "sgd" else max(eps**2, 1e-9 / eps)  # cubic in λ: O(ε²)
    assert_close(differences(INNER[name], state, eps=eps), expected, rtol=0, atol=error)


def test_eps_is_the_step_along_u():
    # ((w + εu)³ - (w - εu)³)/2ε = 3w²u + ε²u³ shows what ε was.
    w, u = jnp.array([1.0, -2.0]), jnp.array([0.3, 0.4])
    for eps, used in [(0.7, 0.7), (None, 0.01 / 0.5)]:
        found = gradient_difference(lambda w: w**3, w, u, eps)
        assert_close(found, 3 * w**2 * u + used**2 * u**3, rtol=1e-9)


def test_eps_is_the_step_of_a_coordinate():
    lam = jnp.array([0.5, -3.0])
    for eps in (0.7, None):
        used = eps or np.finfo(float).eps ** (1 / 3) * np.maximum(1, np.abs(lam))
        found = coordinate_differences(lambda x: x**3, jnp.ones(2), lam, eps, 2)
        assert_close(found, 3 * lam**2 + used**2, rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adam", "update_fn"])
def test_without_a_second_order_term_the_rest_is_exact_and_not_nan(name):
    inner = {"update_fn": lambda w, lam, batch: w} if name == "update_fn" else INNER[name]
    # No λ in the inner step: the second-order term is zero; no w in the validation loss: u = 0.
    for losses in [(train_without_lambda, val), (train, val_without_params)]:
        expected = {**jax.tree.map(np.zeros_like, LAM), "matrix": 2 * LAM["matrix"]}
        assert_same_bits(differences(inner, started(inner), losses), expected)


@pytest.mark.parametrize(("name", "eps"), [("sgd", 1e-30), ("update_fn", 1e-310)])
@pytest.mark.slow
def test_an_eps_lost_in_rounding_gives_a_zero_term(name, eps):
    # What is left of a difference is then rounding noise, over a tiny (or subnormal) 2ε.
    expected = {**jax.tree.map(np.zeros_like, LAM), "matrix": 2 * LAM["matrix"]}
    assert_same_bits(differences(INNER[name], started(INNER[name]), eps=eps), expected)


def test_a_nan_in_the_validation_gradient_is_seen():
    found = gradient_difference(lambda w: w**3, jnp.ones(2), jnp.array([jnp.nan, 1.0]), None)
    assert np.isnan(found).all()


@pytest.mark.parametrize("name", ["adam", "sgd of λ"])
@pytest.mark.slow
def test_bfloat16_weights_with_float32_hyperparameters(name):
    with jax.enable_x64(False):
        half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), PARAMS)
        t1t2, one_step = T1T2Optimizer(**INNER[name]), OneStepOptimizer(**INNER[name])
        data = (BATCH, VAL, train, val)
        rounded = jax.tree.map(lambda x: x.astype(jnp.float32), half)
        found = t1t2.compute_hypergradient(t1t2.init(half, LAM), *data)
        expected = one_step.compute_hypergradient(one_step.init(rounded, LAM), *data)
        assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype("float32")}
        scale = optax.tree.norm(expected)
        assert optax.tree.norm(optax.tree.sub(found, expected)) < 0.03 * scale


@pytest.mark.slow
def test_bfloat16_weights_under_an_update_fn_stay_finite():
    # Φ returns bfloat16, which rounds away most of a small shift of λ: only finite is promised.
    def half_update(w, lam, batch):
        return jax.tree.map(lambda x: x.astype(jnp.bfloat16), update(w, lam, batch))

    with jax.enable_x64(False):
        half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), PARAMS)
        optimizer = T1T2Optimizer(update_fn=half_update)
        found = optimizer.compute_hypergradient(optimizer.init(half, LAM), BATCH, VAL, train, val)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))


@pytest.mark.parametrize("chunk", slow_but([1, 7, 1000], 7))
def test_coordinates_evaluated_in_chunks_equal_the_exact_product(chunk):
    # 150 coordinates in three leaves: chunks end inside leaves, and the last one is not full.
    lam = {"a": rng.normal(size=(10, 10)), "b": [rng.normal(size=49), rng.normal(size=())]}
    lam = problems.as_jax(lam)
    mixing = rng.normal(size=(5, 150))

    def phi(lam):
        flat = jnp.concatenate([x.ravel() for x in jax.tree.leaves(lam)])
        return {"w": jnp.sin(mixing @ flat / 10)}

    alpha = {"w": rng.normal(size=5)}
    flat = np.concatenate([np.ravel(x) for x in jax.tree.leaves(lam)])
    expected = alpha["w"] * np.cos(mixing @ flat / 10) @ mixing / 10
    found = jax.jit(lambda lam: coordinate_differences(phi, alpha, lam, None, chunk))(lam)
    found = np.concatenate([np.ravel(x) for x in jax.tree.leaves(found)])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)


def test_more_hyperparameters_than_a_chunk_through_the_optimizer():
    def scale_each(w, lam, batch):
        return w * (1 - 0.1 * jnp.exp(lam)) + batch

    def square(w, lam, batch):
        return jnp.sum((w - batch) ** 2) + 0 * jnp.sum(lam)

    n = 150
    weights, lam, batch = rng.normal(size=n), rng.normal(size=n) - 1, rng.normal(size=n)
    optimizer = T1T2Optimizer(update_fn=scale_each)
    found = optimizer.compute_hypergradient(
        optimizer.init(weights, lam), batch, batch, square, square
    )
    alpha = 2 * (scale_each(weights, lam, batch) - batch)
    assert_close(found, -0.1 * alpha * np.exp(lam) * weights, rtol=1e-7, atol=1e-8)


def switched_train(w, lam, batch):
    """λ = 0 switches a term off: its weights have no gradient, and yet λ acts on them."""
    return jnp.sum((w["on"] - 1) ** 2) + lam * jnp.sum(jnp.sin(w["off"]) + w["off"])


def switched_val(w, lam, batch):
    return jnp.sum((w["on"] - 0.3) ** 2) + jnp.sum((w["off"] - 2) ** 2) + jnp.sum(w["empty"])


@pytest.mark.parametrize(("lam", "slots"), slow_but([(0.0, None), (0.1, 2)], (0.0, None)))
def test_a_term_switched_off_by_lambda_is_seen_behind_adam(lam, slots):
    weights = {
        "on": jnp.array([0.5, 0.2]),
        "off": jnp.array([1.0, 2.1]),
        "empty": jnp.zeros((0, 2)),
    }
    found = []
    for kind in (OneStepOptimizer, T1T2Optimizer):
        optimizer = kind(optax.adam(0.1), optax.sgd(0.0))
        state = optimizer.init(weights, jnp.asarray(lam))
        for _ in range(2):  # Adam's first step has almost no derivative
            state = optimizer.step(state, 0.0, 0.0, switched_train, switched_val)

        def estimate(state, optimizer=optimizer):
            return optimizer.estimate(
                state, Task(0.0, 0.0, switched_train, switched_val)
            ).hypergradient

        if slots:  # one of which has no outsized weight
            state = jax.tree.map(lambda x: jnp.stack([x, x]), state)
            state = state.update(hyperparams=jnp.array([lam, 0.2]))
            estimate = jax.vmap(estimate)
        found.append(jax.jit(estimate)(state))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-2)


X_TRAIN, X_VAL = np.array([[1.0], [2.0], [1.5]]), np.array([[-1.0], [2.0]])
Y_TRAIN, Y_VAL = np.array([0.5, 1.0, 0.2]), np.array([1.0, 0.3])


def dead_errors(w, x, y):
    """Squared errors of two units, of which one is dead for positive inputs."""
    x, y = x.astype(w["o"].dtype), y.astype(w["o"].dtype)
    return (jax.nn.relu(x @ w["a"]) @ w["o"] - y) ** 2


def dead_train(w, lam, batch):
    return jnp.mean(jax.nn.sigmoid(lam) * dead_errors(w, X_TRAIN, Y_TRAIN))


def dead_val(w, lam, batch):
    return jnp.mean(dead_errors(w, X_VAL, Y_VAL))


@pytest.mark.parametrize(("eps", "wide"), [(None, False), (1e-2, True)])
@pytest.mark.slow
def test_a_unit_dead_on_the_training_batch_alone_adds_nothing(eps, wide):
    """Its weights have no gradient and no mixed derivative, and a validation gradient."""
    losses = (0.0, 0.0, dead_train, dead_val)
    with jax.enable_x64(wide):
        one_step, t1t2 = OneStepOptimizer(optax.adam(0.1)), T1T2Optimizer(optax.adam(0.1), eps=eps)
        w = {"a": jnp.array([[0.5, -0.7]]), "o": jnp.array([0.6, 0.8])}
        state = one_step.init(w, jnp.array([0.1, -0.2, 0.3]))
        for _ in range(3):
            state = one_step.step(state, *losses, 0.0)
        expected = one_step.compute_hypergradient(state, *losses)
        found = t1t2.compute_hypergradient(state, *losses)
    np.testing.assert_allclose(found, expected, rtol=0.02, atol=3e-4)


@pytest.mark.slow
def test_the_exact_part_stays_a_branch_under_vmap():
    optimizer = T1T2Optimizer(optax.adam(0.1), optax.sgd(0.0))
    weights = {"on": jnp.ones(2), "off": jnp.ones(2), "empty": jnp.zeros(0)}
    state = jax.tree.map(lambda x: jnp.stack([x, x]), optimizer.init(weights, jnp.ones(())))

    def estimate(state):
        return optimizer.estimate(state, Task(0.0, 0.0, switched_train, switched_val)).hypergradient

    text = str(jax.make_jaxpr(jax.vmap(estimate))(state))
    assert text.count("cond[") == 1
