"""Flax NNX and Equinox modules with BatchNorm and dropout, against loops in those libraries."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import gradhpo
from gradhpo import EquinoxModel, FlaxModel, Problem, solve
from gradhpo.problem import stream
from tests.problems import assert_close
from tests.small import OPTIMIZERS, REFERENCES, UNROLLING

FAMILIES = ("one-step", "hyperdistill", "greedy", "forward", "drmad")
"""One method for each way in which weights are trained: the others share it."""
METHODS = {name: (OPTIMIZERS | REFERENCES)[name] for name in FAMILIES}
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(24, 5)), RNG.integers(0, 3, size=24)
BATCH = (X, Y)
INNER, STEPS, KEY = optax.adamw(0.01, weight_decay=0.01), 3, jax.random.key(4)
LAM = {"smoothing": -1.0}


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


class Net(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(5, 8, rngs=rngs, param_dtype=jnp.float64, use_bias=False)
        self.norm = nnx.BatchNorm(8, rngs=rngs, param_dtype=jnp.float64, momentum=0.9)
        self.norm.mean, self.norm.var = nnx.BatchStat(jnp.zeros(8)), nnx.BatchStat(jnp.ones(8))
        self.dropout = nnx.Dropout(0.3, rngs=rngs)
        self.out = nnx.Linear(8, 3, rngs=rngs, param_dtype=jnp.float64)

    def __call__(self, x):
        return self.out(self.dropout(nnx.relu(self.norm(self.hidden(x)))))


def cross_entropy(logits, labels, lam):
    targets = optax.smooth_labels(jax.nn.one_hot(labels, 3), jax.nn.sigmoid(lam["smoothing"]))
    return optax.softmax_cross_entropy(logits, targets).mean()


def loss(module, lam, batch):
    x, y = batch
    logits = module(x)
    return cross_entropy(logits, y, lam), {"accuracy": jnp.mean(logits.argmax(-1) == y)}


MODEL = FlaxModel(Net)
with jax.enable_x64(True):
    LOSSES = MODEL.train_loss(loss), MODEL.val_loss(loss)


@nnx.jit
def descend(module, optimizer, key):
    """A step of NNX; only its dropout is seeded by the run's key."""
    module.dropout.rngs.key[...] = jax.random.fold_in(jax.random.fold_in(key, 0), 0)
    module.dropout.rngs.count[...] = jnp.zeros((), jnp.uint32)
    grads, _ = nnx.grad(loss, has_aux=True)(module, LAM, BATCH)
    optimizer.update(module, grads)


@functools.cache
def by_nnx(unroll):
    """An ordinary NNX loop."""
    module = MODEL.module(*MODEL.init(KEY))
    optimizer = nnx.Optimizer(module, INNER, wrt=nnx.Param)
    module.train()
    for step in range(STEPS):
        key = jax.random.fold_in(KEY, step)
        for _ in range(unroll):
            descend(module, optimizer, key)
            key = jax.random.fold_in(key, 1)
    module.eval()
    return module, loss(module, LAM, BATCH)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.slow
def test_a_flax_module_trains_as_in_flax(name):
    settings = {"unroll_steps": 2} if name in UNROLLING else {}
    optimizer = METHODS[name](INNER, optax.sgd(0.0), **settings)
    params, model_state = MODEL.init(KEY)
    state = optimizer.init(params, LAM, model_state=model_state)
    for _ in range(STEPS):
        state = optimizer.step(state, BATCH, BATCH, *LOSSES, key=KEY)
    module, (val, told) = by_nnx(2 if name in UNROLLING else 1)
    found = MODEL.module(state.params, state.model_state)
    for kind in (nnx.Param, nnx.BatchStat):
        assert_close(nnx.state(found, kind), nnx.state(module, kind), rtol=1e-9)
    assert float(nnx.state(module, nnx.BatchStat)["norm"]["mean"][...].std()) > 0.01
    assert_close(state.metadata["val_loss"], val, rtol=1e-9)
    assert_close(state.metadata["val_accuracy"], told["accuracy"], rtol=1e-9)


class Eqx(eqx.Module):
    hidden: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    dropout: eqx.nn.Dropout
    out: eqx.nn.Linear

    def __init__(self, key):
        a, b = jax.random.split(key)
        self.hidden = eqx.nn.Linear(5, 8, use_bias=False, key=a)
        self.norm = eqx.nn.BatchNorm(8, "batch", mode="batch")
        self.dropout = eqx.nn.Dropout(0.3)
        self.out = eqx.nn.Linear(8, 3, key=b)

    def __call__(self, x, state, key):
        h, state = self.norm(self.hidden(x), state)
        return self.out(self.dropout(jax.nn.relu(h), key=key)), state


def eqx_loss(module, lam, batch, state, key):
    x, y = batch
    keys = jax.random.split(key, len(x))
    apply = jax.vmap(module, in_axes=(0, None, 0), out_axes=(0, None), axis_name="batch")
    logits, state = apply(x, state, keys)
    return cross_entropy(logits, y, lam), state


