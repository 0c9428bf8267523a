"""The models of the benchmarks, in plain JAX; λ: a weight for every training row, a decay."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import gradhpo

ROWS = 256
"""Training rows, each with its own weight σ(λ_i)."""


class Task(NamedTuple):
    """A problem, with a batch of it to take steps on."""

    problem: gradhpo.Problem
    train_batch: Any
    val_batch: Any

    def start(self) -> tuple[Any, Any]:
        """Return weights and hyperparameters."""
        return self.problem.start(jax.random.key(0))


def mlp(width: int = 128) -> Task:
    """Return an MLP of two hidden layers on 64 inputs and 10 classes."""
    sizes = (64, width, width, 10)

    def predict(params: Any, x: jax.Array) -> jax.Array:
        *hidden, last = params
        for layer in hidden:
            x = jax.nn.relu(x @ layer["w"] + layer["b"])
        return x @ last["w"] + last["b"]

    def init(key: jax.Array) -> Any:
        keys = jax.random.split(key, len(sizes) - 1)
        pairs = zip(keys, sizes[:-1], sizes[1:], strict=True)
        return [{"w": _matrix(key, n, m), "b": jnp.zeros(m)} for key, n, m in pairs]

    return _task(init, predict, (64,), batch_size=64)


class Convolution(NamedTuple):
    """A convolution: its kernel's shape, space first, then channels in and out."""

    kernel: tuple[int, ...]
    stride: int = 1
    dilation: int = 1
    """Of the image: more than 1 is a transposed convolution."""
    groups: int = 1

    def __call__(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """Convolve images `(n, ..., channels)`."""
        space = len(self.kernel) - 2
        letters = "DHW"[-space:]
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            (self.stride,) * space,
            "SAME" if self.dilation == 1 else [(1, 2)] * space,
            lhs_dilation=(self.dilation,) * space,
            dimension_numbers=(f"N{letters}C", f"{letters}IO", f"N{letters}C"),
            feature_group_count=self.groups,
        )


def cnn(channels: int = 16) -> Task:
    """Return a CNN of two strided 3x3 convolutions on images of 16x16x3."""
    layers = Convolution((3, 3, 3, channels), 2), Convolution((3, 3, channels, 2 * channels), 2)
    return convolutional((16, 16, 3), *layers)


def convolutional(shape: tuple[int, ...], *layers: Convolution) -> Task:
    """Return convolutions with ReLU, pooling and 10 classes, on images of a shape."""

    def predict(params: Any, x: jax.Array) -> jax.Array:
        for layer, kernel in zip(layers, params["kernels"], strict=True):
            x = jax.nn.relu(layer(x, kernel))
        return x.mean(tuple(range(1, x.ndim - 1))) @ params["out"]

    def init(key: jax.Array) -> Any:
        *keys, out = jax.random.split(key, len(layers) + 1)
        shapes = [layer.kernel for layer in layers]
        kernels = [
            _matrix(key, math.prod(shape[:-1]), shape[-1]).reshape(shape)
            for key, shape in zip(keys, shapes, strict=True)
        ]
        return {"kernels": kernels, "out": _matrix(out, shapes[-1][-1], 10)}

    return _task(init, predict, shape, batch_size=32)


