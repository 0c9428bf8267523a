"""Data hyper-cleaning as a `Problem`: its model, and images whose training labels are corrupted."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import gradhpo


class CNN(nnx.Module):
    """Three convolutions of 8 channels, average pooling to 2x2, and a linear layer."""

    def __init__(self, strides: tuple[int, int, int], rngs: nnx.Rngs) -> None:
        sizes = zip((1, 8, 8), strides, strict=True)
        self.convs = nnx.List(
            [
                nnx.Conv(channels, 8, (3, 3), stride, padding=1, rngs=rngs)
                for channels, stride in sizes
            ]
        )
        self.out = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map images `(n, 8, 8, 1)` to logits `(n, 10)`."""
        for conv in self.convs:
            x = nnx.relu(conv(x))
        n, half = x.shape[0], x.shape[1] // 2
        return self.out(x.reshape(n, 2, half, 2, half, 8).mean((2, 4)).reshape(n, 32))


class Images(NamedTuple):
    """Images `(n, 8, 8, 1)` in [0, 1], the labels a model sees, and the true ones, `(n,)`."""

    x: jax.Array
    y: jax.Array
    true_y: jax.Array


def problem(
    images: np.ndarray,
    labels: np.ndarray,
    train: int,
    validation: int,
    strides: tuple[int, int, int],
    noise: float,
) -> gradhpo.Problem:
    """Return the hyper-cleaning problem; split, corruption and weights are drawn from the key.

    λ holds a number for each training image, whose weight in the training loss is σ(λ_i). Images
    that are neither for training nor for validation are for test.

    Args:
      images: floats in [0, 1], `(n, side, side, 1)`.
      labels: ints, `(n,)`.
      train: training images.
      validation: validation images, their labels clean.
      strides: of the three convolutions.
      noise: the probability that a training label is replaced by one of the ten at random.
    """
    graph, _ = nnx.split(CNN(strides, nnx.Rngs(0)))
    first, second = train, train + validation

    def init(key: jax.Array) -> tuple[Any, jax.Array]:
        params = nnx.state(CNN(strides, nnx.Rngs(key)), nnx.Param)
        return params, jnp.zeros(train)

    def data(key: jax.Array) -> dict[str, Images]:
        shuffle, which, what = jax.random.split(key, 3)
        order = jax.random.permutation(shuffle, len(labels))
        parts = {"train": order[:first], "val": order[first:second], "test": order[second:]}
        x, y = jnp.asarray(images), jnp.asarray(labels)
        made = {name: Images(x[part], y[part], y[part]) for name, part in parts.items()}
        given = made["train"]
        corrupt = jax.random.bernoulli(which, noise, given.y.shape)
        replaced = jax.random.randint(what, given.y.shape, 0, 10)
        return made | {"train": given._replace(y=jnp.where(corrupt, replaced, given.y))}

    def losses(params: Any, images: Images) -> jax.Array:
        logits = nnx.merge(graph, params)(images.x)
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, images.y)

    def train_loss(params: Any, lam: jax.Array, images: Images) -> jax.Array:
        return jnp.mean(jax.nn.sigmoid(lam) * losses(params, images))

    def val_loss(params: Any, lam: jax.Array, images: Images) -> jax.Array:
        del lam
        return jnp.mean(losses(params, images))

    def batch(key: jax.Array, data: dict[str, Images]) -> tuple[Images, Images]:
        del key
        return data["train"], data["val"]

    def metrics(params: Any, lam: jax.Array, data: dict[str, Images]) -> dict[str, Any]:
        test = data["test"]
        hits = jnp.argmax(nnx.merge(graph, params)(test.x), axis=-1) == test.y
        return {"test_accuracy": hits.mean(), "val_loss": val_loss(params, lam, data["val"])}

    return gradhpo.Problem(init, train_loss, val_loss, batch=batch, metrics=metrics, data=data)
