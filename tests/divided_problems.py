"""A small transformer whose state is divided over devices, for tests of larger trials."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gradhpo

LENGTH, WORDS = 8, 16


def _layer(x, w):
    q, k, v = jnp.split(x @ w["qkv"], 3, -1)
    scores = jnp.einsum("bid,bjd->bij", q, k) / jnp.sqrt(x.shape[-1])
    scores = jnp.where(jnp.tri(x.shape[1], dtype=bool), scores, -1e9)
    x = x + jax.nn.softmax(scores) @ v @ w["out"]
    return x + jnp.tanh(x @ w["up"]) @ w["down"], None


def _loss(w, tokens):
    x = jax.nn.one_hot(tokens[:, :-1], WORDS, dtype=w["words"].dtype) @ w["words"]
    x, _ = jax.lax.scan(_layer, x, w["layers"])
    logits = jax.nn.log_softmax(x @ w["words"].T)
    return -jnp.mean(jnp.take_along_axis(logits, tokens[:, 1:, None], -1))


def _train(w, lam, tokens):
    decay = jnp.mean(jnp.exp(lam["log_decay"]) * w["layers"]["up"] ** 2)
    return _loss(w, tokens) + decay


def _val(w, lam, tokens):
    return _loss(w, tokens)


@functools.cache
def problem(width=16, layers=2, rows=8):
    """Next-token prediction; λ is a decay for every weight of the widest matrices, and a rate."""
    shapes = {
        "qkv": (layers, width, 3 * width),
        "out": (layers, width, width),
        "up": (layers, width, 4 * width),
        "down": (layers, 4 * width, width),
    }

    def init(key):
        def normal(name, shape):
            seed = jax.random.fold_in(key, sorted([*shapes, "words"]).index(name))
            return 0.3 * jax.random.normal(seed, shape) / jnp.sqrt(shape[-2])

        weights = {name: normal(name, shape) for name, shape in shapes.items()}
        lam = {"log_decay": jnp.full(shapes["up"], -1.0), "log_rate": jnp.asarray(-4.0)}
        return {"words": normal("words", (WORDS, width)), "layers": weights}, lam

    def batch(key):
        first, steps = jax.random.split(key)
        start = jax.random.randint(first, (2, rows, 1), 0, WORDS)
        stride = jax.random.randint(steps, (2, rows, 1), 1, 3)
        return tuple((start + stride * jnp.arange(LENGTH + 1)) % WORDS)

    return gradhpo.Problem(init=init, train_loss=_train, val_loss=_val, batch=batch)


METHODS = {
    "first-order": gradhpo.FOOptimizer,
    "one-step": gradhpo.OneStepOptimizer,
    "t1t2": gradhpo.T1T2Optimizer,
    "greedy": functools.partial(gradhpo.GreedyOptimizer, unroll_steps=2),
    "hyperdistill": functools.partial(
        gradhpo.OnlineHypergradientOptimizer, T=3, estimation_period=2
    ),
}


@functools.cache
def optimizer(method="one-step"):
    """Adam inside and outside; the rate is a hyperparameter that only a scheduler moves."""
    outer = optax.multi_transform(
        {"tuned": optax.adam(0.05), "fixed": optax.set_to_zero()},
        {"log_decay": "tuned", "log_rate": "fixed"},
    )
    return METHODS[method](lambda lam: optax.adam(jnp.exp(lam["log_rate"])), outer)


@functools.cache
def small_optimizer(method="one-step"):
    """The same with momentum in the place of Adam: it compiles sooner."""
    outer = optax.multi_transform(
        {"tuned": optax.sgd(0.05, momentum=0.9), "fixed": optax.set_to_zero()},
        {"log_decay": "tuned", "log_rate": "fixed"},
    )
    return METHODS[method](lambda lam: optax.sgd(jnp.exp(lam["log_rate"]), momentum=0.9), outer)


@functools.cache
def small_problem():
    """A linear model of two layers, of which λ decays every weight: it compiles in no time."""

    def loss(w, x):
        return jnp.mean((jnp.tanh(x @ w["in"]) @ w["out"] - 1) ** 2)

    def init(key):
        keys = jax.random.split(key)
        w = {"in": jax.random.normal(keys[0], (4, 16)), "out": jax.random.normal(keys[1], (16,))}
        return w, {"log_decay": jnp.full((4, 16), -3.0), "log_rate": jnp.asarray(-3.0)}

    return gradhpo.Problem(
        init=init,
        train_loss=lambda w, lam, x: loss(w, x) + jnp.sum(jnp.exp(lam["log_decay"]) * w["in"] ** 2),
        val_loss=lambda w, lam, x: loss(w, x),
        batch=lambda key: tuple(jax.random.normal(key, (2, 8, 4))),
    )


def drawn(rng, start):
    """Pairs of a generator's own, from any of them on."""
    seed = int(rng.integers(2**16))
    draw = (np.random.default_rng([seed, n]).normal(size=(2, 8, 4)) for n in itertools.count(start))
    return ((pair[0], pair[1]) for pair in (numbers.astype(np.float32) for numbers in draw))


@functools.cache
def host_problem():
    """The small problem on pairs of the host, a stream of its own for each trial."""
    return dataclasses.replace(small_problem(), batch=None, batches=drawn)
