"""Models with a loop or a branch that starts from a constant, as every recurrent network has.

Each is a function that makes weights and `(weights, batch) -> predictions, one a row`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

ROWS, TIMES, FEATURES = 8, 4, 3
_rng = np.random.default_rng(0)
BATCH = {
    "x": _rng.normal(size=(ROWS, TIMES, FEATURES)),
    "y": _rng.normal(size=ROWS),
    "key": _rng.integers(2**32, size=(ROWS, 2), dtype=np.uint32),
}
WEIGHTS = _rng.normal(size=FEATURES)
LAM = {"decay": np.full((), -2.0), "scale": np.full((), 0.2)}


def scan_from_zeros():
    def predict(w, batch):
        def cell(h, x):
            return jnp.tanh(x @ w + h), None

        x = batch["x"]
        return jax.lax.scan(cell, jnp.zeros(len(x)), jnp.moveaxis(x, 1, 0))[0]

    return WEIGHTS, predict


def recurrent_network():
    rngs = nnx.Rngs(0)
    cell = nnx.GRUCell(FEATURES, 2, param_dtype=jnp.float64, rngs=rngs)
    graph, weights, rest = nnx.split(nnx.RNN(cell), nnx.Param, ...)

    def predict(w, batch):
        return nnx.merge(graph, w, rest, copy=True)(batch["x"])[:, -1].sum(-1)

    return weights, predict


def running_total():
    def predict(w, batch):
        def row(total, x):
            score = x.sum(0) @ w
            return total + score, score

        return jax.lax.scan(row, 0.0, batch["x"])[1]

    return WEIGHTS, predict


def ctc():
    def predict(w, batch):
        logits = jnp.einsum("btd,dk->btk", batch["x"], w[:, None] * jnp.arange(1.0, 4.0))
        rows = len(logits)
        labels = jnp.ones((rows, 2), jnp.int32)
        return optax.ctc_loss(logits, jnp.zeros((rows, TIMES)), labels, jnp.zeros((rows, 2)))

    return WEIGHTS, predict


def constant_branch():
    def predict(w, batch):
        x = batch["x"]
        there = jnp.isfinite(x).all()
        return jax.lax.cond(there, lambda: x.sum(1) @ w, lambda: jnp.zeros(len(x)))

    return WEIGHTS, predict


def while_loop():
    def predict(w, batch):
        def root(x):  # as many turns as the row asks for, so other numbers on other devices
            return jax.lax.while_loop(lambda r: r * r < jnp.vdot(x, x), lambda r: r + 0.1, 0.0)

        return batch["x"].sum(1) @ w * jax.vmap(root)(batch["x"])

    return WEIGHTS, predict


def poisson_noise():
    def predict(w, batch):
        keys = jax.random.wrap_key_data(batch["key"], impl="threefry2x32")
        noise = jax.vmap(lambda key: jax.random.poisson(key, 2.0))(keys)
        return batch["x"].sum(1) @ w * (1 + 0.1 * noise)

    return WEIGHTS, predict


MODELS = {
    make.__name__: make
    for make in (
        *(scan_from_zeros, recurrent_network, running_total, ctc),
        *(constant_branch, while_loop, poisson_noise),
    )
}


def together(*names):
    """Weights and predictions of several of these: each with weights of its own, summed."""
    made = {name: MODELS[name]() for name in names}

    def predict(w, batch):
        return sum(of_one(w[name], batch) for name, (_, of_one) in made.items())

    return {name: weights for name, (weights, _) in made.items()}, predict


def losses(predict):
    """Return the two losses: the scale of the errors and a weight decay are tuned."""

    def errors(w, batch):
        return (predict(w, batch) - batch["y"]) ** 2

    def train_loss(w, lam, batch):
        decay = jnp.exp(lam["decay"]) * optax.tree.norm(w, squared=True)
        return jnp.mean(jnp.tanh(lam["scale"] * errors(w, batch))) + decay

    def val_loss(w, lam, batch):
        return jnp.mean(jnp.tanh(errors(w, batch))) + 0.1 * lam["scale"] ** 2

    return train_loss, val_loss
