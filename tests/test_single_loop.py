"""SOBA and MA-SOBA, F2SA and BOME, against closed forms and loops in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradhpo
from gradhpo import BOMEOptimizer, F2SAOptimizer, MASOBAOptimizer, SOBAOptimizer, Task
from gradhpo.horizon import moved
from gradhpo.parallel import Population, data_parallel, make_mesh
from tests import problems, small
from tests.problems import Exact, assert_close, assert_same_bits
from tests.quick import slow_but

KINDS = {
    "soba": SOBAOptimizer,
    "masoba": MASOBAOptimizer,
    "f2sa": F2SAOptimizer,
    "bome": BOMEOptimizer,
}
KEY = jax.random.key(0)
RATE, OUTER_RATE = 0.1, 0.05
LOSSES = (problems.quadratic_train, problems.quadratic_val)
MEAN = problems.TRAIN.mean(axis=(0, 1), keepdims=True)[0]
"""One row: the loss of all batches is the loss of it."""


# --- The quadratic problem, in NumPy ------------------------------------------------------------


def gradient(w, lam, rows):
    """∇_w L_train."""
    return (w - Exact.phi(w, lam, rows)) / problems.LR


def gradient_lam(w, rows):
    """∇_λ L_train."""
    return w**2 / 2 + rows.mean(0) * (problems.C @ w)


def hessian(lam):
    """∂²L_train/∂w²."""
    return problems.G + np.diag(lam)


def mixed(w, rows):
    """∂²L_train/∂w∂λ."""
    return -Exact.dphi_dlam(w, rows) / problems.LR


def solved(lam, rows=MEAN):
    """The minimum in w, the solution of the linear system, and the gradient of L_val(w*(λ), λ)."""
    w = np.linalg.solve(hessian(lam), -gradient(np.zeros(problems.N), lam, rows))
    v = np.linalg.solve(hessian(lam), -Exact.alpha(w, lam, problems.VAL))
    return w, v, Exact.direct(w, lam) + v @ mixed(w, rows)


def started(optimizer):
    """Its state at the problem's own start, in float64."""
    return optimizer.init(*map(jnp.asarray, (problems.W0, problems.LAM0)))


def walked(optimizer, steps):
    """What takes a state so many steps on with λ held, to the state and hypergradient there."""
    task = Task(jnp.asarray(MEAN), jnp.asarray(problems.VAL), *LOSSES)

    def step(state, _):
        return moved(state, optimizer.estimate(state, task)), None

    @jax.jit
    def walk(state):
        state = jax.lax.scan(step, state, length=steps)[0]
        return state, optimizer.hypergradient(state, task)

    return walk


def trained(optimizer, batches):
    """λ and the weights after a step at each batch, and the last state."""
    lr, val = jnp.asarray(OUTER_RATE), jnp.asarray(problems.VAL)

    def step(state, rows):
        state = optimizer.advance(state, Task(rows, val, *LOSSES), lr)
        return state, (state.params, state.hyperparams)

    state, path = jax.jit(lambda s, b: jax.lax.scan(step, s, b))(started(optimizer), batches)
    return path, state


# --- Truth --------------------------------------------------------------------------------------


def test_the_linear_system_is_solved_and_the_hypergradient_is_that_of_the_value_function(x64):
    del x64
    optimizer = MASOBAOptimizer(optax.sgd(0.3))  # SOBA, and an average of it
    state, found = walked(optimizer, 400)(started(optimizer))
    w, v, truth = solved(problems.LAM0)
    assert_close(state.params, w, 1e-10)
    assert_close(state.metadata["solution"], v, 1e-10)
    assert_close(found, truth, 1e-10)


@pytest.mark.slow
def test_an_own_optimizer_solves_it_beside_an_update_fn(x64):
    del x64
    with pytest.raises(ValueError, match="needs a linear_optimizer with an update_fn"):
        SOBAOptimizer(update_fn=problems.quadratic_update)
    linear = optax.sgd(0.1, momentum=0.8)
    optimizer = SOBAOptimizer(update_fn=problems.quadratic_update, linear_optimizer=linear)
    assert_close(walked(optimizer, 400)(started(optimizer))[1], solved(problems.LAM0)[2], 1e-8)


