"""The reference methods: against autodiff, NumPy and closed forms, in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gradhpo import (
    DrMADOptimizer,
    FOOptimizer,
    ForwardOptimizer,
    GreedyOptimizer,
    ImplicitOptimizer,
    OneStepOptimizer,
    OnlineHypergradientOptimizer,
    Task,
    UnrolledOptimizer,
)
from tests import problems
from tests.problems import Exact, as_jax, assert_close, assert_same_bits
from tests.quick import slow_but
from tests.test_inner import (
    ADAM,
    COMPOSED,
    DEAD,
    TUNED,
    TUNED_LAM,
    TUNED_LOSSES,
    hypergradients,
    with_dead_units,
    without_dead_units,
)

pytestmark = pytest.mark.usefixtures("only_x64")

QUADRATIC = (problems.quadratic_train, problems.quadratic_val)
NETWORK = (problems.mlp_train, problems.mlp_val)
LINEAR = (problems.linear_train, problems.linear_val)
T = 3
STACK, VAL = problems.TRAIN[:T], problems.VAL


def noisy():
    """SGD whose state holds a PRNG key."""
    return optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(3)), optax.sgd(0.1, momentum=0.9))


def clipped(w, lam, rows):
    """The user's own step, not linear in the gradient."""
    return w - 0.1 * jnp.tanh(jax.grad(problems.quadratic_train)(w, lam, rows))


INNER = {
    "sgd": problems.SGD,
    "momentum": optax.sgd(0.1, momentum=0.9),
    "adam": ADAM,
    "clip and adam": COMPOSED["clip and adam"],
    "polyak": optax.polyak_sgd(0.5),
    **{f"{name} of λ": inner for name, inner in TUNED.items()},
}


def walk(inner, loss, lam, w, s, batches):
    """All steps of optax, or of an update function, in a Python loop."""
    for batch in batches:
        if inner is clipped:
            w = clipped(w, lam, batch)
            continue
        optimizer = inner if hasattr(inner, "update") else inner(lam)
        value, gradient = jax.value_and_grad(loss)(w, lam, batch)
        extra = {"value": value} if inner is INNER["polyak"] else {}
        updates, s = optimizer.update(gradient, s, w, **extra)
        w = optax.apply_updates(w, updates)
    return w, s


def exact(inner, losses, state, batches, val_batch):
    """The gradient through them."""

    def objective(lam, w, s):
        return losses[1](walk(inner, losses[0], lam, w, s, batches)[0], lam, val_batch)

    start = (state.params, state.inner_opt_state)
    return jax.jit(jax.grad(objective))(state.hyperparams, *start)


def moved(inner, loss, state, batches):
    """The state after them, as a second step finds it: not zero."""
    step = jax.jit(lambda lam, w, s, rows: walk(inner, loss, lam, w, s, [rows]))
    w, s = state.params, state.inner_opt_state
    for rows in batches:
        w, s = step(state.hyperparams, w, s, rows)
    return state.update(params=w, inner_opt_state=s)


def problem_of(name):
    """Losses, weights and hyperparameters that suit an inner optimizer."""
    if name.endswith("of λ"):
        return TUNED_LOSSES, problems.W0, TUNED_LAM
    return QUADRATIC, problems.W0, problems.LAM0


def build(kind, inner, **settings):
    own = {"update_fn": inner} if inner is clipped else {"inner_optimizer": inner}
    return kind(**own, unroll_steps=T, batches="stack", **settings)


# --- Exact through T steps ----------------------------------------------------------------------


# Momentum is in "sgd of λ" too, and Adam behind a clip.
EXACT = [name for name in INNER if name not in ("momentum", "adam")]


@pytest.mark.parametrize("name", slow_but([*EXACT, "update_fn"], "sgd"))
def test_unrolled_and_forward_are_the_exact_hypergradient(name):
    inner = clipped if name == "update_fn" else INNER[name]
    losses, *start = problem_of(name)
    unrolled, forward = build(UnrolledOptimizer, inner), build(ForwardOptimizer, inner)
    state = moved(inner, losses[0], unrolled.init(*start), problems.TRAIN[T : 2 * T])
    expected = exact(inner, losses, state, as_jax(STACK), VAL)
    for optimizer in (unrolled, forward):
        found = optimizer.compute_hypergradient(state, STACK, VAL, *losses)
        assert_close(found, expected, rtol=1e-9)
    if name.endswith("of λ"):
        assert min(abs(expected[key]) for key in ("log_lr", "momentum", "decay_rate")) > 1e-4


