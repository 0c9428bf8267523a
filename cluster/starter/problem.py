"""A first problem for gradhpo: which of 20 inputs a linear model should use.

Every input has a weight decay of its own, tuned by hypergradients at every step; the learning rate
is searched by the sweep. Change the model and the data, and keep the shape of the two functions.
"""

import jax
import jax.numpy as jnp
import optax

import gradhpo


def model(weights, inputs):
    """Predictions."""
    return inputs @ weights


def loss(weights, batch):
    """The mean squared error of a batch."""
    inputs, targets = batch
    return jnp.mean((model(weights, inputs) - targets) ** 2)


def data(key):
    """All examples, made once and shared by all trials; or load your own arrays here."""
    inputs = jax.random.normal(key, (200, 20))
    noise = 0.5 * jax.random.normal(jax.random.fold_in(key, 1), (200,))
    return inputs, inputs[:, 0] - inputs[:, 1] + noise


def init(key):
    """The weights, and the hyperparameters λ: any trees of arrays."""
    return jnp.zeros(20), {"log_decay": jnp.full(20, -2.0), "rate": jnp.asarray(0.1)}


def train_loss(weights, lam, batch):
    """What training minimizes; λ acts through it."""
    return loss(weights, batch) + jnp.sum(jnp.exp(lam["log_decay"]) * weights**2)


def val_loss(weights, lam, batch):
    """What λ minimizes."""
    return loss(weights, batch)


def batch(key, data):
    """The training and the validation batch of a step."""
    inputs, targets = data
    rows = jax.random.randint(key, (32,), 0, 100)  # the first half trains
    return (inputs[rows], targets[rows]), (inputs[100:150], targets[100:150])


def metrics(weights, lam, data):
    """What is measured after each generation, on examples that nothing was tuned on."""
    inputs, targets = data
    return {"test_loss": loss(weights, (inputs[150:], targets[150:]))}


def problem():
    """What is tuned."""
    return gradhpo.Problem(init, train_loss, val_loss, batch=batch, data=data, metrics=metrics)


def optimizer():
    """How: one of gradhpo's methods, with optax's optimizers inside and outside."""
    # The sweep moves the rate, hypergradients the decays.
    outer = optax.multi_transform(
        {"tuned": optax.adam(0.05), "fixed": optax.set_to_zero()},
        {"log_decay": "tuned", "rate": "fixed"},
    )
    return gradhpo.OneStepOptimizer(lambda lam: optax.sgd(lam["rate"]), outer)