def test_the_error_of_a_penalty_falls_as_one_over_its_multiplier(x64):
    del x64
    optimizer = F2SAOptimizer(optax.sgd(0.3), unroll_steps=20, growth=0)
    walk = walked(optimizer, 20)
    state, sigmas = started(optimizer), jnp.asarray([100.0, 1000.0, 10_000.0])
    found = jax.vmap(lambda x: walk(state.update(metadata={"multiplier": x}))[1])(sigmas)
    truth = solved(problems.LAM0)[2]
    errors = np.abs(found - truth).max(axis=1)
    np.testing.assert_allclose(errors[:-1] / errors[1:], 10, rtol=0.15)
    assert errors[-1] < 1e-3 * np.abs(truth).max()


# --- The papers' loops, step by step ------------------------------------------------------------


def numpy_soba(batches, averaging=None):
    """Dagréou et al. 2022; with `averaging`, Chen et al. 2024, Algorithm 1."""
    w, lam, y = problems.W0, problems.LAM0, problems.VAL
    v, h, path = np.zeros(problems.N), np.zeros(problems.N), []
    for rows in batches:
        d_w = gradient(w, lam, rows)
        d_v = hessian(lam) @ v + Exact.alpha(w, lam, y)
        d_lam = v @ mixed(w, rows) + Exact.direct(w, lam)
        by = d_lam if averaging is None else h
        h = h if averaging is None else (1 - averaging) * h + averaging * d_lam
        w, v, lam = w - RATE * d_w, v - RATE * d_v, lam - OUTER_RATE * by
        path.append((w, lam))
    return path


def numpy_f2sa(batches, steps=3, sigma=4.0, growth=0.5):
    """Kwon et al. 2023, Algorithm 1, with α_k = γ/σ_k."""
    z = y = problems.W0
    lam, path = problems.LAM0, []
    for rows in batches:
        for _ in range(steps):
            z = z - RATE * gradient(z, lam, rows)
            slope = Exact.alpha(y, lam, problems.VAL) + sigma * gradient(y, lam, rows)
            y = y - RATE / sigma * slope
        difference = gradient_lam(y, rows) - gradient_lam(z, rows)
        lam = lam - OUTER_RATE * (Exact.direct(y, lam) + sigma * difference)
        sigma += growth
        path.append((z, lam))
    return path


def numpy_bome(batches, barrier, steps=3, eta=0.5):
    """Ye et al. 2022, Algorithm 1."""
    w, lam, path = problems.W0, problems.LAM0, []
    for rows in batches:
        low = w
        for _ in range(steps):
            low = low - RATE * gradient(low, lam, rows)
        q = [gradient(w, lam, rows), gradient_lam(w, rows) - gradient_lam(low, rows)]
        f = [Exact.alpha(w, lam, problems.VAL), Exact.direct(w, lam)]
        q, f = np.concatenate(q), np.concatenate(f)
        gap = float(
            problems.quadratic_train(w, lam, rows) - problems.quadratic_train(low, lam, rows)
        )
        phi = eta * (q @ q if barrier == "gradient" else gap)
        along = f + max(phi - f @ q, 0) / (q @ q) * q
        w = w - RATE * along[: problems.N]
        lam = lam - OUTER_RATE * along[problems.N :]
        path.append((w, lam))
    return path


LOOPS = {
    "soba": (SOBAOptimizer, {}, numpy_soba),
    "masoba": (MASOBAOptimizer, {"averaging": 0.3}, functools.partial(numpy_soba, averaging=0.3)),
    "f2sa": (F2SAOptimizer, {"unroll_steps": 3, "multiplier": 4.0, "growth": 0.5}, numpy_f2sa),
    "bome": (BOMEOptimizer, {"search_steps": 3}, functools.partial(numpy_bome, barrier="gradient")),
    "bome, gap": (
        BOMEOptimizer,
        {"search_steps": 3, "barrier": "gap"},
        functools.partial(numpy_bome, barrier="gap"),
    ),
}


@pytest.mark.parametrize("name", slow_but(LOOPS, "masoba", "f2sa", "bome"))
def test_steps_are_those_that_the_paper_writes(name, x64):
    del x64
    kind, given, loop = LOOPS[name]
    found, _ = trained(kind(optax.sgd(RATE), **given), jnp.asarray(problems.TRAIN[:6]))
    for got, truth in zip(found, zip(*loop(problems.TRAIN[:6]), strict=True), strict=True):
        np.testing.assert_allclose(got, np.stack(truth), rtol=1e-9)
    assert not np.allclose(found[1][-1], problems.LAM0, rtol=1e-2)