@pytest.mark.slow
def test_of_a_network():
    batches = as_jax(problems.MLP_TRAIN[:T])
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)
    unrolled, forward = build(UnrolledOptimizer, ADAM), build(ForwardOptimizer, ADAM)
    state = unrolled.init(problems.MLP, problems.MLP_LAM)
    expected = exact(ADAM, NETWORK, state, batches, as_jax(problems.MLP_VAL))
    for optimizer in (unrolled, forward):
        found = optimizer.compute_hypergradient(state, stack, problems.MLP_VAL, *NETWORK)
        assert_close(found, expected, rtol=1e-9)


@pytest.mark.parametrize(
    ("steps", "others"),
    # A length that leaves a shorter segment, and a square.
    [
        (7, [("sqrt", "reverse-over-reverse"), ("step", "auto"), ("sqrt", "auto")]),
        (9, [("sqrt", "reverse-over-reverse")]),
    ],
)
@pytest.mark.slow
def test_rematerialization_changes_nothing_at_any_length(steps, others):
    # The same batch at every step is a stack of its copies.
    stack = np.repeat(STACK[:1], steps, axis=0)
    kept = UnrolledOptimizer(ADAM, unroll_steps=steps, batches="stack")
    state = kept.init(problems.W0, problems.LAM0)
    expected = kept.compute_hypergradient(state, stack, VAL, *QUADRATIC)
    for remat, mode in others:
        repeat = UnrolledOptimizer(ADAM, unroll_steps=steps, remat=remat, mode=mode)
        found = repeat.compute_hypergradient(state, STACK[0], VAL, *QUADRATIC)
        assert_close(found, expected)


@pytest.mark.parametrize(
    "kind", slow_but([UnrolledOptimizer, ForwardOptimizer, DrMADOptimizer], DrMADOptimizer)
)
def test_one_step_of_each_is_one_step(kind):
    # From a state that is not zero: DrMAD's line starts in it.
    one = OneStepOptimizer(ADAM)
    state = one.init(problems.MLP, problems.MLP_LAM)
    state = one.step(state, problems.MLP_TRAIN[1], problems.MLP_VAL, *NETWORK, 0.05)
    arguments = (state, problems.MLP_TRAIN[0], problems.MLP_VAL, *NETWORK)
    expected = one.compute_hypergradient(*arguments)
    assert_close(kind(ADAM).compute_hypergradient(*arguments), expected)


@pytest.mark.slow
def test_a_key_in_the_optimizers_state():
    inner = noisy()
    one = OneStepOptimizer(inner)
    state = one.init(problems.W0, problems.LAM0)
    found = [
        build(kind, inner).compute_hypergradient(state, STACK, VAL, *QUADRATIC)
        for kind in (UnrolledOptimizer, ForwardOptimizer, DrMADOptimizer)
    ]
    assert_close(found[1], found[0])
    assert np.isfinite(found[2]).all()


@pytest.mark.slow
@pytest.mark.parametrize("kind", [UnrolledOptimizer, DrMADOptimizer])
def test_dead_units_leave_what_is_found_without_them(kind):
    optimizer = kind(DEAD["adam"], unroll_steps=2)
    found, expected = (
        hypergradients(optimizer, f(2)) for f in (with_dead_units, without_dead_units)
    )
    assert_close(found, expected, rtol=1e-9)


@pytest.mark.slow
def test_more_coordinates_than_a_chunk():
    lam = np.linspace(-1, 1, 150)

    def train(w, lam, rows):
        return problems.quadratic_train(w, jnp.sin(lam).reshape(50, 3).sum(0), rows)

    losses = (train, problems.quadratic_val_without_lambda)
    state = UnrolledOptimizer(ADAM).init(problems.W0, lam)
    found, expected = (
        build(kind, ADAM).compute_hypergradient(state, STACK, VAL, *losses)
        for kind in (ForwardOptimizer, UnrolledOptimizer)
    )
    assert_close(found, expected)


