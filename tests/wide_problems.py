"""A problem whose weights are most of its memory, for tests of layouts and of device memory."""

import functools

import jax
import jax.numpy as jnp
import optax

import gradhpo


def _predict(w, x):
    return jnp.tanh(x @ w["in"]) @ w["out"]


def _val(w, lam, batch):
    return jnp.mean((_predict(w, batch) - 1) ** 2)


def _train(w, lam, batch):
    return _val(w, lam, batch) + jnp.exp(lam["log_decay"]) * jnp.sum(w["in"] ** 2)


@functools.cache
def problem(width=128):
    """An MLP of one wide layer on two rows; λ is one decay."""
    return gradhpo.Problem(
        init=lambda key: (
            {"in": jax.random.normal(key, (width, width)), "out": jnp.zeros((width, 1))},
            {"log_decay": jnp.float32(-3)},
        ),
        train_loss=_train,
        val_loss=_val,
        batch=lambda key: tuple(jax.random.normal(key, (2, 2, width))),
    )


@functools.cache
def optimizer():
    """One-Step with Adam: a state of three times the weights."""
    return gradhpo.OneStepOptimizer(optax.adam(1e-2), optax.adam(1e-2))
