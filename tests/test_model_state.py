"""Losses that remember (running statistics), draw (dropout) and report, for every method."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradhpo
from gradhpo import Aux, Problem, Task, solve
from gradhpo.horizon import estimate_at
from gradhpo.parallel import Population, data_parallel, make_mesh
from tests.problems import assert_close, assert_same_bits
from tests.quick import slow_but
from tests.small import OPTIMIZERS, REFERENCES, UNROLLING

METHODS = OPTIMIZERS | REFERENCES
RNG = np.random.default_rng(1)
X, TARGETS = RNG.normal(size=(16, 4)), RNG.normal(size=16)
PARAMS = {"in": RNG.normal(size=(4, 5)) / 2, "scale": np.ones(5), "out": RNG.normal(size=5)}
LAM = {"decay": np.full((), -2.0), "shift": np.zeros(5)}
STATE = {"mean": np.zeros(5), "var": np.ones(5), "count": np.zeros((), np.int32)}
BATCH = (X, TARGETS)
INNER = optax.sgd(0.05, momentum=0.9)
FROZEN, SLOW, SGD = optax.sgd(0.0), optax.adam(0.01), optax.sgd(0.1)
KEPT = 0.8
"""Of the units, by dropout."""


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def normalized(params, lam, x, mean, var):
    h = x @ params["in"] + lam["shift"]
    return h, params["scale"] * (h - mean) / jnp.sqrt(var + 1e-3)


def train_loss(params, lam, batch, *, model_state, key):
    """Batch normalization by the batch, with running statistics, then dropout."""
    x, y = batch
    h = x @ params["in"] + lam["shift"]
    mean, var = h.mean(0), h.var(0)
    z = jnp.tanh(normalized(params, lam, x, mean, var)[1])
    mask = jax.random.bernoulli(key, KEPT, z.shape)
    out = jnp.where(mask, z / KEPT, 0) @ params["out"]
    decay = jnp.exp(lam["decay"]) * sum(jnp.sum(w**2) for w in jax.tree.leaves(params))
    new = {
        "mean": 0.9 * model_state["mean"] + 0.1 * mean,
        "var": 0.9 * model_state["var"] + 0.1 * var,
        "count": model_state["count"] + 1,
    }
    loss = jnp.mean((out - y) ** 2) + decay
    return loss, Aux(model_state=new, metrics={"kept": mask.mean(), "units": mask.size})


def val_loss(params, lam, batch, *, model_state):
    """The same by the running statistics."""
    x, y = batch
    mean, var = model_state["mean"], model_state["var"]
    out = jnp.tanh(normalized(params, lam, x, mean, var)[1]) @ params["out"]
    return jnp.mean((out - y) ** 2), Aux(metrics={"worst": jnp.max(jnp.abs(out - y))})


def made(name, outer=None, **settings):
    settings = {"inner_optimizer": INNER} | settings
    if name in UNROLLING:
        settings = {"unroll_steps": 3} | settings
    if name == "implicit":
        settings |= {"K": 2}
    return METHODS[name](outer_optimizer=outer or FROZEN, **settings)


@functools.cache
def by_hand(seed, steps, unroll):
    """Train in plain JAX and optax; `unroll` inner steps share what one step is given."""
    key, lam = jax.random.key(seed), LAM
    params, state = jax.tree.map(jnp.asarray, (PARAMS, STATE))
    opt_state, rows = INNER.init(params), []
    for step in range(steps):
        here = jax.random.fold_in(key, step)
        for _ in range(unroll):
            used = jax.random.fold_in(here, 0)
            grad = jax.value_and_grad(train_loss, has_aux=True)
            (loss, aux), g = grad(params, lam, BATCH, model_state=state, key=used)
            updates, opt_state = INNER.update(g, opt_state, params)
            params, state = optax.apply_updates(params, updates), aux.model_state
            here = jax.random.fold_in(here, 1)
        val, aux_val = val_loss(params, lam, BATCH, model_state=state)
        told = (aux.metrics["kept"], aux.metrics["units"], aux_val.metrics["worst"])
        rows.append([loss, val, *told])
    return params, opt_state, state, np.asarray(rows)


NAMES = ("train_loss", "val_loss", "train_kept", "train_units", "val_worst")


# First-Order is a part of One-Step, and Greedy unrolls as "unrolled" does.
@pytest.mark.parametrize("name", [n for n in METHODS if n not in ("first-order", "unrolled")])
@pytest.mark.slow
def test_every_method_trains_as_a_loop_by_hand(name):
    """With λ held, all methods move weights, statistics and keys as plain training does."""
    optimizer, key = made(name), jax.random.key(3)
    state, rows = optimizer.init(PARAMS, LAM, model_state=STATE), []
    for _ in range(3):
        state = optimizer.step(state, BATCH, BATCH, train_loss, val_loss, key=key)
        rows.append([state.metadata[name] for name in NAMES])
    params, opt_state, model_state, expected = by_hand(3, 3, 3 if name in UNROLLING else 1)
    assert_close(state.params, params, rtol=1e-9)
    assert_close(state.inner_opt_state, opt_state, rtol=1e-9, atol=1e-14)
    assert_close(state.model_state, model_state, rtol=1e-9)
    assert int(state.model_state["count"]) == (9 if name in UNROLLING else 3)
    assert_close(np.asarray(rows), expected, rtol=1e-9)


def plain_objective(T, key, through):
    """L_val(w_T(λ), λ) by a loop, with the statistics differentiated or not."""

    def objective(lam):
        params, state = jax.tree.map(jnp.asarray, (PARAMS, STATE))
        opt_state, here = INNER.init(params), key
        for _ in range(T):
            used = jax.random.fold_in(here, 0)
            grad = jax.grad(train_loss, has_aux=True)
            g, aux = grad(params, lam, BATCH, model_state=state, key=used)
            updates, opt_state = INNER.update(g, opt_state, params)
            params = optax.apply_updates(params, updates)
            state = aux.model_state if through else jax.lax.stop_gradient(aux.model_state)
            here = jax.random.fold_in(here, 1)
        return val_loss(params, lam, BATCH, model_state=state)[0]

    return objective


@functools.cache
def plain_gradient(T, through):
    """By autodiff, with the keys of a method's three inner steps, or of a single one."""
    key = jax.random.key(3) if T == 3 else jax.random.fold_in(jax.random.key(3), 0)
    return jax.jit(jax.grad(plain_objective(T, key, through)))(LAM)