def temporaries(optimizer, steps):
    """Bytes of temporaries of a hypergradient on a network with a batch of many rows."""
    rng = np.random.default_rng(0)
    batch = {"x": rng.normal(size=(512, problems.FEATURES)), "y": rng.normal(size=512)}

    def train(params, lam, batch):
        error = jnp.mean((problems.predict(params, batch["x"]) - batch["y"]) ** 2)
        return error + jnp.exp(lam) * jnp.sum(params["w1"] ** 2)

    losses = (train, problems.mlp_val_without_lambda)
    optimizer = optimizer(problems.SGD, unroll_steps=steps)
    state = optimizer.init(problems.MLP, np.float64(-2.0))
    estimate = jax.jit(lambda state: optimizer.estimate(state, Task(batch, batch, *losses)))
    return estimate.lower(state).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_memory_grows_as_promised():
    def growth(optimizer):
        few, many = (temporaries(optimizer, steps) for steps in (16, 64))
        return many / few

    plain = functools.partial(UnrolledOptimizer, mode="reverse-over-reverse")
    assert growth(plain) > 3.5
    assert growth(functools.partial(plain, remat="sqrt")) < 2.2  # √(64/16) and more
    assert growth(UnrolledOptimizer) < 1.2  # weights and gradients, and nothing of 512 rows
    assert growth(ForwardOptimizer) < 1.05
    assert growth(DrMADOptimizer) < 1.05


# --- Modes --------------------------------------------------------------------------------------

MIXED = ["forward-over-reverse", "reverse-over-forward"]
METHODS = {
    "One-Step": OneStepOptimizer,
    "Greedy": functools.partial(GreedyOptimizer, outer_optimizer=optax.sgd(0.1), unroll_steps=2),
    "HyperDistill": functools.partial(OnlineHypergradientOptimizer, gamma=0.9, T=2),
    "Unrolled": functools.partial(UnrolledOptimizer, unroll_steps=2),
    "DrMAD": functools.partial(DrMADOptimizer, unroll_steps=2),
}


# Greedy and HyperDistill differentiate one step at a time, as One-Step does.
@pytest.mark.parametrize("name", slow_but(["One-Step", "Unrolled", "DrMAD"], "One-Step"))
def test_modes_agree_with_hyperparameters_in_the_loss_and_the_optimizer(name):
    found = []
    for mode in ("reverse-over-reverse", *MIXED):
        optimizer = METHODS[name](TUNED["adamw"], mode=mode)
        state = optimizer.init(problems.W0, TUNED_LAM)
        found.append(optimizer.compute_hypergradient(state, STACK[0], VAL, *TUNED_LOSSES))
    assert_close(found[1], found[0], rtol=1e-9)
    assert_close(found[2], found[0], rtol=1e-9)
    assert min(abs(found[0][key]) for key in ("log_lr", "decay_rate")) > 1e-4


@pytest.mark.parametrize("mode", ["reverse-over-reverse", *MIXED])
def test_an_optimizer_that_looks_at_the_loss(mode):
    one = OneStepOptimizer(INNER["polyak"], mode=mode)
    state = one.init(problems.W0, problems.LAM0)
    expected = exact(INNER["polyak"], QUADRATIC, state, as_jax(STACK[:1]), VAL)
    assert_close(one.compute_hypergradient(state, STACK[0], VAL, *QUADRATIC), expected)


@pytest.mark.slow
def test_theta_does_not_depend_on_the_mode():
    first, *others = (
        METHODS["HyperDistill"](ADAM, mode=mode).estimate_theta(
            FOOptimizer(ADAM).init(problems.W0, problems.LAM0), STACK[:2], VAL, *QUADRATIC
        )
        for mode in ("reverse-over-reverse", *MIXED)
    )
    assert_close(others, [first, first], rtol=1e-9)
    assert abs(first - 1) > 1e-3


