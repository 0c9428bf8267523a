"""One trial of `sweep.py`, the same for all: an MLP with One-Step; and that trial by hand."""

from __future__ import annotations

import math
from typing import Any

import by_hand
import jax
import jax.numpy as jnp
import models
import numpy as np
import optax

import gradhpo

WIDTH = 64
INNER, OUTER = optax.adam(1e-3), optax.adam(1e-2)
LOW, HIGH = 1e-6, 1e-2
"""Of the weight decay that new trials draw, log-uniformly; λ holds its logarithm."""
QUANTILE, RESAMPLE, FACTORS = 0.25, 0.25, (0.8, 1.25)


def problem() -> gradhpo.Problem:
    """Return the MLP: batches of 64 rows, λ of 257 numbers."""
    return models.mlp(WIDTH).problem


def optimizer() -> gradhpo.BilevelOptimizer:
    """Return One-Step, Adam inside and outside."""
    return gradhpo.OneStepOptimizer(INNER, OUTER)


def start(made: gradhpo.Problem, key: jax.Array, log_decay: Any) -> Any:
    """Return the first carry of a trial by hand."""
    params, hyperparams = made.init(key)
    hyperparams = hyperparams | {"log_decay": jnp.asarray(log_decay, jnp.float32)}
    return by_hand.start(params, hyperparams, INNER, OUTER)


def generation(made: gradhpo.Problem, steps: int) -> Any:
    """Return `(carry, key) -> (carry, validation loss of the last step)`, by hand; not jitted."""
    step = by_hand.steps(made.train_loss, made.val_loss, INNER, OUTER)["One-Step"]

    def run(carry: Any, key: jax.Array) -> Any:
        def body(carry: Any, i: jax.Array) -> Any:
            return step(carry, *made.draw(jax.random.fold_in(key, i), None))

        carry, (_, val_losses) = jax.lax.scan(body, carry, jnp.arange(steps))
        return carry, val_losses[-1]

    return run


def with_log_decay(carry: Any, log_decay: Any) -> Any:
    """Return a carry with another weight decay."""
    w, s, lam, *rest = carry
    return w, s, lam | {"log_decay": jnp.asarray(log_decay, jnp.float32)}, *rest


def explore(
    scores: np.ndarray, log_decay: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Return parents and weight decays by population-based training, by hand."""
    n = len(scores)
    order, count = np.argsort(scores), int(QUANTILE * n)  # NaN comes last
    parents = np.arange(n)
    losers = order[n - count :]
    parents[losers] = rng.choice(order[:count], count)
    low, high = math.log(LOW), math.log(HIGH)
    moved = log_decay[parents[losers]] + np.log(rng.choice(FACTORS, count))
    anew = rng.random(count) < RESAMPLE
    log_decay = log_decay[parents]
    log_decay[losers] = np.where(anew, rng.uniform(low, high, count), np.clip(moved, low, high))
    return parents, log_decay
