"""Hyperparameters that nothing leads from to the validation loss are told, by name and once."""

import functools
import warnings

import jax
import jax.numpy as jnp
import optax
import pytest

import gradhpo
from gradhpo import UnreachedWarning
from gradhpo.cluster import RandomSearch, SearchSpace, Sweep, uniform
from gradhpo.parallel import Population, data_parallel, make_mesh
from tests.quick import slow_but
from tests.small import BATCH, OPTIMIZERS, OUTER, REFERENCES, run_arguments
from tests.small import build as small

METHODS = [*OPTIMIZERS, *REFERENCES]
W2 = jnp.array([0.5, -0.4])
WEIGHTS = jnp.array([0.5, -0.4, 0.8])
LAM = {"decay": jnp.asarray(-1.0), "nobody": jnp.ones(2)}


def losses(how="used"):
    """New losses: what was said of others does not count."""

    def train(w, lam, batch):
        x, y = batch
        decay = jnp.exp(lam["decay"])
        if how == "blocked":
            decay = jax.lax.stop_gradient(decay)
        return jnp.mean((x @ w - y) ** 2) + decay * jnp.sum(w**2)

    def val(w, lam, batch):
        x, y = batch
        if how == "accuracy":
            return jnp.mean((x @ w > 0) == (y > 0)).astype(float)
        direct = 0.01 * lam["decay"] ** 2 if how == "used" else 0.0
        return jnp.mean((x @ w - y) ** 2) + direct

    return train, val


def problem(how="used"):
    return gradhpo.Problem(
        lambda key: (WEIGHTS, LAM), *losses(how), batch=lambda key: (BATCH, BATCH)
    )


def step(optimizer, how, times=1):
    state, pair = optimizer.init(WEIGHTS, LAM), losses(how)
    for _ in range(times):
        state = optimizer.step(state, BATCH, BATCH, *pair)


def check(optimizer, how):
    """What every door does first; nothing is compiled."""
    optimizer.check_reach(optimizer.init(WEIGHTS, LAM), gradhpo.Task(BATCH, BATCH, *losses(how)))


def run(optimizer, how, name):
    state = optimizer.init(WEIGHTS, LAM)
    data = (lambda: BATCH, lambda: BATCH)
    return optimizer.run(state, 2, *run_arguments(name, 2), *data, *losses(how), progress=False)


def population(optimizer, how):
    trials = Population(problem(how), optimizer, 2, batching="vmap")
    trials.run(trials.init(jax.random.key(0)), 2, jax.random.split(jax.random.key(0), 2))


def sweep(optimizer, how, folder):
    space = SearchSpace(hyperparams={"decay": uniform(-2, 0)})
    Sweep(
        problem=problem(how), optimizer=optimizer, space=space, population=2, generations=2,
        steps_per_generation=1, scheduler=RandomSearch(), storage=folder, executor="local",
        batching="vmap", progress=False,
    ).run()  # fmt: skip