@pytest.mark.slow
def test_keys_and_integers_in_a_batch():
    def train(w, lam, batch):
        rows = jax.random.normal(batch["key"], (4, problems.N))
        return problems.quadratic_train(w, lam[batch["index"]], rows)

    losses = (train, problems.quadratic_val)
    batch = {"key": jax.random.key(0), "index": np.array([2, 0, 1])}
    found = []
    for mode in ("reverse-over-reverse", *MIXED):
        optimizer = UnrolledOptimizer(problems.SGD, unroll_steps=2, mode=mode)
        state = optimizer.init(problems.W0, problems.LAM0)
        found.append(optimizer.compute_hypergradient(state, batch, VAL, *losses))
    assert_close(found[1:], [found[0], found[0]])


@pytest.mark.parametrize("kind", slow_but([OneStepOptimizer, UnrolledOptimizer], OneStepOptimizer))
def test_bfloat16_weights_with_float32_hyperparameters(kind):
    with jax.enable_x64(False):
        half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), problems.MLP)
        optimizer = kind(lambda lam: optax.sgd(jnp.exp(lam["decay"]["w1"])), mode=MIXED[0])
        state = optimizer.init(half, as_jax(problems.MLP_LAM))
        batches = problems.MLP_TRAIN[0], problems.MLP_VAL
        found = optimizer.compute_hypergradient(state, *batches, *NETWORK)
        plain = dataclasses.replace(optimizer, mode="reverse-over-reverse")
        expected = plain.compute_hypergradient(state, *batches, *NETWORK)
        assert_close(found, expected, rtol=0.05, atol=0.01)


def test_a_mode_that_an_update_function_does_not_have_is_refused():
    for make in METHODS.values():
        with pytest.raises(
            ValueError, match="mode='reverse-over-forward' needs an inner_optimizer"
        ):
            make(update_fn=clipped, mode="reverse-over-forward")
        with pytest.raises(ValueError, match=r"mode must be one of .*'auto'.*, got 'forward'"):
            make(problems.SGD, mode="forward")


# --- DrMAD --------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", ["sgd", "momentum"])
def test_drmad_is_exact_where_the_jacobians_do_not_depend_on_the_point(inner):
    optimizer = build(DrMADOptimizer, INNER[inner])
    state = optimizer.init(problems.W0, problems.LAM0)
    found = optimizer.compute_hypergradient(state, STACK, VAL, *LINEAR)
    assert_close(found, exact(INNER[inner], LINEAR, state, as_jax(STACK), VAL))


def straight(w, lam, batch):
    """At λ = 0, SGD from (a, b) with b = 2 moves a alone, evenly; A and B depend on a."""
    del batch
    a, b = w
    return -a + 0.5 * (1 + a**2) * (b - 2) ** 2 - lam * jnp.sin(a) * b


def test_drmad_is_exact_where_the_trajectory_is_a_straight_line():
    def val(w, lam, batch):
        return jnp.sin(w[0]) * w[1] ** 2 + lam + batch

    start = (np.array([0.3, 2.0]), np.zeros(()))
    state = DrMADOptimizer(problems.SGD).init(*start)
    optimizers = [
        kind(problems.SGD, unroll_steps=T) for kind in (DrMADOptimizer, UnrolledOptimizer)
    ]
    found, expected = (
        optimizer.compute_hypergradient(state, 0.0, 0.0, straight, val) for optimizer in optimizers
    )
    assert_close(found, expected)
    # Elsewhere it bends, and is not.
    bent = state.update(params=jnp.array([0.3, 1.0]))
    found, expected = (
        optimizer.compute_hypergradient(bent, 0.0, 0.0, straight, val) for optimizer in optimizers
    )
    assert abs(found - expected) > 1e-3