# --- Convergence, where there is an optimum -----------------------------------------------------
#
# λ enters the training loss linearly, so that L_val(w*(λ), λ) is a convex quadratic; batches differ
# in the gradient and in the Hessian.


def convex_train(w, lam, rows):
    """½ wᵀ(G + 0.3 diag x̄)w - (x̄ + Cλ)ᵀw."""
    x = rows.mean(0)
    return w @ problems.G @ w / 2 + 0.15 * x @ w**2 - (x + problems.C @ lam) @ w


def convex_val(w, lam, y):
    """½ (w - y)ᵀH(w - y) + ½‖λ‖²."""
    return (w - y) @ problems.H @ (w - y) / 2 + lam @ lam / 2


def slope(lam):
    """The norm of the gradient of the value function, by all data."""
    hessian = problems.G + 0.3 * np.diag(MEAN[0])
    w = np.linalg.solve(hessian, MEAN[0] + problems.C @ lam)
    alpha = problems.H @ (w - problems.VAL)
    return np.linalg.norm(lam + problems.C.T @ np.linalg.solve(hessian, alpha))


def falling(first):
    """A rate that falls as t^-1/2."""
    return optax.sgd(lambda t: first / jnp.sqrt(1 + t / 20))


CONVERGENT = {
    "masoba": (MASOBAOptimizer, {}),
    "f2sa": (F2SAOptimizer, {"unroll_steps": 5, "growth": 0.01}),
    "bome": (BOMEOptimizer, {"search_optimizer": optax.sgd(0.2)}),
}


@pytest.mark.parametrize("name", slow_but(CONVERGENT))
def test_falling_rates_come_to_a_stationary_point(name, x64):
    """By batches; BOME, which is deterministic, by all data."""
    del x64
    kind, given = CONVERGENT[name]
    optimizer = kind(falling(0.2), falling(0.02), **given)
    drawn = np.random.default_rng(1).integers(20, size=4000)
    every = problems.TRAIN if name != "bome" else np.broadcast_to(MEAN, problems.TRAIN.shape)

    def step(state, index):
        task = Task(jnp.asarray(every)[index], jnp.asarray(problems.VAL), convex_train, convex_val)
        return optimizer.advance(state, task), None

    walk = jax.jit(lambda state: jax.lax.scan(step, state, jnp.asarray(drawn))[0])
    found = walk(started(optimizer))
    assert slope(np.asarray(found.hyperparams)) < 0.05 * slope(problems.LAM0)


# --- Several devices ----------------------------------------------------------------------------

INNER, OUTER = optax.sgd(0.05, momentum=0.9), optax.adam(0.05)
SETTINGS = {"f2sa": {"unroll_steps": 2}, "bome": {"search_steps": 2}}


def method(method):
    """An optimizer by its name."""
    return KINDS[method](INNER, OUTER, **SETTINGS.get(method, {}))


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_four_devices_give_the_numbers_of_one(name, x64):
    del x64
    batch = jax.tree.map(np.float64, small.BATCH)
    states = []
    for one in (method(name), data_parallel(method(name), make_mesh(data=4))):
        state = one.init(*jax.tree.map(lambda x: np.asarray(x, float), small.start()))
        for _ in range(3):
            state = one.step(state, batch, batch, small.train_loss, small.val_loss)
        states.append(state)
    assert_close(states[1].hyperparams, states[0].hyperparams, 1e-9)
    assert_close(states[1].params, states[0].params, 1e-9)


# --- No second derivative -----------------------------------------------------------------------


@jax.custom_vjp
def half_square(w):
    """½‖w‖², whose gradient comes from the host: nothing differentiates that."""
    return w @ w / 2


def _from_host(w, bar):
    shape = jax.ShapeDtypeStruct(w.shape, w.dtype)
    return (bar * jax.pure_callback(np.asarray, shape, w, vmap_method="sequential"),)


half_square.defvjp(lambda w: (half_square(w), w), _from_host)


def first_order_train(w, lam, batch):
    """A loss without second derivatives in the weights."""
    return half_square(w - lam["l"]) + jnp.exp(lam["decay"]) * half_square(w) + 0 * batch[0].sum()


