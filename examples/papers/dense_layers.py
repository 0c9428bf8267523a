"""A fully connected network as a list of (matrix, bias)."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def init(key: jax.Array, *sizes: int) -> list[tuple[jax.Array, jax.Array]]:
    """Return layers of these sizes, He-normal, with biases of 0."""
    pairs = list(itertools.pairwise(sizes))
    keys = jax.random.split(key, len(pairs))
    return [
        (jax.random.normal(k, pair) * (2 / pair[0]) ** 0.5, jnp.zeros(pair[1]))
        for k, pair in zip(keys, pairs, strict=True)
    ]


def apply(
    layers: Any, x: jax.Array, activation: Callable[[jax.Array], jax.Array] = jax.nn.relu
) -> jax.Array:
    """Map `(…, first)` to `(…, last)`."""
    for matrix, bias in layers[:-1]:
        x = activation(x @ matrix + bias)
    matrix, bias = layers[-1]
    return x @ matrix + bias


def flat(x: Any) -> Any:
    """Return images `(n, side, side, 1)` as `(n, side²)`."""
    return x.reshape(len(x), -1)