def test_drmad_on_a_quadratic_is_the_backward_pass_of_the_paper():
    optimizer = build(DrMADOptimizer, problems.SGD)
    state, lam = optimizer.init(problems.W0, problems.LAM0), problems.LAM0
    w = problems.W0
    for rows in STACK:
        w = Exact.phi(w, lam, rows)
    alpha, g = Exact.alpha(w, lam, VAL), Exact.direct(w, lam)
    for t in range(T, 0, -1):
        w_hat = (1 - (t - 1) / T) * problems.W0 + (t - 1) / T * w
        g = g + alpha @ Exact.dphi_dlam(w_hat, STACK[t - 1])
        alpha = alpha @ Exact.dphi_dw(lam)
    assert_close(optimizer.compute_hypergradient(state, STACK, VAL, *QUADRATIC), g)


# --- Implicit -----------------------------------------------------------------------------------


def minimum(lam, rows):
    """The weights at which the quadratic training loss has no gradient, and their derivative."""
    x = rows.mean(0)
    hessian = problems.G + np.diag(lam)
    w = np.linalg.solve(hessian, x - problems.C.T @ (x * lam))
    return w, Exact.dphi_dlam(w, rows) / problems.LR, hessian  # -∂²L/∂w∂λ


def implicit(**settings):
    return ImplicitOptimizer(optax.sgd(0.0), **settings)


def test_conjugate_gradients_give_the_exact_gradient_at_a_minimum():
    w, minus_mixed, hessian = minimum(problems.LAM0, STACK[0])
    expected = Exact.direct(w, problems.LAM0) + Exact.alpha(w, problems.LAM0, VAL) @ (
        np.linalg.solve(hessian, minus_mixed)
    )
    state = implicit().init(w, problems.LAM0)
    arguments = (state, STACK[0], VAL, *QUADRATIC)
    assert_close(implicit().compute_hypergradient(*arguments), expected, rtol=1e-9)
    series = implicit(solver="neumann", K=400, neumann_rate=0.2)
    assert_close(series.compute_hypergradient(*arguments), expected, rtol=1e-9)


@pytest.mark.parametrize("K", [1, 4])
def test_k_terms_of_neumann_are_k_unrolled_steps_at_a_minimum(K):
    # Lorraine et al. 2020, the limit of truncated unrolling.
    w, *_ = minimum(problems.LAM0, STACK[0])
    state = implicit().init(w, problems.LAM0)
    arguments = (state, STACK[0], VAL, *QUADRATIC)
    series = implicit(solver="neumann", K=K, neumann_rate=problems.LR)
    unrolled = UnrolledOptimizer(problems.SGD, unroll_steps=K)
    expected = unrolled.compute_hypergradient(*arguments)
    assert_close(series.compute_hypergradient(*arguments), expected)
    if K == 1:
        one = OneStepOptimizer(problems.SGD)
        assert_close(one.compute_hypergradient(*arguments), expected)


@pytest.mark.slow
def test_more_iterations_come_closer():
    w, minus_mixed, hessian = minimum(problems.LAM0, STACK[0])
    exact = np.linalg.solve(hessian, minus_mixed)
    exact = Exact.direct(w, problems.LAM0) + Exact.alpha(w, problems.LAM0, VAL) @ exact
    state = implicit().init(w, problems.LAM0)
    for settings in ({"solver": "cg"}, {"solver": "neumann", "neumann_rate": problems.LR}):
        errors = [
            np.linalg.norm(
                implicit(**settings, K=K).compute_hypergradient(state, STACK[0], VAL, *QUADRATIC)
                - exact
            )
            for K in (1, 2)
        ]
        assert errors[0] > errors[1]
    assert errors[1] > 1e-4  # two terms of the series are not yet exact


def test_conjugate_gradients_stop_at_rounding_and_where_the_curvature_is_negative():
    def bowl(w, lam, batch):
        return jnp.sum(batch * (w - lam) ** 2)

    def val(w, lam, batch):
        return jnp.sum(w) + jnp.sum(lam**2)

    state = implicit().init(np.zeros(2), np.ones(2))
    # One iteration solves a multiple of the identity; thirty stay there.
    found = implicit(K=30).compute_hypergradient(state, np.full(2, 3.0), 0.0, bowl, val)
    assert_close(found, np.full(2, 3.0))
    found = implicit(K=30).compute_hypergradient(state, np.full(2, -3.0), 0.0, bowl, val)
    assert_close(found, np.full(2, 2.0))  # g_FO
    bad = implicit().compute_hypergradient(
        state, np.full(2, 3.0), np.nan, bowl, lambda w, lam, y: y * jnp.sum(w) + jnp.sum(lam)
    )
    assert np.isnan(bad).all()