def told(action):
    """The texts of the warnings about hyperparameters."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
    return [(str(w.message), w.filename) for w in caught if w.category is UnreachedWarning]


@pytest.mark.parametrize("name", METHODS)
def test_an_unused_leaf_is_told_by_every_method(name):
    optimizer, _ = small(name, outer=True)
    ((text, where),) = told(lambda: check(optimizer, "used"))
    assert where == __file__
    assert "hyperparams['nobody'] gets no hypergradient" in text
    assert "hyperparams['decay']" not in text


@pytest.mark.parametrize(
    "door",
    slow_but(["step", "run", "solve", "population", "data_parallel", "diagnose"], "step", "solve"),
)
def test_an_unused_leaf_is_told_once_at_every_door(door):
    optimizer, key = gradhpo.OneStepOptimizer(optax.sgd(0.1), OUTER), jax.random.key(0)
    divided = data_parallel(optimizer, make_mesh(data=2))
    here = problem()
    actions = {
        "step": lambda: step(optimizer, "used", times=3),
        "run": lambda: run(optimizer, "used", "one-step"),
        "solve": lambda: gradhpo.solve(here, optimizer, 3, key, progress=False),
        "population": lambda: population(optimizer, "used"),
        "data_parallel": lambda: [gradhpo.solve(here, divided, n, key) for n in (2, 3)],
        "diagnose": lambda: gradhpo.diagnose(
            here, optimizer.init(WEIGHTS, LAM), key, inner_optimizer=optax.sgd(0.1), horizon=2,
            methods=["first-order", "one-step"], samples=1, rounds=0, progress=False,
        ),
    }  # fmt: skip
    ((text, where),) = told(actions[door])
    assert where == __file__
    assert "hyperparams['nobody'] gets no hypergradient: neither the update" in text


@pytest.mark.slow
def test_an_unused_leaf_is_told_once_by_a_sweep(tmp_path):
    optimizer = gradhpo.OneStepOptimizer(optax.sgd(0.1), OUTER)
    ((text, where),) = told(lambda: sweep(optimizer, "used", tmp_path / "s"))
    assert "hyperparams['nobody']" in text
    assert where == __file__


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("blocked", r"hyperparams\['decay'\].*no derivative goes through \(stop_gradient"),
        ("accuracy", r"hyperparams\['decay'\].*val_loss_fn has no gradient in the weights"),
    ],
)
@pytest.mark.parametrize("name", sorted(set(METHODS) - {"first-order"}))
def test_nothing_that_moves_is_an_error(name, how, why):
    optimizer, _ = small(name, outer=True)
    with pytest.raises(ValueError, match=f"{why}.*No hyperparameter would ever move"):
        check(optimizer, how)


@pytest.mark.parametrize(
    "door", ["step", "run", "solve", "population", "sweep", "compute_hypergradient"]
)
def test_nothing_that_moves_is_an_error_at_every_door(door, tmp_path):
    optimizer, key = gradhpo.OneStepOptimizer(optax.sgd(0.1), OUTER), jax.random.key(0)
    hypergradient = optimizer.compute_hypergradient
    actions = {
        "step": lambda: step(optimizer, "accuracy"),
        "run": lambda: run(optimizer, "accuracy", "one-step"),
        "solve": lambda: gradhpo.solve(problem("accuracy"), optimizer, 3, key, progress=False),
        "population": lambda: population(optimizer, "accuracy"),
        "sweep": lambda: sweep(optimizer, "accuracy", tmp_path / "s"),
        "compute_hypergradient": lambda: hypergradient(
            optimizer.init(WEIGHTS, LAM), BATCH, BATCH, *losses("accuracy")
        ),
    }
    with pytest.raises(ValueError, match="No hyperparameter would ever move"):
        actions[door]()


def test_first_order_that_sees_nothing_is_only_warned_of():
    optimizer = gradhpo.FOOptimizer(optax.sgd(0.1), OUTER)
    ((text, _),) = told(lambda: check(optimizer, "unused"))
    assert "hyperparams['decay']" in text
    assert "this method differentiates val_loss_fn alone" in text


def test_a_leaf_that_the_outer_optimizer_holds_fixed_is_not_told():
    held = optax.multi_transform(
        {"tuned": OUTER, "held": optax.set_to_zero()}, {"decay": "tuned", "nobody": "held"}
    )
    assert told(lambda: check(gradhpo.OneStepOptimizer(optax.sgd(0.1), held), "used")) == []
    still = gradhpo.OneStepOptimizer(optax.sgd(0.1), optax.set_to_zero())
    assert told(lambda: check(still, "blocked")) == []  # a sweep searches it
    at_rest = gradhpo.OneStepOptimizer(optax.sgd(0.1), optax.sgd(0.0))
    assert told(lambda: check(at_rest, "blocked")) == []


def test_a_leaf_that_is_freed_later_is_told_then():
    pair = losses("unused")
    held = optax.multi_transform(
        {"tuned": OUTER, "held": optax.set_to_zero()}, {"decay": "tuned", "nobody": "held"}
    )
    for outer, n in ((held, 0), (OUTER, 1)):
        optimizer = gradhpo.OneStepOptimizer(optax.sgd(0.1), outer)
        state, task = optimizer.init(WEIGHTS, LAM), gradhpo.Task(BATCH, BATCH, *pair)
        texts = told(functools.partial(optimizer.check_reach, state, task))
        assert len(texts) == n


@pytest.mark.parametrize("outer", [optax.lion(0.1), optax.sign_sgd(0.1)])
def test_an_outer_optimizer_that_takes_signs_is_told_too(outer):
    texts = told(lambda: check(gradhpo.OneStepOptimizer(optax.sgd(0.1), outer), "used"))
    assert len(texts) == 1


@pytest.mark.parametrize("inner", [optax.lion(0.1), optax.sign_sgd(0.1)])
def test_an_inner_optimizer_that_takes_signs_is_not_taken_for_unread_weights(inner):
    """Lion remembers λ's part of the gradient, and moves by its sign."""
    train, val = losses("direct in the training loss alone")
    optimizer = gradhpo.OneStepOptimizer(inner, OUTER)
    lam = {"decay": jnp.asarray(-1.0)}
    with pytest.raises(ValueError, match=r"no derivative goes through .*a sign"):
        optimizer.step(optimizer.init(WEIGHTS, lam), BATCH, BATCH, train, val)


def test_a_leaf_that_moves_only_weights_that_validation_does_not_read_is_told():
    def train(w, lam, batch):
        return jnp.sum((w["seen"] - lam["seen"]) ** 2) + lam["unseen"] * jnp.sum(w["unseen"] ** 2)

    def val(w, lam, batch):
        return jnp.sum(w["seen"] ** 2)

    def run(train):
        optimizer = gradhpo.OneStepOptimizer(optax.adam(0.1), OUTER)
        lam = {"seen": jnp.ones(2), "unseen": jnp.ones(()), "empty": jnp.ones((0, 3))}
        state = optimizer.init({"seen": W2, "unseen": W2}, lam)
        optimizer.check_reach(state, gradhpo.Task(0.0, 0.0, train, val))

    ((text, _),) = told(lambda: run(train))
    assert (
        "'unseen'] gets no hypergradient: it moves only weights that val_loss_fn does not" in text
    )
    assert "'empty'" not in text

    def by_the_way(w, lam, batch):  # the weights that it moves lead on
        return train(w, lam, batch) + jnp.sum(w["unseen"] * w["seen"])

    assert told(lambda: run(by_the_way)) == []