@pytest.mark.parametrize("through", [False, True])
@pytest.mark.parametrize("name", ["unrolled", "forward"])
@pytest.mark.slow
def test_the_unrolled_gradient_goes_through_the_statistics_where_it_is_told_to(name, through):
    optimizer = made(name, through_model_state=through)
    state, key = optimizer.init(PARAMS, LAM, model_state=STATE), jax.random.key(3)
    found = optimizer.estimate(state, Task(BATCH, BATCH, train_loss, val_loss, key)).hypergradient
    assert_close(found, plain_gradient(3, through), rtol=1e-9)
    other = plain_gradient(3, not through)
    assert not np.allclose(found["decay"], other["decay"], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "mode"),
    [(name, "reverse-over-reverse") for name in ("one-step", "unrolled")]
    + [(name, "forward-over-reverse") for name in ("drmad", "greedy")],
)
def test_one_inner_step_is_differentiated_exactly_in_every_mode(name, mode):
    unroll = {"unroll_steps": 1} if name in UNROLLING else {}
    optimizer = made(name, mode=mode, **unroll)
    state, key = optimizer.init(PARAMS, LAM, model_state=STATE), jax.random.key(3)
    given = (state, BATCH, BATCH, train_loss, val_loss)
    found = optimizer.compute_hypergradient(*given, key=key)
    assert_close(found, plain_gradient(1, False), rtol=1e-9)