def test_implicit_takes_its_inner_steps_and_then_the_last_batch():
    optimizer = build(ImplicitOptimizer, optax.sgd(0.1), K=3)
    state = optimizer.init(problems.W0, problems.LAM0)
    w = problems.W0
    for rows in STACK:
        w = Exact.phi(w, problems.LAM0, rows)
    new = optimizer.step(state, STACK, VAL, *QUADRATIC, 0.1)
    assert_close(new.params, w)
    _, _, hessian = minimum(problems.LAM0, STACK[-1])
    x = np.linalg.solve(hessian, Exact.alpha(w, problems.LAM0, VAL))
    mixed = Exact.dphi_dlam(w, STACK[-1]) / problems.LR
    g = Exact.direct(w, problems.LAM0) + x @ mixed
    assert_close(new.hyperparams, problems.LAM0 - 0.1 * g, rtol=1e-8)


# --- What implicit differentiation cannot see ---------------------------------------------------


def looped_train(w, lam, rows):
    """The same, with λ handed whole through a jit, a loop and a branch."""

    @jax.jit
    def inside(w, lam):
        first, _ = jax.lax.scan(lambda c, _: (c, None), (w, lam), length=2)
        return jax.lax.cond(jnp.sum(w) > 0, tuned, tuned, *first)

    def tuned(w, lam):
        return TUNED_LOSSES[0](w, lam, rows)

    return inside(w, lam)


@pytest.mark.filterwarnings("ignore::gradhpo.UnreachedWarning")
@pytest.mark.parametrize("train", [TUNED_LOSSES[0], looped_train], ids=["plain", "looped"])
def test_a_hyperparameter_of_the_optimizer_alone_is_refused_by_name(train):
    optimizer = build(ImplicitOptimizer, TUNED["adamw"])
    state = optimizer.init(problems.W0, TUNED_LAM)
    with pytest.raises(
        ValueError, match=r"hyperparams\['decay_rate'\] acts .* through the inner_optimizer only"
    ):
        optimizer.step(state, STACK, VAL, train, TUNED_LOSSES[1], 0.1)

    def update(w, lam, rows):
        return w - jnp.exp(lam["log_lr"]) * jax.grad(train)(w, lam, rows)

    optimizer = ImplicitOptimizer(update_fn=update)
    with pytest.raises(
        ValueError, match=r"hyperparams\['log_lr'\] acts .* through the update_fn only"
    ):
        optimizer.step(state, STACK[0], VAL, train, TUNED_LOSSES[1], 0.1)


@pytest.mark.filterwarnings("ignore::gradhpo.UnreachedWarning")
def test_a_hyperparameter_that_the_training_gradient_shows_is_accepted():
    # In the loss and the optimizer; in the validation loss alone; nowhere.
    def train(w, lam, rows):
        return problems.quadratic_train(w, lam["both"] ** 2, rows)

    def val(w, lam, y):
        return problems.quadratic_val_without_lambda(w, None, y) + lam["val"] ** 2

    inner = lambda lam: optax.sgd(0.1 * lam["both"].sum() ** 2)  # noqa: E731
    lam = {"both": problems.LAM0, "val": np.full((), 3.0), "nowhere": np.zeros(2)}
    optimizer = ImplicitOptimizer(inner)
    state = optimizer.init(problems.W0, lam)
    found = optimizer.compute_hypergradient(state, STACK[0], VAL, train, val)
    assert_close(found["val"], 6.0)
    assert_same_bits(found["nowhere"], np.zeros(2))


def flat_train(w, lam, batch):
    x, y = batch
    return jnp.mean((x @ w - y * jnp.exp(lam)) ** 2)


def flat_val(w, lam, v):
    return jnp.mean((v @ w - 1) ** 2)


