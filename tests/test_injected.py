"""Hyperparameters in the optimizer's state, and what an optimizer asks for beyond a gradient."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

import gradhpo
from gradhpo import FOOptimizer, OneStepOptimizer, UnrolledOptimizer
from gradhpo.dependence import dependents
from tests import problems
from tests.problems import assert_close
from tests.quick import slow_but

pytestmark = pytest.mark.usefixtures("only_x64")

LAM = {"loss": problems.LAM0, "rate": np.full((), -2.0)}
IN_LOSS = {"loss": problems.LAM0}
SGD = optax.sgd(0.1)


def train(w, lam, rows):
    return problems.quadratic_train(w, lam["loss"], rows)


def val(w, lam, y):
    return problems.quadratic_val(w, lam["loss"], y)


LOSSES = (train, val)


def momentum(rate):
    return optax.sgd(rate, momentum=0.9)


def injected(rate):
    return optax.inject_hyperparams(momentum)(rate)


def scheduled(rate):
    return optax.inject_hyperparams(optax.sgd)(lambda count: rate / (1 + count), momentum=0.9)


NESTED = {
    "alone": (injected, momentum),
    "chain": (
        lambda rate: optax.chain(optax.clip(1.0), injected(rate)),
        lambda rate: optax.chain(optax.clip(1.0), momentum(rate)),
    ),
    "multi_transform": (
        lambda rate: optax.multi_transform({"a": injected(rate)}, "a"),
        momentum,
    ),
    "masked": (lambda rate: optax.masked(injected(rate), True), momentum),
    "MultiSteps": (
        lambda rate: optax.MultiSteps(injected(rate), 2),
        lambda rate: optax.MultiSteps(momentum(rate), 2),
    ),
    "injected twice": (optax.inject_hyperparams(injected), momentum),
    "a schedule": (
        scheduled,
        lambda rate: optax.sgd(lambda count: rate / (1 + count), momentum=0.9),
    ),
}


@functools.cache
def unrolling(make):
    """One for each optimizer, so that what several are compared with is compiled once."""
    return UnrolledOptimizer(lambda lam: make(jnp.exp(lam["rate"])), SGD, 3)


@pytest.mark.filterwarnings("ignore:inner_optimizer keeps numbers")
@pytest.mark.parametrize("nested", NESTED)
@pytest.mark.slow
def test_an_injected_rate_follows_lambda_wherever_it_is(nested):
    found = []
    for make in NESTED[nested]:
        optimizer = unrolling(make)
        state = optimizer.init(problems.W0, LAM)
        for rows in problems.TRAIN[:2]:
            state = optimizer.step(state, rows, problems.VAL, *LOSSES)
        found.append((state.params, state.hyperparams))
    assert_close(*found)
    assert abs(found[0][1]["rate"] - LAM["rate"]) > 1e-3


# A step, differences of it, steps in reverse, steps by coordinates.
METHODS = {
    "One-Step": lambda inner: OneStepOptimizer(inner, SGD),
    "T1-T2": lambda inner: gradhpo.T1T2Optimizer(inner, SGD),
    "DrMAD": lambda inner: gradhpo.DrMADOptimizer(inner, SGD, unroll_steps=2),
    "Forward": lambda inner: gradhpo.ForwardOptimizer(inner, SGD, unroll_steps=2),
}


@pytest.mark.filterwarnings("ignore:inner_optimizer keeps numbers")
@pytest.mark.parametrize("name", slow_but(METHODS, "One-Step", "Forward"))
def test_every_kind_of_method_sees_an_injected_rate_that_the_loss_shares(name):
    # λ is in the loss too, so that a part that is missed has the wrong sign, and not only zero.
    found = []
    for make in (injected, momentum):
        optimizer = METHODS[name](lambda lam, make=make: make(jnp.exp(lam["loss"][0] - 3)))
        state = optimizer.init(problems.W0, IN_LOSS)
        for rows in problems.TRAIN[:2]:
            state = optimizer.step(state, rows, problems.VAL, *LOSSES)
        found.append((state.params, state.hyperparams))
    assert_close(*found)


@pytest.mark.filterwarnings("ignore:inner_optimizer keeps numbers")
def test_implicit_refuses_an_injected_rate():
    inner = lambda lam: injected(jnp.exp(lam["rate"]))  # noqa: E731
    optimizer = gradhpo.ImplicitOptimizer(inner, SGD, unroll_steps=2)
    state = optimizer.init(problems.W0, LAM)
    with pytest.raises(ValueError, match=r"hyperparams\['rate'\] acts on the weights through"):
        optimizer.step(state, problems.TRAIN[0], problems.VAL, *LOSSES)


def test_injected_numbers_that_do_not_depend_on_lambda_stay_as_they_are_in_the_state():
    optimizer = OneStepOptimizer(lambda lam: optax.inject_hyperparams(optax.sgd)(0.1), SGD)
    state = optimizer.init(problems.W0, IN_LOSS)
    state.inner_opt_state.hyperparams["learning_rate"] = jnp.asarray(0.0)
    moved = optimizer.step(state, problems.TRAIN[0], problems.VAL, *LOSSES)
    assert_close(moved.params, problems.W0)


def test_following_an_injected_number_is_told_once_a_start():
    optimizer = OneStepOptimizer(lambda lam: injected(jnp.exp(lam["rate"])), SGD)
    with pytest.warns(UserWarning, match=r"\.hyperparams\['rate'\] \(optax.inject_hyperparams\)"):
        state = optimizer.init(problems.W0, LAM)
    optimizer.step(state, problems.TRAIN[0], problems.VAL, *LOSSES)


# --- Other states that init makes from λ ----------------------------------------------------------

FROM_LAMBDA = {
    "rprop": (optax.rprop, r"\.step_sizes"),
    "adagrad": (lambda x: optax.adagrad(0.1, initial_accumulator_value=x), r"\.sum_of_squares"),
    "injected rprop": (optax.inject_hyperparams(optax.rprop), r"\.step_sizes"),
    "prodigy": (lambda x: contrib.prodigy(estim_lr0=x), r"\.estim_lr"),
}


@pytest.mark.filterwarnings("ignore:inner_optimizer keeps numbers")
@pytest.mark.parametrize("name", FROM_LAMBDA)
def test_a_lambda_in_the_first_state_is_refused_where_it_would_move(name):
    make, where = FROM_LAMBDA[name]

    def inner(lam):
        return make(jnp.exp(lam["rate"]))

    message = rf"hyperparams\['rate'\] sets what inner_optimizer's init .*{where}"
    outer = optax.multi_transform(
        {"move": SGD, "hold": optax.set_to_zero()}, {"loss": "move", "rate": "hold"}
    )
    for refused in (OneStepOptimizer(inner, SGD), OneStepOptimizer(inner)):
        with pytest.raises(ValueError, match=message):
            refused.init(problems.W0, LAM)
    OneStepOptimizer(inner, outer).init(problems.W0, LAM)  # does not move by it
    FOOptimizer(inner, SGD).init(problems.W0, LAM)  # does not claim to see the inner step


@pytest.mark.parametrize(
    "make",
    [
        optax.adamw,
        momentum,
        # λ is in the state, and nothing reads it there.
        lambda x: contrib.schedule_free_sgd(0.1, b1=x),
    ],
)
def test_a_lambda_that_every_step_reads_is_not_refused(make):
    optimizer = OneStepOptimizer(lambda lam: make(jnp.exp(lam["rate"])), SGD)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.init(problems.W0, LAM)


def test_dependents_are_found_by_output():
    def function(x, y):
        return x["a"] * 2, y, jax.lax.stop_gradient(x["b"]), jnp.arange(3), jax.random.key(0)

    x = {"a": jnp.ones(2), "b": jnp.ones(())}
    assert dependents(function, x, jnp.ones(3)) == [True, False, False, False, False]
    assert dependents(lambda x: jnp.ones(3), x) == [False]


# --- What an optimizer asks for -------------------------------------------------------------------

LOOKING = {
    "reduce_on_plateau": optax.chain(SGD, contrib.reduce_on_plateau(patience=1)),
    "polyak_sgd": optax.polyak_sgd(0.1),
    "momo": contrib.momo(0.1),
    "MultiSteps of polyak_sgd": optax.MultiSteps(optax.polyak_sgd(0.1), 2),
}


@pytest.mark.parametrize("name", slow_but(LOOKING, "polyak_sgd"))
def test_an_outer_optimizer_looks_at_the_validation_loss(name):
    outer = LOOKING[name]
    optimizer = OneStepOptimizer(SGD, outer)
    state = optimizer.init(problems.W0, IN_LOSS)
    lam, outer_state = state.hyperparams, outer.init(state.hyperparams)
    for rows in problems.TRAIN[:3]:
        g = optimizer.compute_hypergradient(state, rows, problems.VAL, *LOSSES)
        state = optimizer.step(state, rows, problems.VAL, *LOSSES)
        extra = {"value": state.metadata["val_loss"]}
        updates, outer_state = outer.update(g, outer_state, lam, **extra)
        lam = optax.apply_updates(lam, updates)
        assert_close(state.hyperparams, lam, rtol=1e-9)


def test_an_outer_line_search_is_refused_by_name():
    optimizer = OneStepOptimizer(SGD, optax.lbfgs())
    state = optimizer.init(problems.W0, LAM)
    with pytest.raises(TypeError, match=r"outer_optimizer asks for value_fn.*linesearch=None"):
        optimizer.step(state, problems.TRAIN[0], problems.VAL, *LOSSES)


@pytest.mark.parametrize("field", ["inner_opt_state", "outer_opt_state"])
def test_a_state_of_another_optimizer_is_named(field):
    def rated(make):
        return OneStepOptimizer(lambda lam: make(jnp.exp(lam["rate"])), make(0.1))

    adams, plains = rated(optax.adam), rated(optax.sgd)
    state = adams.init(problems.W0, LAM)
    state = state.update(**{field: getattr(plains.init(problems.W0, LAM), field)})
    role = field.replace("opt_state", "optimizer")
    with pytest.raises(ValueError, match=rf"state\.{field} is not a state of this {role}"):
        adams.step(state, problems.TRAIN[0], problems.VAL, *LOSSES)


# --- Schedules whose peak is λ --------------------------------------------------------------------


def test_a_warm_up_schedule_with_a_traced_peak_says_the_line_that_works():
    def inner(lam):
        return optax.adamw(optax.warmup_cosine_decay_schedule(0, jnp.exp(lam["rate"]), 3, 10))

    with pytest.raises(TypeError, match="needs a hyperparameter's number") as raised:
        OneStepOptimizer(inner, SGD).init(problems.W0, LAM)
    assert isinstance(raised.value.__cause__, jax.errors.ConcretizationTypeError)
    assert "optax.adamw(lambda count: jnp.exp(l) * shape(count))" in str(raised.value)


@pytest.mark.parametrize("read", [float, int, np.asarray, lambda x: np.arange(3)[x.astype(int)]])
def test_every_way_to_need_a_number_is_told(read):
    optimizer = OneStepOptimizer(lambda lam: optax.sgd(read(lam["rate"])), SGD)
    with pytest.raises(TypeError, match="inner_optimizer, a function of the hyperparameters"):
        optimizer.init(problems.W0, LAM)


@pytest.mark.slow
def test_the_line_that_works_works():
    shape = optax.warmup_cosine_decay_schedule(0, 1.0, warmup_steps=2, decay_steps=10)

    def inner(lam):
        return optax.adamw(lambda count: jnp.exp(lam["rate"]) * shape(count))

    optimizer = UnrolledOptimizer(inner, SGD, unroll_steps=3, batches="stack")
    state = optimizer.init(problems.W0, LAM)
    data = (problems.TRAIN[:3], problems.VAL)
    found = optimizer.compute_hypergradient(state, *data, *LOSSES)
    expected = problems.unrolled(inner, *LOSSES, *problems.as_jax((problems.W0, LAM)), *data)
    assert_close(found, expected)
    assert abs(found["rate"]) > 1e-4


# --- An optimizer inside the user's own step ------------------------------------------------------


def adam_step(params, lam, batch):
    """Adam's first step, on weights of which some have no gradient."""
    gradient = jax.grad(lambda w: jnp.sum(jnp.exp(lam) * jax.nn.relu(w) ** 3))(params)
    adam = optax.adam(0.1, eps=0.1)
    updates, _ = jax.jit(adam.update)(gradient, adam.init(params))
    return optax.apply_updates(params, updates)


