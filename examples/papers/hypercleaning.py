"""Data hyper-cleaning as a `Problem`: its model, and images whose training labels are corrupted."""

from __future__ import annotations

from collections.abc import Callable
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
        """Map images `(n, side, side, 1)` to logits `(n, 10)`."""
        first, *others = self.convs
        x = nnx.relu(of_one_channel(first, x))
        for conv in others:
            x = nnx.relu(conv(x))
        n, half = x.shape[0], x.shape[1] // 2
        return self.out(x.reshape(n, 2, half, 2, half, 8).mean((2, 4)).reshape(n, 32))


def of_one_channel(conv: nnx.Conv, x: jax.Array) -> jax.Array:
    """Return `conv(x)` of images `(n, side, side, 1)` as a product with their 3x3 patches.

    XLA's own convolution of a single channel is slow on a CPU: with patches a step of this network
    takes a quarter less time.
    """
    assert conv.bias is not None
    stride, side = conv.strides, x.shape[1]
    padded = jnp.pad(x[..., 0], ((0, 0), (1, 1), (1, 1)))
    windows = [slice(i, i + side, stride) for i in range(3)]
    patches = jnp.stack([padded[:, rows, columns] for rows in windows for columns in windows])
    return jnp.tensordot(patches, conv.kernel.reshape(9, -1), axes=((0,), (0,))) + conv.bias


class Images(NamedTuple):
    """Images `(n, side, side, 1)` in [0, 1], the labels a model sees, and the true ones, `(n,)`."""

    x: jax.Array
    y: jax.Array
    true_y: jax.Array


def network(strides: tuple[int, int, int]) -> Callable[[Any, jax.Array], jax.Array]:
    """Return `(params, images) -> logits` of the CNN."""
    graph, _ = nnx.split(CNN(strides, nnx.Rngs(0)))
    return lambda params, x: nnx.merge(graph, params)(x)


def problem(
    images: np.ndarray,
    labels: np.ndarray,
    train: int,
    validation: int,
    strides: tuple[int, int, int],
    noise: float,
    test: tuple[np.ndarray, np.ndarray] | None = None,
) -> gradhpo.Problem:
    """Return the hyper-cleaning problem; split, corruption and weights are drawn from the key.

    λ holds a number for each training image, whose weight in the training loss is σ(λ_i).

    Args:
      images: floats in [0, 1], or bytes, `(n, side, side, 1)`.
      labels: ints, `(n,)`.
      train: training images.
      validation: validation images, their labels clean.
      strides: of the three convolutions.
      noise: the probability that a training label is replaced by one of the ten at random.
      test: images and labels for test; by default those that are neither for training nor for
        validation.
    """
    logits = network(strides)
    first, second = train, train + validation
    kept = None if test is None else clean(*test)

    def init(key: jax.Array) -> tuple[Any, jax.Array]:
        params = nnx.state(CNN(strides, nnx.Rngs(key)), nnx.Param)
        return params, jnp.zeros(train)

    def data(key: jax.Array) -> dict[str, Images]:
        shuffle, which, what = jax.random.split(key, 3)
        order = jax.random.permutation(shuffle, len(labels))
        parts = {"train": order[:first], "val": order[first:second]}
        if kept is None:
            parts["test"] = order[second:]
        x, y = jnp.asarray(images), jnp.asarray(labels)
        made = {name: clean(x[part], y[part]) for name, part in parts.items()}
        if kept is not None:
            made["test"] = kept
        given = made["train"]
        corrupt = jax.random.bernoulli(which, noise, given.y.shape)
        replaced = jax.random.randint(what, given.y.shape, 0, 10)
        return made | {"train": given._replace(y=jnp.where(corrupt, replaced, given.y))}

    def losses(params: Any, images: Images) -> jax.Array:
        return optax.losses.softmax_cross_entropy_with_integer_labels(
            logits(params, images.x), images.y
        )

    def train_loss(params: Any, lam: jax.Array, images: Images) -> jax.Array:
        return jnp.mean(jax.nn.sigmoid(lam) * losses(params, images))

    def val_loss(params: Any, lam: jax.Array, images: Images) -> jax.Array:
        del lam
        return jnp.mean(losses(params, images))

    def batch(key: jax.Array, data: dict[str, Images]) -> tuple[Images, Images]:
        del key
        return data["train"], data["val"]

    def accuracy(params: Any, images: Images) -> jax.Array:
        return jnp.mean(jnp.argmax(logits(params, images.x), axis=-1) == images.y)

    def metrics(params: Any, lam: jax.Array, data: dict[str, Images]) -> dict[str, Any]:
        return {
            "test_accuracy": accuracy(params, data["test"]),
            "test_loss": val_loss(params, lam, data["test"]),
            "val_accuracy": accuracy(params, data["val"]),
            "val_loss": val_loss(params, lam, data["val"]),
        }

    return gradhpo.Problem(init, train_loss, val_loss, batch=batch, metrics=metrics, data=data)


def clean(x: Any, y: Any) -> Images:
    """Return images with the labels that they have; bytes become floats in [0, 1]."""
    return Images(x.astype(np.float32) / 255 if x.dtype == np.uint8 else x, y, y)