@pytest.mark.parametrize("K", slow_but([5, 10, 50], 10))
def test_implicit_at_a_minimum_with_flat_directions(K):
    """In float32 and with more weights than rows: the minimum-norm solution's derivative."""
    optimizer = ImplicitOptimizer(optax.sgd(1e-9), optax.sgd(0.0), K=K)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        x, y, v = (rng.normal(size=shape).astype(np.float32) for shape in ((5, 20), (5,), (8, 20)))
        w = np.linalg.pinv(x) @ y  # of targets y exp(λ), at λ = 0; so dw/dλ is w
        expected = 2 / 8 * (v @ w - 1) @ v @ w
        with jax.enable_x64(False):
            state = optimizer.init(jnp.asarray(w), jnp.zeros(()))
            found = optimizer.compute_hypergradient(state, (x, y), v, flat_train, flat_val)
        np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize("split", [lambda v: (v[0], v[1]), jnp.unstack, lambda v: jnp.split(v, 2)])
def test_implicit_refuses_a_learning_rate_inside_a_vector(split):
    def inner(lam):
        return optax.sgd(jnp.exp(jnp.reshape(split(lam)[0], ())))

    def train(w, lam, batch):
        return jnp.sum((w - 1) ** 2) + jnp.exp(jnp.reshape(split(lam)[1], ())) * jnp.sum(w**2)

    optimizer = ImplicitOptimizer(inner, unroll_steps=2)
    state = optimizer.init(jnp.zeros(3), jnp.array([-3.0, -1.0]))
    with pytest.raises(ValueError, match=r"hyperparams\[0\] acts on the weights through the inner"):
        optimizer.compute_hypergradient(state, 0.0, 0.0, train, lambda w, lam, b: jnp.sum(w**2))


# --- Settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (UnrolledOptimizer, {"unroll_steps": 0}, "unroll_steps must be at least 1, got 0"),
        (
            ForwardOptimizer,
            {"batches": "both"},
            'batches must be "repeat" or "stack", got \'both\'',
        ),
        (UnrolledOptimizer, {"remat": "all"}, r"remat must be one of .*'sqrt'.*, got 'all'"),
        (ImplicitOptimizer, {"solver": "lu"}, r"solver must be one of .*'cg'.*, got 'lu'"),
        (ImplicitOptimizer, {"K": 0}, "K must be at least 1, got 0"),
        (ImplicitOptimizer, {"solver": "neumann"}, "neumann_rate goes with .*neumann_rate=None"),
        (ImplicitOptimizer, {"neumann_rate": 0.1}, "neumann_rate goes with .*solver='cg'"),
        (
            ImplicitOptimizer,
            {"solver": "neumann", "neumann_rate": 0},
            r"neumann_rate must be a number in \(0, inf\], got 0",
        ),
    ],
)
def test_bad_settings(kind, settings, message):
    with pytest.raises(ValueError, match=message):
        kind(problems.SGD, **settings)


def test_a_stack_of_another_length_is_refused():
    for kind in (UnrolledOptimizer, ForwardOptimizer, DrMADOptimizer, ImplicitOptimizer):
        optimizer = build(kind, problems.SGD)
        state = optimizer.init(problems.W0, problems.LAM0)
        with pytest.raises(ValueError, match=f"train_batch must have a leading axis of length {T}"):
            optimizer.step(state, STACK[:2], VAL, *QUADRATIC, 0.1)


@pytest.mark.slow
def test_greedy_with_more_of_the_past_comes_closer_to_the_exact_hypergradient():
    # Where A is nearly the identity, the discount that γ stands for is nearly 1.
    slow = optax.sgd(1e-3)
    state = UnrolledOptimizer(slow).init(problems.W0, problems.LAM0)
    expected = exact(slow, QUADRATIC, state, as_jax(STACK), VAL)
    errors = []
    for gamma in (0.1, 0.9, 1.0):
        greedy = build(GreedyOptimizer, slow, outer_optimizer=optax.sgd(0.1), gamma=gamma)
        found = greedy.compute_hypergradient(state, STACK, VAL, *QUADRATIC)
        errors.append(np.linalg.norm(found - expected))
    assert errors == sorted(errors, reverse=True)