@pytest.mark.slow
def test_methods_that_are_compared_walk_with_the_same_masks():
    """T inner steps, whether a method takes them one by one, all at once, or the last of them."""
    stack = jax.tree.map(lambda x: jnp.stack([x] * 3), BATCH)
    task = Task(stack, BATCH, train_loss, val_loss, jax.random.key(3))
    ends = []
    for optimizer in (made("one-step"), made("unrolled"), made("unrolled", unroll_steps=1)):
        state = optimizer.init(PARAMS, LAM, model_state=STATE)
        done = estimate_at(optimizer, state, task)
        ends.append((done.params, done.model_state, done.val_loss))
    assert_close(ends[1], ends[0], rtol=1e-9)
    assert_close(ends[2], ends[0], rtol=1e-9)


@pytest.mark.slow
def test_differences_and_implicit_see_the_mask_of_their_step():
    """T1-T2's shifted losses draw the dropout mask that the step drew."""
    t1t2, exact = made("t1t2"), made("one-step")
    state = exact.init(PARAMS, LAM, model_state=STATE)
    given = (state, BATCH, BATCH, train_loss, val_loss)
    a, b = (o.compute_hypergradient(*given, key=jax.random.key(3)) for o in (t1t2, exact))
    assert_close(a, b, rtol=1e-3, atol=1e-5)


def draw(key):
    rows = jax.random.permutation(key, 16)[:8]
    x, y = jnp.asarray(X), jnp.asarray(TARGETS)
    return (x[rows], y[rows]), (x, y)


def start(key):
    params = jax.tree.map(lambda w: w + 0.1 * jax.random.normal(key, w.shape), PARAMS)
    return params, jax.tree.map(jnp.asarray, LAM), STATE


def measure(params, lam, *, model_state):
    return {
        "mean": model_state["mean"].mean(),
        "val": val_loss(params, lam, BATCH, model_state=model_state)[0],
    }


PROBLEM = Problem(start, train_loss, val_loss, batch=draw, metrics=measure)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hyperdistill", "greedy"])
def test_solve_draws_anew_at_each_step_and_tells_what_the_losses_tell(name):
    optimizer = made(name, SLOW)
    key = jax.random.key(5)
    solution = solve(PROBLEM, optimizer, 6, key, eval_every=3)
    kept = solution.metrics["train_kept"]
    assert len(set(kept.tolist())) > 1
    assert solution.metrics["val_worst"].shape == (6,)
    assert int(solution.state.model_state["count"]) == 6 * getattr(optimizer, "unroll_steps", 1)
    assert solution.evals["val"].shape == (2,)
    half = solve(PROBLEM, optimizer, 3, key)
    resumed = solve(PROBLEM, optimizer, 6, key, resume=half)
    assert_close(resumed.state, solution.state, rtol=1e-12)
    if name == "hyperdistill":  # a calibration is another program, and draws are its step's
        return
    batched = solve(PROBLEM, optimizer, 6, jax.random.split(key, 2))
    assert (batched.metrics["train_kept"][:, 0] != batched.metrics["train_kept"][:, 1]).any()


