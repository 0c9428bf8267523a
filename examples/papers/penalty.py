"""Data hyper-cleaning by penalties: the protocol of Shen and Chen (V-PBGD, ICML 2023) and BOME.

5,000 training images, of which half have a label drawn anew from all ten, 5,000 clean ones for
validation, full batch; a linear model, or one hidden layer of 300 sigmoids. The cleaner keeps an
image whose λ_i is at least 0; its F1 is that of the images kept against those whose label was not
drawn anew. V-PBGD reports the accuracy of weights that descend the validation loss too, as F2SA's
second set and BOME's do: training on the validation images alone stands beside them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import data_sets
import dense_layers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import seeds

import gradhpo


class Images(NamedTuple):
    """Images `(n, side²)` in [0, 1] and labels `(n,)`."""

    x: jax.Array
    y: jax.Array


def problem(settings: dict[str, Any], method: str) -> gradhpo.Problem:
    """Return the problem; split, pollution and weights are drawn from the key."""
    found = data_sets.read(settings["data"])
    assert found.test is not None
    pixels, train = int(np.prod(found.x.shape[1:])), settings["train"]
    hidden = [settings["width"]] if settings["width"] else []
    test_x, test_y = found.test[0][: settings["test"]], found.test[1][: settings["test"]]
    test = Images(dense_layers.flat(test_x.astype(np.float32) / 255), jnp.asarray(test_y))

    def init(key: jax.Array) -> tuple[Any, jax.Array]:
        return dense_layers.init(key, pixels, *hidden, 10), jnp.zeros(train)

    def data(key: jax.Array) -> dict[str, Any]:
        shuffle, what = jax.random.split(key)
        order = jax.random.permutation(shuffle, len(found.y))[: train + settings["validation"]]
        x, y = dense_layers.flat(jnp.asarray(found.x)[order]) / 255.0, jnp.asarray(found.y)[order]
        polluted = jnp.arange(train) < round(settings["noise"] * train)
        given = jnp.where(polluted, jax.random.randint(what, (train,), 0, 10), y[:train])
        parts = {"train": Images(x[:train], given), "val": Images(x[train:], y[train:])}
        return parts | {"clean": ~polluted, "test": test}

    def logits(params: Any, images: Images) -> jax.Array:
        return dense_layers.apply(params, images.x, jax.nn.sigmoid)

    def losses(params: Any, images: Images) -> jax.Array:
        return optax.losses.softmax_cross_entropy_with_integer_labels(
            logits(params, images), images.y
        )

    def train_loss(params: Any, lam: jax.Array, images: Images) -> jax.Array:
        return jnp.mean(jax.nn.sigmoid(lam) * losses(params, images))

    def val_loss(params: Any, lam: jax.Array, images: Images) -> jax.Array:
        del lam
        return jnp.mean(losses(params, images))

    def batch(key: jax.Array, data: Any) -> tuple[Images, Images]:
        del key
        return data["val" if method == "validation images alone" else "train"], data["val"]

    def metrics(params: Any, lam: jax.Array, data: Any) -> dict[str, jax.Array]:
        kept, clean = lam >= 0, data["clean"]
        right = jnp.sum(kept & clean)
        f1 = 2 * right / (jnp.sum(kept) + jnp.sum(clean))
        hits = logits(params, data["test"]).argmax(-1) == data["test"].y
        return {
            "test_accuracy": hits.mean(),
            "f1": f1,
            "val_loss": val_loss(params, lam, data["val"]),
        }

    return gradhpo.Problem(init, train_loss, val_loss, batch=batch, metrics=metrics, data=data)


def optimizer(settings: dict[str, Any], method: str) -> tuple[gradhpo.BilevelOptimizer, int]:
    """Return a method, and the inner steps in one of its steps."""
    inner, outer = optax.sgd(settings["rate"]), optax.adam(settings["lr_hyper"])
    T = settings["T"]
    made: dict[str, Any] = {
        "no HPO": lambda: (gradhpo.FOOptimizer(inner, optax.set_to_zero()), 1),
        "validation images alone": lambda: (gradhpo.FOOptimizer(inner, optax.set_to_zero()), 1),
        "F2SA": lambda: (
            gradhpo.F2SAOptimizer(inner, outer, multiplier=settings["multiplier"], growth=0.0),
            1,
        ),
        "BOME": lambda: (gradhpo.BOMEOptimizer(inner, outer, search_steps=T), 1),
        "exact, T steps": lambda: (gradhpo.UnrolledOptimizer(inner, outer, unroll_steps=T), T),
    }
    return made[method]()


def evidence(settings: dict[str, Any], method: str, keys: jax.Array) -> dict[str, Any]:
    """Return the measures of a method in a case; all take the same number of inner steps."""
    made, (tuner, inner_steps) = problem(settings, method), optimizer(settings, method)
    runs = seeds.run(made, tuner, settings["inner_steps"] // inner_steps, keys, evaluations=10)
    found = {
        "test_accuracy": 100 * runs.last["test_accuracy"],
        "f1": 100 * runs.last["f1"],
        "curve": 100 * runs.evals["test_accuracy"],
    }
    if method == "F2SA":  # y, the weights that V-PBGD reports
        y = runs.state.metadata["penalized"]
        measured = jax.vmap(made.measure)(y, runs.state.hyperparams, runs.data)
        found["penalized"] = 100 * np.asarray(measured["test_accuracy"])
    return found
