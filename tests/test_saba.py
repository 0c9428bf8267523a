"""SABA against closed forms, a loop in NumPy, and SOBA, which stalls where it does not."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradhpo
from gradhpo import SABAOptimizer, SOBAOptimizer, Task
from gradhpo.parallel import Population, data_parallel, make_mesh
from tests import problems, small
from tests.problems import Exact, assert_close, assert_same_bits

KEY = jax.random.key(0)
RATE, OUTER_RATE = 0.1, 0.05
TRAINS, VALS = problems.TRAIN[:6], problems.VAL + np.linspace(-1, 1, 3)[:, None]
"""Six training batches of four rows, and three validation batches of one."""


def train_loss(w, lam, batch):
    return problems.quadratic_train(w, lam, batch["x"])


def val_loss(w, lam, batch):
    return problems.quadratic_val(w, lam, batch["x"])


def pair(i, j):
    """Training batch i and validation batch j."""
    return {"index": i, "x": jnp.asarray(TRAINS)[i]}, {"index": j, "x": jnp.asarray(VALS)[j]}


def saba(inner=None, **given):
    return SABAOptimizer(inner or optax.sgd(RATE), train_batches=6, val_batches=3, **given)


@functools.cache
def walk(optimizer, losses=(train_loss, val_loss), lr=OUTER_RATE):
    """What takes a state along pairs of indices."""

    def step(state, indices):
        task = Task(*pair(*indices), *losses)
        state = optimizer.advance(state, task, jnp.asarray(lr))
        return state, (state.params, state.hyperparams)

    return jax.jit(lambda state, indices: jax.lax.scan(step, state, indices))


def started(optimizer):
    return optimizer.init(*map(jnp.asarray, (problems.W0, problems.LAM0)))


def drawn(steps, seed=0):
    """Pairs of indices at random."""
    return np.random.default_rng(seed).integers([6, 3], size=(steps, 2))


# --- Truth --------------------------------------------------------------------------------------


def oracles(w, v, lam, i, j):
    """What batches i and j give at a point, in closed form."""
    rows = TRAINS[i]
    mixed = -Exact.dphi_dlam(w, rows) / problems.LR
    return {
        "gradient": (w - Exact.phi(w, lam, rows)) / problems.LR,
        "hessian_v": (problems.G + np.diag(lam)) @ v,
        "mixed_v": v @ mixed,
        "alpha": Exact.alpha(w, lam, VALS[j]),
        "direct": Exact.direct(w, lam),
    }


def numpy_saba(w, lam, indices):
    """Dagréou et al. 2022: the directions before the memories take the new oracles in."""
    v, path = np.zeros(problems.N), []
    slots = {name: np.zeros((6, problems.N)) for name in ("gradient", "hessian_v", "mixed_v")}
    slots |= {name: np.zeros((3, problems.N)) for name in ("alpha", "direct")}
    for i, j in indices:
        at = {name: i if len(m) == 6 else j for name, m in slots.items()}
        new = oracles(w, v, lam, i, j)
        d = {name: x - slots[name][at[name]] + slots[name].mean(0) for name, x in new.items()}
        w = w - RATE * d["gradient"]
        v = v - RATE * (d["hessian_v"] + d["alpha"])
        lam = lam - OUTER_RATE * (d["mixed_v"] + d["direct"])
        for name, x in new.items():
            slots[name][at[name]] = x
        path.append((w, lam))
    return path, slots


def test_steps_are_those_of_the_paper_and_the_means_are_those_of_the_slots(x64):
    del x64
    state, found = walk(saba())(started(saba()), drawn(30))
    path, slots = numpy_saba(problems.W0, problems.LAM0, drawn(30))
    for got, truth in zip(found, zip(*path, strict=True), strict=True):
        np.testing.assert_allclose(got, np.stack(truth), rtol=1e-9)
    for name, truth in slots.items():
        assert_close(state.metadata["slots"][name], truth, 1e-9)
        assert_close(state.metadata["means"][name], truth.mean(0), 1e-9)


def test_after_a_pass_at_one_point_the_means_are_those_over_all_data(x64):
    del x64
    optimizer = saba(optax.sgd(0.0), outer_optimizer=optax.sgd(0.0))
    v = np.arange(1.0, 1 + problems.N)
    state, means = started(optimizer).update(metadata={"solution": jnp.asarray(v)}), {}

    @jax.jit
    def advance(state, i, j):
        return optimizer.advance(state, Task(*pair(i, j), train_loss, val_loss))

    for step in range(6):
        state = advance(state, step, step % 3)
    found = [oracles(problems.W0, v, problems.LAM0, i, i % 3) for i in range(6)]
    for name in found[0]:
        means[name] = np.mean([of[name] for of in found], axis=0)
        assert_close(state.metadata["means"][name], means[name], 1e-10)
    # and then any batch gives the direction of all data
    task = Task(*pair(4, 1), train_loss, val_loss)
    assert_close(optimizer.hypergradient(state, task), means["mixed_v"] + means["direct"], 1e-10)


def test_a_loop_writes_into_the_memories():
    optimizer = saba()

    def step(state, indices):
        task = Task(*pair(*indices), train_loss, val_loss)
        return optimizer.advance(state, task, OUTER_RATE), None

    def loop(state, indices):
        return jax.lax.scan(step, state, indices)[0]

    compiled = jax.jit(loop, donate_argnums=0).lower(started(optimizer), drawn(9)).compile()
    text = compiled.as_text()
    slots = rf"= f32\[[63],{problems.N}\]\S* "
    assert re.search(slots + "(fusion|dynamic-update-slice)", text)
    assert not re.findall(slots + "copy", text)


def convex_train(w, lam, batch):
    """½ wᵀ(G + 0.3 diag x̄)w - (x̄ + Cλ)ᵀw: batches differ in the Hessian too."""
    x = batch["x"].mean(0)
    return w @ problems.G @ w / 2 + 0.15 * x @ w**2 - (x + problems.C @ lam) @ w


def convex_val(w, lam, batch):
    """½ (w - y)ᵀH(w - y) + ½‖λ‖²."""
    return (w - batch["x"]) @ problems.H @ (w - batch["x"]) / 2 + lam @ lam / 2


def optimum():
    """The minimum of the value function over all data, in closed form."""
    x, y = TRAINS.mean((0, 1)), VALS.mean(0)
    inverse = np.linalg.inv(problems.G + 0.3 * np.diag(x))
    W = inverse @ problems.C  # w = inverse x + Wλ
    quadratic = W.T @ problems.H @ W + np.eye(problems.N)
    return np.linalg.solve(quadratic, -W.T @ problems.H @ (inverse @ x - y))


def test_constant_rates_converge_linearly_where_sobas_stall(x64):
    del x64
    far = {}
    losses, inner = (convex_train, convex_val), optax.sgd(0.2)
    for name, optimizer in (("saba", saba(inner)), ("soba", SOBAOptimizer(inner))):
        path = walk(optimizer, losses, 0.02)(started(optimizer), drawn(3000))[1][1]
        far[name] = np.linalg.norm(np.asarray(path)[[499, 999, 1499, 2999]] - optimum(), axis=1)
    assert (far["saba"][1:3] / far["saba"][:2] < 1e-2).all()
    assert far["saba"][-1] < 1e-11
    assert far["soba"][1:].min() > 1e-4


# --- Doors --------------------------------------------------------------------------------------


def small_train(w, lam, batch):
    return small.train_loss(w, lam, batch["xy"])


def small_val(w, lam, batch):
    return small.val_loss(w, lam, batch["xy"])


def small_problem(offset=0):
    """The small regression problem, cut into three batches of four rows."""
    parts = jax.tree.map(lambda x: x.reshape(3, 4, *x.shape[1:]), small.BATCH)

    def batch(key):
        i, j = jax.random.randint(key, (2,), 0, 3)
        at = lambda k: jax.tree.map(lambda x: jnp.asarray(x)[k], parts)  # noqa: E731
        return {"index": i + offset, "xy": at(i)}, {"index": j, "xy": at(j)}

    return gradhpo.Problem(small.start, small_train, small_val, batch=batch)


SMALL = SABAOptimizer(optax.sgd(0.05), optax.adam(0.05), train_batches=3, val_batches=3)


def test_a_run_goes_on_to_the_bit_and_a_slot_of_a_population_is_a_solve(tmp_path):
    problem, keys = small_problem(), jax.random.split(KEY, 2)
    solve = functools.partial(gradhpo.solve, problem, SMALL, key=keys[1], progress=False)
    whole = solve(7)
    solve(4).save(tmp_path / "part")
    part = gradhpo.Solution.load(tmp_path / "part", problem, SMALL)
    assert_same_bits(solve(7, resume=part).state, whole.state)
    trials = Population(problem, SMALL, 2, batching="vmap")
    state, _ = trials.run(trials.init(keys), 7, keys)
    one = jax.tree.map(lambda x: x[1], state.metadata["slots"])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        (state.params[1], one),
        (whole.state.params, whole.state.metadata["slots"]),
    )


@pytest.mark.slow
def test_four_devices_give_the_numbers_of_one(x64):
    del x64
    xy = jax.tree.map(lambda x: np.float64(x[:8]), small.BATCH)
    batch = {"index": np.full(8, 2), "xy": xy}
    states = []
    for one in (SMALL, data_parallel(SMALL, make_mesh(data=4), backend="auto")):
        state = one.init(*jax.tree.map(lambda x: np.asarray(x, float), small.start()))
        for _ in range(3):
            state = one.step(state, batch, batch, small_train, small_val)
        states.append(state)
    assert_close(states[1].hyperparams, states[0].hyperparams, 1e-9)
    assert_close(states[1].metadata["slots"], states[0].metadata["slots"], 1e-9)
    divided = data_parallel(SMALL, make_mesh(data=4))
    with pytest.raises(ValueError, match='use backend="auto"'):
        divided.step(divided.init(*small.start()), batch, batch, small_train, small_val)


def test_memories_are_in_float32_at_least():
    w, lam = jax.tree.map(lambda x: x.astype(jnp.bfloat16), small.start())
    state = SMALL.init(w, lam)
    kinds = {leaf.dtype for leaf in jax.tree.leaves(state.metadata["slots"])}
    assert kinds == {jnp.dtype("float32")}
    batch = {"index": jnp.asarray(0), "xy": small.BATCH}
    after = jax.eval_shape(SMALL.advance, state, Task(batch, batch, small_train, small_val))
    assert after.params.dtype == jnp.bfloat16


# --- Refused ------------------------------------------------------------------------------------


def lenient_loss(w, lam, batch):
    return small.train_loss(w, lam, batch["xy"] if isinstance(batch, dict) else batch)


def test_memories_that_are_too_large_are_refused_by_their_size():
    w, lam = (jax.ShapeDtypeStruct((n,), jnp.float32) for n in (10**6, 10))
    given = {"train_batches": 200, "val_batches": 50}
    size = 4 * (200 * (2 * 10**6 + 10) + 50 * (10**6 + 10))
    with pytest.raises(ValueError, match=rf"remember {size:,} bytes.*limit is 1,073,741,824"):
        jax.eval_shape(SABAOptimizer(optax.sgd(0.1), **given).init, w, lam)
    enough = SABAOptimizer(optax.sgd(0.1), **given, memory_limit=size)
    jax.eval_shape(enough.init, w, lam)


@pytest.mark.parametrize("index", [-1, 3])
def test_an_index_of_no_batch_is_not_taken_for_another(index):
    with pytest.warns(gradhpo.DivergenceWarning):
        gradhpo.solve(small_problem(index), SMALL, 20, KEY, progress=False)


@pytest.mark.parametrize(
    ("batch", "kind", "message"),
    [
        ({"xy": small.BATCH}, ValueError, r"which batch.*keys \['xy'\]"),
        (small.BATCH, ValueError, "which batch.*a batch with tuple"),
        ({"index": 0.0, "xy": small.BATCH}, TypeError, "index of train_batch must be an integer"),
    ],
)
def test_a_batch_that_does_not_say_which_it_is(batch, kind, message):
    state, task = SMALL.init(*small.start()), Task(batch, batch, lenient_loss, lenient_loss)
    with pytest.raises(kind, match=message):
        jax.eval_shape(SMALL.hypergradient, state, task)


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        ({}, TypeError, "train_batches must be an integer of at least 1, got None"),
        ({"train_batches": 0, "val_batches": 1}, ValueError, "train_batches must be at least 1"),
        ({"train_batches": 1, "val_batches": 2.0}, TypeError, "val_batches must be an integer"),
        ({"train_batches": 1, "val_batches": 1, "index": 3}, TypeError, "index must be a function"),
    ],
)
def test_bad_settings(given, kind, message):
    with pytest.raises(kind, match=message):
        SABAOptimizer(optax.sgd(0.1), **given)