@pytest.mark.parametrize("lr_reptile", [0.0, 0.5])
@pytest.mark.slow
def test_an_episode_begins_with_the_statistics_where_its_weights_begin(lr_reptile):
    optimizer = made("one-step")
    run = solve(PROBLEM, optimizer, 4, jax.random.key(5), episode_length=4, lr_reptile=lr_reptile)
    plain = solve(PROBLEM, optimizer, 4, jax.random.key(5)).state.model_state
    for name in ("mean", "var"):
        expected = STATE[name] + lr_reptile * (plain[name] - STATE[name])
        assert_close(run.state.model_state[name], expected, rtol=1e-9, atol=1e-12)
    assert int(run.state.model_state["count"]) == (0 if lr_reptile == 0 else 4)
    # `run` has the same rule, and its own draws.
    state = optimizer.init(PARAMS, LAM, model_state=STATE)
    batches = (lambda: BATCH, lambda: BATCH)
    after = optimizer.run(
        state, 1, 4, *batches, train_loss, val_loss, lr_reptile, key=jax.random.key(7)
    )
    _, _, by_loop, _ = by_hand(7, 4, 1)
    for name in ("mean", "var"):
        expected = STATE[name] + lr_reptile * (by_loop[name] - STATE[name])
        assert_close(after.model_state[name], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_fresh_episodes_begin_with_fresh_statistics():
    optimizer = made("one-step")
    run = solve(PROBLEM, optimizer, 5, jax.random.key(5), episode_length=4, episode_init="fresh")
    assert int(run.state.model_state["count"]) == 1


@pytest.mark.slow
def test_a_population_gives_each_slot_its_own_mask_and_statistics():
    optimizer = made("one-step", SLOW)
    keys = jax.random.split(jax.random.key(5), 3)
    trials = Population(PROBLEM, optimizer, 3, batching="vmap")
    state, rows = trials.run(trials.init(keys), 4, keys)
    assert len(set(rows["train_kept"][0].tolist())) == 3
    alone = solve(PROBLEM, optimizer, 4, keys[1])
    assert_close(rows["val_worst"][:, 1], alone.metrics["val_worst"], rtol=1e-9)
    slot = jax.tree.map(lambda x: x[1], state.model_state)
    assert_close(slot, alone.state.model_state, rtol=1e-9)


def mean_train(params, lam, batch, *, model_state, key):
    """Without anything that a part of the batch sees otherwise than the whole."""
    del key
    x, y = batch
    out = x @ params["in"][:, 0] - model_state["mean"][0]
    new = {**model_state, "mean": 0.9 * model_state["mean"] + 0.1 * (x @ params["in"]).mean(0)}
    loss = jnp.mean((out - y) ** 2) + jnp.exp(lam["decay"]) * jnp.sum(params["in"] ** 2)
    return loss, Aux(model_state=new, metrics={"out": out.mean()})


def mean_val(params, lam, batch, *, model_state):
    x, y = batch
    return jnp.mean((x @ params["in"][:, 0] - model_state["mean"][0] - y) ** 2), Aux()


def size(params, lam, batch):
    return jnp.sum(params["in"] ** 2)


def reading(key):
    return jax.random.uniform(key)


def drawing_train(params, lam, batch, *, key):
    x, y = batch
    value = jnp.mean((x @ params["in"][:, 0] - y) ** 2) * jnp.exp(lam["decay"])
    return value, Aux(metrics={"drawn": reading(key), "square": reading(key) ** 2})


@pytest.mark.parametrize("backend", slow_but(["shard_map", "auto", "pmap"], "shard_map"))
def test_statistics_of_parts_are_averaged(backend):
    lam = {"decay": LAM["decay"]}
    optimizer = made("one-step", SGD)
    parallel = data_parallel(optimizer, make_mesh(data=4), backend=backend)
    states = []
    for each in (optimizer, parallel):
        state = each.init(PARAMS, lam, model_state=STATE)
        for _ in range(2):
            args = (state, BATCH, BATCH, mean_train, mean_val)
            state = each.step(*args, key=jax.random.key(0))
        states.append(jax.device_get(state))
    assert_close(states[1], states[0], rtol=1e-9, atol=1e-12)


def test_each_device_draws_its_own():
    lam = {"decay": LAM["decay"]}
    parallel = data_parallel(made("one-step", SGD), make_mesh(data=4))
    state = parallel.init(PARAMS, lam)
    args = (state, BATCH, BATCH, drawing_train, size)
    told = parallel.step(*args, key=jax.random.key(0)).metadata
    # The variance over four devices is not 0, so they drew different numbers.
    assert float(told["train_square"]) - float(told["train_drawn"]) ** 2 > 1e-3


class FiniteDifferences(gradhpo.BilevelOptimizer):
    """An optimizer of one's own, whose losses are plain functions to it."""

    def init(self, params, hyperparams, *, model_state=None):
        states = (self.inner_optimizer.init(params), self.outer_optimizer.init(hyperparams))
        return gradhpo.BilevelState.create(params, hyperparams, *states, model_state=model_state)

    def compute_hypergradient(self, state, train_batch, val_batch, train_loss_fn, val_loss_fn):
        lam = state.hyperparams

        def objective(lam):
            g = jax.grad(train_loss_fn)(state.params, lam, train_batch)
            updates, _ = self.inner_optimizer.update(g, state.inner_opt_state, state.params)
            return val_loss_fn(optax.apply_updates(state.params, updates), lam, val_batch)

        return jax.grad(objective)(lam)


@pytest.mark.slow
def test_an_optimizer_of_ones_own_takes_losses_that_remember():
    own = FiniteDifferences(INNER, FROZEN)
    state = own.init(PARAMS, LAM, model_state=STATE)
    state = own.step(state, BATCH, BATCH, train_loss, val_loss, key=jax.random.key(3))
    params, _, model_state, rows = by_hand(3, 1, 1)
    assert_close(state.params, params, rtol=1e-9)
    assert_close(state.model_state, model_state, rtol=1e-9)
    assert_close(state.metadata["train_kept"], rows[0, 2], rtol=1e-9)


# --- Integers among the weights of an update_fn ------------------------------------------------

ADAM = optax.adam(0.05)


def no_memory_train(params, lam, batch):
    x, y = batch
    h = jnp.tanh(x @ params["in"] + lam["shift"])
    decay = jnp.exp(lam["decay"]) * jnp.sum(params["in"] ** 2)
    return jnp.mean((h @ params["out"] - y) ** 2) + decay


def no_memory_val(params, lam, batch):
    x, y = batch
    return jnp.mean((jnp.tanh(x @ params["in"] + lam["shift"]) @ params["out"] - y) ** 2)


def adam_step(both, lam, batch):
    params, opt_state = both
    updates, opt_state = ADAM.update(jax.grad(no_memory_train)(params, lam, batch), opt_state)
    return optax.apply_updates(params, updates), opt_state


def of_first(loss):
    return lambda both, lam, batch: loss(both[0], lam, batch)


OF_FIRST = (of_first(no_memory_train), of_first(no_memory_val))


# What a method does with weights beyond a step: shifts, averages, follows or interpolates them.
@pytest.mark.parametrize("name", ["one-step", "t1t2", "hyperdistill", "forward", "drmad"])
@pytest.mark.slow
def test_counts_among_the_weights_are_carried_on(name):
    """optax.adam's state as weights of an `update_fn`: its count, an integer, and dead units."""
    params = {"in": PARAMS["in"], "out": PARAMS["out"], "dead": np.zeros(3)}
    state = (params, ADAM.init(jax.tree.map(jnp.asarray, params)))
    own = made(name, optax.sgd(0.01), inner_optimizer=None, update_fn=adam_step)
    other = made(name, optax.sgd(0.01), inner_optimizer=ADAM)
    a, b = own.init(state, LAM), other.init(params, LAM)
    for _ in range(2):
        a = own.step(a, BATCH, BATCH, *OF_FIRST)
        b = other.step(b, BATCH, BATCH, no_memory_train, no_memory_val)
    assert int(a.params[1][0].count) == (6 if name in UNROLLING else 2)
    assert_close(a.params[0], b.params, rtol=1e-9)
    if name not in ("drmad", "t1t2", "hyperdistill"):  # what they average or shift is another tree
        assert_close(a.hyperparams, b.hyperparams, rtol=1e-7)
    assert bool(a.finite())
    if name == "one-step":
        again = solve(
            Problem(lambda key: (state, LAM), *OF_FIRST, batch=lambda key: (BATCH, BATCH)),
            own, 4, jax.random.key(0), episode_length=2, lr_reptile=0.5,
        )  # fmt: skip
        assert int(again.state.params[1][0].count) == 4


# --- What is refused --------------------------------------------------------------------------


def failing(train=train_loss, val=val_loss, model_state=STATE, key=True):
    optimizer = made("one-step")
    state = optimizer.init(PARAMS, LAM, model_state=model_state)
    given = {"key": jax.random.key(0)} if key else {}
    return optimizer.step(state, BATCH, BATCH, train, val, **given)


def returning(**aux):
    def train(params, lam, batch, *, model_state, key):
        loss, made = train_loss(params, lam, batch, model_state=model_state, key=key)
        return loss, dataclasses.replace(made, **aux)

    return train


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model_state": None}, ValueError, "train_loss.* takes model_state, and there is none"),
        ({"key": False}, ValueError, "train_loss.* takes key, and there is none: pass key="),
        (
            {"train": returning(model_state={"mean": np.zeros(5)})},
            ValueError,
            r"train_loss_fn's model_state lacks the leaf \['count'\]",
        ),
        ({"train": returning(metrics={"loss": 1.0})}, ValueError, "names other than 'loss'"),
        ({"train": returning(metrics={"a": "b"})}, TypeError, "'a'.* must be a number, got str"),
        ({"train": returning(metrics={"h": np.ones(2)})}, ValueError, "'h'.* must be a scalar"),
        ({"train": returning(metrics=[1.0])}, TypeError, "Aux.metrics must be a dict, got list"),
        (
            {"val": lambda w, lam, b, model_state: (jnp.sum(w["out"]), Aux(model_state))},
            ValueError,
            "val_loss_fn returns a model_state: it may read it",
        ),
        (
            {"val": lambda w, lam, b: (jnp.sum(w["out"]), {"a": 1})},
            TypeError,
            r"one floating-point scalar, or \(scalar, gradhpo.Aux\(...\)\), got tuple",
        ),
    ],
)
def test_what_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        failing(**arguments)