def transformer(
    layers: int = 2,
    width: int = 64,
    length: int = 32,
    heads: int = 4,
    *,
    scanned: bool = False,
    checkpoint: bool = False,
) -> Task:
    """Return a transformer encoder with pre-norm blocks, mean pooling and 10 classes.

    Its blocks stand one after another, or are `scanned` over stacked weights; `checkpoint` puts
    `jax.checkpoint` around each block.
    """

    def normalize(x: jax.Array) -> jax.Array:
        x = x - x.mean(-1, keepdims=True)
        return x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-6)

    def block(p: Any, x: jax.Array) -> jax.Array:
        n, t, d = x.shape
        qkv = (normalize(x) @ p["qkv"]).reshape(n, t, 3, heads, d // heads)
        mixed = jax.nn.dot_product_attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2])
        x = x + mixed.reshape(n, t, d) @ p["out"]
        return x + jax.nn.gelu(normalize(x) @ p["up"]) @ p["down"]

    once = jax.checkpoint(block, prevent_cse=not scanned) if checkpoint else block

    def predict(params: Any, x: jax.Array) -> jax.Array:
        if scanned:
            x, _ = jax.lax.scan(lambda x, p: (once(p, x), None), x, params["blocks"])
        else:
            for p in params["blocks"]:
                x = once(p, x)
        return normalize(x).mean(1) @ params["head"]

    def init(key: jax.Array) -> Any:
        shapes = {"qkv": (1, 3), "out": (1, 1), "up": (1, 4), "down": (4, 1)}

        def one(key: jax.Array) -> Any:
            items = zip(jax.random.split(key, 4), shapes.items(), strict=True)
            return {name: _matrix(k, n * width, m * width) for k, (name, (n, m)) in items}

        blocks = [one(k) for k in jax.random.split(key, layers)]
        if scanned:
            blocks = jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)
        return {"blocks": blocks, "head": _matrix(key, width, 10)}

    return _task(init, predict, (length, width), batch_size=16)


def convolutions() -> dict[str, Task]:
    """Return a CNN for each kind of convolution."""
    first = Convolution((3, 3, 3, 16))
    return {
        "2-D": convolutional((16, 16, 3), first, Convolution((3, 3, 16, 16))),
        "1-D": convolutional((64, 3), Convolution((5, 3, 16)), Convolution((5, 16, 32))),
        "depthwise": convolutional(
            (16, 16, 3), first, Convolution((3, 3, 1, 16), groups=16), Convolution((1, 1, 16, 32))
        ),
        "strided": cnn(),
        "transposed": convolutional(
            (16, 16, 3), first._replace(stride=2), Convolution((3, 3, 16, 16), dilation=2)
        ),
    }


TASKS = {"MLP": mlp, "CNN": cnn, "transformer": transformer}


def _matrix(key: jax.Array, n: int, m: int) -> jax.Array:
    return jax.random.normal(key, (n, m)) / jnp.sqrt(n)


def _task(init: Any, predict: Any, shape: tuple[int, ...], batch_size: int) -> Task:
    keys = jax.random.split(jax.random.key(1), 4)
    x = jax.random.normal(keys[0], (ROWS, *shape))
    y = jax.random.randint(keys[1], (ROWS,), 0, 10)
    val_batch = {
        "x": jax.random.normal(keys[2], (batch_size, *shape)),
        "y": jax.random.randint(keys[3], (batch_size,), 0, 10),
    }

    def losses(params: Any, batch: Any) -> jax.Array:
        logits = predict(params, batch["x"])
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["y"])

    def train_loss(params: Any, lam: Any, batch: Any) -> jax.Array:
        weights = jax.nn.sigmoid(lam["logits"][batch["index"]])
        decay = jnp.exp(lam["log_decay"]) * optax.tree.norm(params, squared=True)
        return jnp.mean(weights * losses(params, batch)) + decay

    def val_loss(params: Any, lam: Any, batch: Any) -> jax.Array:
        del lam
        return jnp.mean(losses(params, batch))

    def start(key: jax.Array) -> Any:
        return init(key), {"logits": jnp.zeros(ROWS), "log_decay": jnp.asarray(-7.0)}

    def rows(index: jax.Array) -> Any:
        return {"x": x[index], "y": y[index], "index": index}

    def batch(key: jax.Array) -> Any:
        return rows(jax.random.randint(key, (batch_size,), 0, ROWS)), val_batch

    problem = gradhpo.Problem(start, train_loss, val_loss, batch=batch)
    return Task(problem, rows(jnp.arange(batch_size)), val_batch)