@pytest.mark.slow
def test_an_equinox_module_trains_as_in_equinox():
    model = EquinoxModel(eqx.nn.make_with_state(Eqx))
    losses = model.train_loss(eqx_loss), model.val_loss(eqx_loss)
    optimizer = gradhpo.OneStepOptimizer(INNER, optax.sgd(0.0))
    params, model_state = model.init(KEY)
    state = optimizer.init(params, LAM, model_state=model_state)
    for _ in range(STEPS):
        state = optimizer.step(state, BATCH, BATCH, *losses, key=KEY)

    module, running = eqx.nn.make_with_state(Eqx)(KEY)
    opt_state = INNER.init(eqx.filter(module, eqx.is_inexact_array))

    @eqx.filter_jit
    def descend(module, running, opt_state, key):
        grads, running = eqx.filter_grad(eqx_loss, has_aux=True)(module, LAM, BATCH, running, key)
        weights = eqx.filter(module, eqx.is_inexact_array)
        updates, opt_state = INNER.update(grads, opt_state, weights)
        return eqx.apply_updates(module, updates), running, opt_state

    for step in range(STEPS):
        key = jax.random.fold_in(jax.random.fold_in(KEY, step), 0)
        module, running, opt_state = descend(module, running, opt_state, key)
    found, found_state = model.module(state.params, state.model_state)
    assert_close(eqx.filter(found, eqx.is_array), eqx.filter(module, eqx.is_array), rtol=1e-9)
    assert_close(found_state, running, rtol=1e-9)
    logits = jax.vmap(eqx.nn.inference_mode(found), (0, None, None), (0, None), "batch")
    expected = cross_entropy(logits(X, found_state, None)[0], Y, LAM)
    assert_close(state.metadata["val_loss"], expected, rtol=1e-9)


@pytest.mark.slow
def test_solve_takes_a_module_and_gives_one_back():
    def init(key):
        params, model_state = MODEL.init(key)
        return params, jax.tree.map(jnp.asarray, LAM), model_state

    problem = Problem(init, *LOSSES, batch=lambda key: (BATCH, BATCH))
    optimizer = gradhpo.OneStepOptimizer(INNER, optax.adam(0.1))
    solution = solve(problem, optimizer, 3, KEY)
    module = MODEL.module(solution.state.params, solution.state.model_state)
    module.eval()
    value, _ = loss(module, solution.state.hyperparams, BATCH)
    assert np.isfinite(value)
    first = MODEL.init(stream(KEY, "init"))[0]["hidden"]["kernel"][...]
    assert not np.allclose(module.hidden.kernel[...], first)


@pytest.mark.slow
def test_models_without_memory_or_randomness_take_plain_losses():
    plain = FlaxModel(lambda rngs: nnx.Linear(5, 3, rngs=rngs))
    params, model_state = plain.init(KEY)
    assert model_state is None
    train = plain.train_loss(lambda m, lam, b: cross_entropy(m(b[0]), b[1], lam))
    assert np.isfinite(train(params, LAM, BATCH)[0])
    mlp = EquinoxModel(lambda key: eqx.nn.MLP(5, 3, 8, 1, key=key))
    params, model_state = mlp.init(KEY)
    assert model_state is None
    train = mlp.train_loss(
        lambda m, lam, b, state, key: cross_entropy(jax.vmap(m)(b[0]), b[1], lam)
    )
    assert np.isfinite(train(params, LAM, BATCH, key=KEY)[0])


class Counts(eqx.Module):
    out: eqx.nn.Linear
    index: eqx.nn.StateIndex

    def __init__(self, key):
        self.out = eqx.nn.Linear(5, 3, key=key)
        self.index = eqx.nn.StateIndex(jnp.zeros(()))

    def __call__(self, x, state):
        return jax.vmap(self.out)(x), state.set(self.index, state.get(self.index) + 1)


@pytest.mark.slow
def test_an_equinox_state_may_be_written_outside_of_vmap():
    model = EquinoxModel(eqx.nn.make_with_state(Counts))

    def counted(module, lam, batch, state, key):
        logits, state = module(batch[0], state)
        return cross_entropy(logits, batch[1], lam), state, {"n": state.get(module.index)}

    losses = model.train_loss(counted), model.val_loss(counted)
    problem = Problem(
        model.start(jax.tree.map(jnp.asarray, LAM)), *losses, batches=[(BATCH,) * 2] * 3
    )
    solution = solve(problem, gradhpo.OneStepOptimizer(INNER, optax.adam(0.1)), 3, KEY)
    assert solution.metrics["train_n"].tolist() == [1, 2, 3]


class Writes(nnx.Module):
    def __init__(self, rngs):
        self.out = nnx.Linear(5, 3, rngs=rngs, param_dtype=jnp.float64)

    def __call__(self, x, new):
        if new:
            self.seen = nnx.Variable(x)
        else:
            self.out.kernel[...] = self.out.kernel[...] / 2
        return self.out(x)


@pytest.mark.parametrize(
    ("new", "message"),
    [
        (False, r"writes to its nnx.Param \['out'\]\['kernel'\]"),
        (True, r"made the variable \['seen'\]"),
    ],
)
def test_what_a_flax_module_may_not_write(new, message):
    model = FlaxModel(Writes)
    train = model.train_loss(lambda m, lam, b: cross_entropy(m(b[0], new), b[1], lam))
    with pytest.raises(ValueError, match=message):
        train(model.init(KEY)[0], LAM, BATCH)


def test_what_is_refused():
    with pytest.raises(TypeError, match=r"make must return an nnx.Module, got dict"):
        FlaxModel(lambda rngs: {}).train_loss(loss)
    params, _ = MODEL.init(KEY)
    with pytest.raises(ValueError, match="model_state is missing"):
        MODEL.module(params)
    with pytest.raises(TypeError, match=r"nnx.BatchStat.*gradhpo.FlaxModel"):
        gradhpo.OneStepOptimizer(INNER).init(
            nnx.state(Net(nnx.Rngs(0)), nnx.Any(nnx.Param, nnx.BatchStat)), LAM
        )