def quadratic(w, lam, y):
    return sum(jnp.sum((x - y) ** 2) + jnp.exp(lam["d"]) * jnp.sum(x**2) for x in w.values())


def telling(w, lam, y):
    return quadratic(w, lam, y), Aux(metrics={name: x.sum() for name, x in w.items()})


def stepped(train, weights, optimizer=None):
    optimizer = optimizer or gradhpo.OneStepOptimizer(SGD, SGD)
    state = optimizer.init({name: np.ones(3) for name in weights}, {"d": np.float64(-2.0)})
    state = optimizer.step(state, np.arange(3.0), np.arange(3.0), train, quadratic)
    return {name for name in state.metadata if name.startswith("train_")} - {"train_loss"}


def test_the_metrics_of_a_loss_may_differ_with_its_problem():
    assert stepped(telling, "wu") == {"train_w", "train_u"}
    assert stepped(telling, "w") == {"train_w"}
    assert stepped(telling, "wuv") == {"train_w", "train_u", "train_v"}


def test_a_wrapped_loss_is_another_loss():
    @functools.wraps(quadratic)
    def wrapped(w, lam, y):
        return quadratic(w, lam, y), Aux(metrics={"e": 1.0})

    assert [stepped(quadratic, "w"), stepped(wrapped, "w")] == [set(), {"train_e"}]

    class Named:
        def __init__(self, name):
            self.name = name

        @functools.partial(jax.jit, static_argnums=0)
        def loss(self, w, lam, y):
            return quadratic(w, lam, y), Aux(metrics={self.name: 1.0})

    assert stepped(Named("a").loss, "w") == {"train_a"}
    assert stepped(Named("b").loss, "w") == {"train_b"}


