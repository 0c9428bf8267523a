"""Meta-Weight-Net (Shu et al., NeurIPS 2019): a small network weighs examples by their losses.

A training set whose classes are rarer and rarer, or whose labels are in part random, and a few
clean, balanced images. The weigher, one hidden layer from an example's loss to a weight in (0, 1),
is λ; each of its steps goes through one step of the classifier. Beside it stands training without a
weigher, on the training set alone, and on that and the clean images together.
"""

from __future__ import annotations

from typing import Any

import data_sets
import dense_layers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import seeds

import gradhpo


def problem(settings: dict[str, Any], method: str) -> gradhpo.Problem:
    """Return the problem; the training set, its labels and the weights are drawn from the key."""
    found = data_sets.read(settings["data"])
    assert found.test is not None
    pixels, sizes = int(np.prod(found.x.shape[1:])), class_sizes(settings)
    total, clean = int(sizes.sum()), 10 * settings["clean"]
    test_x, test_y = found.test[0][: settings["test"]], found.test[1][: settings["test"]]
    test = dense_layers.flat(test_x.astype(np.float32) / 255), test_y
    together = method == "both, unweighted"

    def init(key: jax.Array) -> tuple[Any, Any]:
        first, second = jax.random.split(key)
        classifier = dense_layers.init(first, pixels, settings["width"], 10)
        return classifier, dense_layers.init(second, 1, settings["weigher"], 1)

    def data(key: jax.Array) -> dict[str, Any]:
        shuffle, which, what = jax.random.split(key, 3)
        order = jax.random.permutation(shuffle, len(found.y))
        x, y = jnp.asarray(found.x), jnp.asarray(found.y)[order]
        one_hot = jax.nn.one_hot(y, 10, dtype=jnp.int32)
        rank = jnp.take_along_axis(jnp.cumsum(one_hot, axis=0), y[:, None], axis=1)[:, 0] - 1
        most = jnp.asarray(sizes)[y]
        parts = {
            "train": jnp.nonzero(rank < most, size=total)[0],
            "val": jnp.nonzero((rank >= most) & (rank < most + settings["clean"]), size=clean)[0],
        }
        made = {
            name: (dense_layers.flat(x[order[at]]) / 255.0, y[at]) for name, at in parts.items()
        }
        images, labels = made["train"]
        wrong = jax.random.bernoulli(which, settings["noise"], (total,))
        given = jnp.where(wrong, jax.random.randint(what, (total,), 0, 10), labels)
        made["train"] = images, given
        if together:
            made["train"] = jax.tree.map(lambda *a: jnp.concatenate(a), made["train"], made["val"])
        return made | {"test": test}

    def losses(params: Any, batch: Any) -> jax.Array:
        x, y = batch
        return optax.losses.softmax_cross_entropy_with_integer_labels(
            dense_layers.apply(params, x), y
        )

    def train_loss(params: Any, lam: Any, batch: Any) -> jax.Array:
        each = losses(params, batch)
        if method != "Meta-Weight-Net":
            return each.mean()
        seen = jax.lax.stop_gradient(each)[:, None]
        weights = jax.nn.sigmoid(dense_layers.apply(lam, seen)[:, 0])
        return jnp.sum(weights * each) / jnp.sum(weights)

    def val_loss(params: Any, lam: Any, batch: Any) -> jax.Array:
        del lam
        return losses(params, batch).mean()

    def batch(key: jax.Array, data: Any) -> Any:
        keys, parts = jax.random.split(key), (data["train"], data["val"])
        return tuple(
            jax.tree.map(lambda a: a[rows], part)  # noqa: B023
            for key, part in zip(keys, parts, strict=True)
            for rows in [jax.random.randint(key, (settings["batch"],), 0, len(part[1]))]
        )

    def metrics(params: Any, lam: Any, data: Any) -> dict[str, jax.Array]:
        del lam
        x, y = data["test"]
        hits = dense_layers.apply(params, x).argmax(-1) == y
        rare = y >= 7
        return {"test_accuracy": hits.mean(), "rare": jnp.mean(hits, where=rare)}

    return gradhpo.Problem(init, train_loss, val_loss, batch=batch, metrics=metrics, data=data)


def class_sizes(settings: dict[str, Any]) -> np.ndarray:
    """Return how many training images of each class there are, falling geometrically, `(10,)`."""
    shares = settings["imbalance"] ** (-np.arange(10) / 9)
    return np.maximum(1, np.floor(settings["largest"] * shares)).astype(int)


def evidence(settings: dict[str, Any], method: str, keys: jax.Array) -> dict[str, Any]:
    """Return the measures of a method in a case."""
    inner = optax.sgd(settings["rate"], momentum=0.9)
    if method == "Meta-Weight-Net":
        tuner = gradhpo.OneStepOptimizer(inner, optax.adam(settings["lr_hyper"]))
    else:
        tuner = gradhpo.FOOptimizer(inner, optax.set_to_zero())
    runs = seeds.run(problem(settings, method), tuner, settings["steps"], keys, evaluations=10)
    return {
        "test_accuracy": 100 * runs.last["test_accuracy"],
        "rare": 100 * runs.last["rare"],
        "curve": 100 * runs.evals["test_accuracy"],
    }