@pytest.mark.parametrize(
    "kind",
    slow_but([OneStepOptimizer, UnrolledOptimizer, gradhpo.ForwardOptimizer], OneStepOptimizer),
)
def test_adam_in_an_update_fn_is_finite_at_a_gradient_of_zero(kind):
    losses = (lambda w, lam, _: jnp.sum(w), lambda w, lam, _: jnp.sum(w**2))
    both = kind(update_fn=adam_step, outer_optimizer=SGD)
    same = kind(optax.adam(0.1, eps=0.1), SGD)
    w, lam = np.array([0.5, -1.0]), np.zeros(2)
    found = both.compute_hypergradient(both.init(w, lam), None, None, *losses)
    inner_losses = (lambda w, lam, _: jnp.sum(jnp.exp(lam) * jax.nn.relu(w) ** 3), losses[1])
    expected = same.compute_hypergradient(same.init(w, lam), None, None, *inner_losses)
    assert np.isfinite(found).all()
    assert found[0] != 0
    assert_close(found, expected)


def test_an_update_fn_may_print_and_have_functions_of_its_own():
    @jax.jit
    def report(w):
        jax.debug.callback(seen.append, w[0])

    @jax.custom_vjp
    def triple(x):
        return 3 * x

    triple.defvjp(lambda x: (3 * x, None), lambda _, g: (3 * g,))

    def update(w, lam, _):
        report(w)
        return jax.checkpoint(lambda w: w - jax.nn.relu(triple(lam)))(w)

    seen = []
    optimizer = OneStepOptimizer(update_fn=update, outer_optimizer=SGD)
    losses = (lambda w, lam, _: jnp.sum(w), lambda w, lam, _: jnp.sum(w**2))
    state = optimizer.init(np.ones(2), np.array([-1.0, 4.0]))
    found = optimizer.compute_hypergradient(state, None, None, *losses)
    jax.effects_barrier()
    assert_close(found, np.array([0.0, -3 * 2 * (1 - 12.0)]))
    assert [float(x) for x in seen] == [1.0]


def test_an_update_fn_keeps_its_own_not_a_number():
    optimizer = OneStepOptimizer(update_fn=lambda w, lam, _: w - jnp.sqrt(lam), outer_optimizer=SGD)
    losses = (lambda w, lam, _: jnp.sum(w), lambda w, lam, _: jnp.sum(w**2))
    state = optimizer.init(np.ones(2), np.array([-1.0, 4.0]))
    found = optimizer.compute_hypergradient(state, None, None, *losses)
    np.testing.assert_array_equal(np.isnan(found), [True, False])