def test_a_quantized_model_with_a_straight_through_estimate_is_not_refused():
    @jax.custom_vjp
    def quantized(w):
        return jnp.round(4 * w) / 4

    quantized.defvjp(lambda w: (quantized(w), None), lambda _, g: (g,))
    train, val = losses("unused")
    lam = {"decay": LAM["decay"]}
    optimizer = gradhpo.OneStepOptimizer(optax.sgd(0.1), OUTER)
    g = optimizer.compute_hypergradient(
        optimizer.init(WEIGHTS, lam), BATCH, BATCH,
        lambda w, lam, b: train(quantized(w), lam, b), lambda w, lam, b: val(quantized(w), lam, b),
    )  # fmt: skip
    assert g["decay"] != 0


def test_differences_in_lambda_see_what_has_no_derivative():
    def update(w, lam, batch):
        return w * (1 - 0.01 * jnp.exp(jax.lax.stop_gradient(lam["decay"])))

    pair = losses("unused")

    def both():
        t1t2 = gradhpo.T1T2Optimizer(update_fn=update, outer_optimizer=OUTER)
        t1t2.check_reach(t1t2.init(WEIGHTS, LAM), gradhpo.Task(BATCH, BATCH, *pair))

    ((text, _),) = told(both)
    assert "decay" not in text
    one_step = gradhpo.OneStepOptimizer(update_fn=update, outer_optimizer=OUTER)
    with pytest.raises(ValueError, match="No hyperparameter would ever move"):
        one_step.step(one_step.init(WEIGHTS, LAM), BATCH, BATCH, *pair)


# --- Losses that are new at every call -----------------------------------------------------------


def scaled(scale, w, lam, batch):
    """For `functools.partial`, another of which is another function."""
    x, y = batch
    return scale * jnp.mean((x @ w - y) ** 2) + lam * jnp.sum(w**2)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "make"), [
    ("step", lambda: lambda w, lam, batch: scaled(1.0, w, lam, batch)),
    ("compute_hypergradient", lambda: functools.partial(scaled, 1.0)),
])  # fmt: skip
def test_a_loss_redefined_in_a_loop_is_told_at_the_third_compile(method, make):
    optimizer, once = gradhpo.OneStepOptimizer(optax.sgd(0.1), OUTER), make()
    state = optimizer.init(WEIGHTS, jnp.zeros(()))
    for i in range(5):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            getattr(optimizer, method)(state, BATCH, BATCH, make(), once)
        expected = [gradhpo.RecompileWarning] if i == 2 else []
        assert [w.category for w in caught] == expected
        for w in caught:
            assert "train_loss_fn" in str(w.message)
            assert __file__ in str(w.message)
            assert w.filename == __file__


@pytest.mark.slow
def test_losses_defined_once_are_not_told_of_whatever_the_shapes():
    optimizer, pair = gradhpo.OneStepOptimizer(optax.sgd(0.1), OUTER), losses("unused")
    lam = {"decay": LAM["decay"]}
    for rows in range(2, 8):
        batch = jax.tree.map(lambda x, rows=rows: x[:rows], BATCH)
        optimizer.step(optimizer.init(WEIGHTS, lam), batch, batch, *pair)


class Model:
    """Losses as bound methods, which are new objects at every look."""

    def train(self, w, lam, batch):
        return scaled(1.0, w, lam, batch)

    def val(self, w, lam, batch):
        return scaled(2.0, w, lam, batch)


@pytest.mark.parametrize("divided", [False, True])
@pytest.mark.slow
def test_other_shapes_of_batches_are_not_losses_redefined(divided):
    optimizer = gradhpo.OneStepOptimizer(optax.sgd(0.1), OUTER)
    if divided:
        optimizer = data_parallel(optimizer, make_mesh(data=2))
    model, state = Model(), optimizer.init(WEIGHTS, jnp.zeros(()))
    for rows in (2, 4, 6, 8):
        batch = jax.tree.map(lambda x, rows=rows: x[:rows], BATCH)
        optimizer.compute_hypergradient(state, batch, batch, model.train, model.val)


@pytest.mark.slow
def test_finite_tells_a_divergence_in_ones_own_loop():
    optimizer, pair = gradhpo.OneStepOptimizer(optax.sgd(50.0), OUTER), losses("unused")
    state = optimizer.init(WEIGHTS, {"decay": LAM["decay"]})
    answers = []
    for _ in range(40):
        state = optimizer.step(state, BATCH, BATCH, *pair)
        answers.append(bool(state.finite()))
    assert answers[0]
    assert not answers[-1]
