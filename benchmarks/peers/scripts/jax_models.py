"""The models and the two losses in JAX, the same for every peer that is written in it."""

from __future__ import annotations

import jax
import jax.numpy as jnp

DECAY = 0.3


def mlp(p, x):
    x = jax.nn.relu(x @ p["w0"] + p["b0"])
    x = jax.nn.relu(x @ p["w1"] + p["b1"])
    return x @ p["w2"] + p["b2"]


def cnn(p, x):
    x = x.reshape(-1, 8, 8, 1)
    for name, stride in (("conv0", 1), ("conv1", 2)):
        shapes = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(
            x, p[name], (stride, stride), [(1, 1), (1, 1)], dimension_numbers=shapes
        )
        x = jax.nn.relu(x)
    return x.mean((1, 2)) @ p["out"]


def normalized(x):
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-6)


def transformer(p, x):
    x = x.reshape(-1, 8, 8) @ p["embed"] + p["position"]
    n, t, d = x.shape
    for i in range(2):
        q, k, v = jnp.moveaxis((normalized(x) @ p[f"qkv{i}"]).reshape(n, t, 3, 4, 16), 2, 0)
        scores = jnp.einsum("nthd,nshd->nhts", q, k) / 4
        mixed = jnp.einsum("nhts,nshd->nthd", jax.nn.softmax(scores), v)
        x = x + mixed.reshape(n, t, d) @ p[f"out{i}"]
        x = x + jax.nn.gelu(normalized(x) @ p[f"up{i}"]) @ p[f"down{i}"]
    return normalized(x).mean(1) @ p["head"]


MODELS = {"mlp": mlp, "cnn": cnn, "transformer": transformer}


class Problem:
    """Weights, λ, losses and batches."""

    def __init__(self, model, inputs):
        predict = MODELS[model]

        def cross_entropy(params, batch):
            logits = jax.nn.log_softmax(predict(params, batch["x"]))
            return -jnp.take_along_axis(logits, batch["y"][:, None], 1)[:, 0]

        def train_loss(params, lam, batch):
            weighted = jnp.mean(jax.nn.sigmoid(lam[batch["index"]]) * cross_entropy(params, batch))
            return weighted + DECAY / 2 * sum(jnp.sum(w**2) for w in jax.tree.leaves(params))

        def val_loss(params, lam, batch):
            del lam
            return jnp.mean(cross_entropy(params, batch))

        self.train_loss, self.val_loss = train_loss, val_loss
        prefix = f"{model}/"
        self.params = {
            name.removeprefix(prefix): jnp.asarray(array)
            for name, array in inputs.items()
            if name.startswith(prefix)
        }
        self.lam = jnp.zeros(len(inputs["train.x"]))
        self._inputs, self._model = inputs, model
        self._kept = {}

    def batches(self, i, unroll=None):
        """Return the batches of step `i`; with `unroll`, a stack of so many for training."""
        key = (i % len(self._inputs[f"{self._model}.index"]), unroll)
        if key not in self._kept:
            self._kept[key] = self._made(*key)
        return self._kept[key]

    def _made(self, i, unroll):
        index = self._inputs[f"{self._model}.index"][i, : unroll or 1]
        train = self._rows("train", index if unroll else index[0])
        return train, self._rows("val", self._inputs[f"{self._model}.val_index"][i])

    def _rows(self, part, index):
        x, y = self._inputs[f"{part}.x"][index], self._inputs[f"{part}.y"][index]
        return {"x": jnp.asarray(x), "y": jnp.asarray(y), "index": jnp.asarray(index)}