def test_an_estimate_of_ones_own_may_not_lose_what_the_losses_remember():
    class Forgets(gradhpo.OneStepOptimizer):
        def estimate(self, state, task):
            done = super().estimate(state, task)
            return gradhpo.Estimate(*done[:5])

    optimizer = Forgets(INNER, FROZEN)
    state = optimizer.init(PARAMS, LAM, model_state=STATE)
    with pytest.raises(ValueError, match=r"Forgets.estimate returned no model_state"):
        optimizer.step(state, BATCH, BATCH, train_loss, val_loss, key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"Forgets.estimate returned no train_w"):
        stepped(telling, "w", Forgets(SGD, SGD))


@pytest.mark.slow
def test_an_optimizer_of_ones_own_may_ask_one_of_the_librarys():
    inside = gradhpo.OneStepOptimizer(INNER, SGD)

    class Asks(FiniteDifferences):
        def compute_hypergradient(self, *given):
            return inside.compute_hypergradient(*given)

    states = []
    for each in (Asks(INNER, SGD), inside):
        state = each.init(PARAMS, LAM, model_state=STATE)
        for _ in range(2):
            # A validation loss that remembers would read what was there before the step.
            args = (state, BATCH, BATCH, train_loss, no_memory_val)
            state = each.step(*args, key=jax.random.key(3))
        states.append(state)
    assert_close(states[0].hyperparams, states[1].hyperparams, rtol=1e-9)
    assert float(states[0].hyperparams["decay"]) != LAM["decay"]