@pytest.mark.parametrize("name", slow_but(["f2sa", "bome"], "f2sa"))
def test_a_loss_needs_no_second_derivative(name):
    losses = (small.BATCH, small.BATCH, first_order_train, small.val_loss)
    optimizer = KINDS[name](optax.sgd(0.1))
    state = optimizer.init(*small.start())
    for _ in range(2):
        state = optimizer.step(state, *losses, 0.1)
    assert not np.allclose(state.hyperparams["decay"], -3.0)
    soba = SOBAOptimizer(optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"(?s)callback.*(JVP|differentiat)"):
        soba.compute_hypergradient(soba.init(*small.start()), *losses)


# --- Doors --------------------------------------------------------------------------------------


def drawn(key):
    """Batches drawn by a key."""
    rows = jax.random.choice(key, 12, (8,))
    return jax.tree.map(lambda x: jnp.asarray(x)[rows], small.BATCH), small.BATCH


PROBLEM = gradhpo.Problem(small.start, small.train_loss, small.val_loss, batch=drawn)


def solved_in_episodes(name, steps, key=KEY, **settings):
    """A solution, in episodes of three steps."""
    return gradhpo.solve(
        PROBLEM, method(name), steps, key, episode_length=3, progress=False, **settings
    )


# Of what these two remember, the others remember a part.
REMEMBERING = ["masoba", "f2sa"]


@pytest.mark.slow
@pytest.mark.parametrize("name", REMEMBERING)
def test_a_run_goes_on_to_the_bit_from_its_folder(name, tmp_path):
    whole = solved_in_episodes(name, 7)
    solved_in_episodes(name, 4).save(tmp_path / "part")
    part = gradhpo.Solution.load(tmp_path / "part", PROBLEM, method(name))
    assert_same_bits(solved_in_episodes(name, 7, resume=part).state, whole.state)


@pytest.mark.slow
@pytest.mark.parametrize("name", REMEMBERING)
def test_a_slot_of_a_population_is_a_solve(name):
    keys = jax.random.split(KEY, 2)
    trials = Population(PROBLEM, method(name), 2, batching="vmap", episode_length=3)
    state, _ = trials.run(trials.init(keys), 4, keys)
    alone = solved_in_episodes(name, 4, keys[1]).state
    for got, truth in ((state.hyperparams, alone.hyperparams), (state.params, alone.params)):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a[1], b, rtol=1e-4, atol=1e-6), got, truth
        )


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        (MASOBAOptimizer, {"averaging": 0}, r"averaging must be a number in \(0, 1\], got 0"),
        (F2SAOptimizer, {"multiplier": 0}, r"multiplier must be .*, got 0"),
        (F2SAOptimizer, {"growth": -1}, r"growth must be .*, got -1"),
        (BOMEOptimizer, {"eta": 0}, r"eta must be .*, got 0"),
        (BOMEOptimizer, {"search_steps": 0}, "search_steps must be"),
        (BOMEOptimizer, {"barrier": "log"}, "barrier must be one of"),
    ],
)
def test_bad_settings(kind, given, message):
    with pytest.raises(ValueError, match=message):
        kind(INNER, **given)


@pytest.mark.parametrize("name", slow_but(KINDS, "soba"))
def test_a_tuned_rate_is_refused_by_name_and_one_that_is_held_is_not(name):
    def train(w, lam, batch):
        return small.train_loss(w, lam, batch)

    w, lam = small.start()
    lam = lam | {"rate": jnp.asarray(0.05)}
    kinds = {"l": "tuned", "decay": "tuned", "rate": "held"}
    outer = optax.multi_transform({"tuned": OUTER, "held": optax.set_to_zero()}, kinds)
    losses = (small.BATCH, small.BATCH, train, small.val_loss)
    optimizer = KINDS[name](lambda lam: optax.sgd(lam["rate"]))
    with pytest.raises(ValueError, match=rf"hyperparams\['rate'\] acts.*{KINDS[name].__name__}"):
        optimizer.step(optimizer.init(w, lam), *losses, 0.1)
    optimizer = KINDS[name](lambda lam: optax.sgd(lam["rate"]), outer)
    jax.eval_shape(optimizer.advance, optimizer.init(w, lam), Task(*losses))
