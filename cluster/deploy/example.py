"""The problem of the example sweep: how much weight decay does each layer of an MLP need?

Weight decays are tuned by hypergradients inside a trial; the learning rate only by the scheduler.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

import gradhpo

INPUTS, CLASSES = 32, 10
TRAIN, VALIDATION, BATCH = 1024, 1024, 64
WRONG_LABELS = 0.2


def problem(width: int = 128) -> gradhpo.Problem:
    """Return the problem: classes that a random network gave, some training labels wrong.

    Args:
      width: hidden units of the MLP that is trained; λ is `log_decay`, `(2,)`, and `log_rate`.
    """

    def init(key: jax.Array) -> tuple[Any, Any]:
        weights = _weights(key, (INPUTS, width, CLASSES))
        return weights, {"log_decay": jnp.full(2, -9.0), "log_rate": jnp.float32(-5)}

    def train_loss(weights: Any, lam: Any, batch: Any) -> jax.Array:
        decay = sum(
            jnp.exp(d) * jnp.sum(w**2) for d, w in zip(lam["log_decay"], weights, strict=True)
        )
        return _cross_entropy(weights, batch) + decay

    def val_loss(weights: Any, lam: Any, batch: Any) -> jax.Array:
        del lam
        return _cross_entropy(weights, batch)

    def batch(key: jax.Array, data: Any) -> tuple[Any, Any]:
        of_train, of_validation = jax.random.split(key)
        rows = jax.random.randint(of_train, (BATCH,), 0, TRAIN)
        others = jax.random.randint(of_validation, (BATCH,), TRAIN, TRAIN + VALIDATION)
        x, y = data
        return (x[rows], y[rows]), (x[others], y[others])

    def metrics(weights: Any, lam: Any, data: Any) -> dict[str, Any]:
        del lam
        x, y = (part[TRAIN:] for part in data)
        return {"val_accuracy": jnp.mean(_logits(weights, x).argmax(-1) == y)}

    return gradhpo.Problem(init, train_loss, val_loss, batch=batch, metrics=metrics, data=_data)


def optimizer() -> gradhpo.BilevelOptimizer:
    """Return One-Step: Adam at the trial's own learning rate inside, Adam on the decays outside."""
    outer = optax.multi_transform(
        {"hypergradient": optax.adam(0.05), "scheduler": optax.set_to_zero()},
        {"log_decay": "hypergradient", "log_rate": "scheduler"},
    )
    return gradhpo.OneStepOptimizer(lambda lam: optax.adam(jnp.exp(lam["log_rate"])), outer)


def _data(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    inputs, teacher, wrong, labels = jax.random.split(key, 4)
    x = jax.random.normal(inputs, (TRAIN + VALIDATION, INPUTS))
    y = _logits(_weights(teacher, (INPUTS, 16, CLASSES)), x).argmax(-1)
    corrupted = jax.random.bernoulli(wrong, WRONG_LABELS, y.shape) & (jnp.arange(len(y)) < TRAIN)
    return x, jnp.where(corrupted, jax.random.randint(labels, y.shape, 0, CLASSES), y)


def _weights(key: jax.Array, sizes: tuple[int, int, int]) -> list[jax.Array]:
    first, second = jax.random.split(key)
    inputs, width, outputs = sizes
    return [
        jax.random.normal(first, (inputs, width)) * (2 / inputs) ** 0.5,
        jax.random.normal(second, (width, outputs)) * (2 / width) ** 0.5,
    ]


def _logits(weights: Any, x: jax.Array) -> jax.Array:
    return jax.nn.relu(x @ weights[0]) @ weights[1]


def _cross_entropy(weights: Any, batch: Any) -> jax.Array:
    x, y = batch
    logits = _logits(weights, x)
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, y).mean()