@pytest.mark.slow
def test_a_key_that_is_bound_or_optional_stays_the_users():
    own, other = jax.random.key(1), jax.random.key(2)
    bound = functools.partial(drawing_train, key=own)

    def optional(w, lam, b, key=None):
        return drawing_train(w, lam, b, key=own if key is None else key)

    optimizer = made("one-step")
    state = optimizer.init(PARAMS, {"decay": LAM["decay"]})
    drawn = [
        float(optimizer.step(state, BATCH, BATCH, loss, size, **given).metadata["train_drawn"])
        for loss, given in [
            (bound, {"key": other}),
            (bound, {}),
            (optional, {}),
            (optional, {"key": other}),
        ]
    ]
    assert drawn[0] == drawn[1] == drawn[2] == float(reading(own)) != drawn[3]


def test_an_update_fn_returns_no_metrics():
    def update(params, lam, batch):
        return params, Aux(metrics={"a": 1.0})

    optimizer = made("one-step", inner_optimizer=None, update_fn=update)
    state = optimizer.init(PARAMS, LAM)
    with pytest.raises(ValueError, match="update_fn returns metrics: return them from train_loss"):
        optimizer.step(state, BATCH, BATCH, no_memory_train, no_memory_val)


def test_modes_and_old_signatures_are_refused_by_name():
    with pytest.raises(ValueError, match="through_model_state=True needs"):
        made("unrolled", through_model_state=True, mode="forward-over-reverse")
    with pytest.raises(TypeError, match=r"Old.estimate must take \(self, state, task\)"):

        class Old(gradhpo.OneStepOptimizer):
            def estimate(self, state, train_batch, val_batch, train_loss_fn, val_loss_fn):
                raise NotImplementedError


@pytest.mark.slow
def test_plain_losses_leave_the_state_as_it_was():
    """No leaf more, so that what was saved before is read."""
    optimizer = made("hyperdistill")
    state = optimizer.init({"in": PARAMS["in"], "out": PARAMS["out"]}, LAM)
    state = optimizer.step(state, BATCH, BATCH, no_memory_train, no_memory_val)
    names = {*gradhpo.state.METRICS, "w_star", "theta", "phi"}
    assert set(state.metadata) == names
    assert state.model_state is None
    assert_same_bits(jax.tree.leaves(state.model_state), [])
