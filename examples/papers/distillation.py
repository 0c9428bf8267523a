"""Data distillation: a few images such that networks trained on them alone know the real ones.

Wang et al., Dataset Distillation, 2018, by the exact gradient through T inner steps from fresh
weights at every outer step; λ holds the images and the logarithm of the learning rate. Beside it
stand as many real images, drawn at random, and the mean images of the classes; their rate and
number of steps are the best for images that are neither for training nor for test.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import data_sets
import dense_layers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import seeds

import gradhpo

RATES = (0.01, 0.03, 0.1, 0.3)
LONGER = (1, 5, 20)
"""For how many times T steps networks are trained on real images."""


@dataclasses.dataclass(frozen=True, eq=False)
class Distillation:
    """A case: its settings, and the images."""

    settings: dict[str, Any]

    @functools.cached_property
    def found(self) -> data_sets.DataSet:
        """The images; those for test are as many as the settings say."""
        found = data_sets.read(self.settings["data"])
        return found._replace(test=found.some_for_test(self.settings["test"]))

    @property
    def labels(self) -> jax.Array:
        """Of the few images, class by class."""
        return jnp.repeat(jnp.arange(10), self.settings["images"])

    def weights(self, key: jax.Array) -> Any:
        """Return fresh weights."""
        return dense_layers.init(
            key, int(np.prod(self.found.x.shape[1:])), self.settings["width"], 10
        )

    def split(self, key: jax.Array) -> dict[str, tuple[jax.Array, jax.Array]]:
        """Return images to choose by, and the real ones, which the rest is made of."""
        order = jax.random.permutation(key, len(self.found.y))
        held, count = self.settings["held_out"], self.settings["real"]
        x, y = jnp.asarray(self.found.x), jnp.asarray(self.found.y)
        parts = {"held": order[:held], "real": order[held : held + count]}
        return {name: (dense_layers.flat(x[rows]) / 255.0, y[rows]) for name, rows in parts.items()}

    def some_of_each(self, data: Any) -> jax.Array:
        """Return the first real images of each class: a random choice."""
        x, y = data["real"]
        find = functools.partial(jnp.nonzero, size=self.settings["images"])
        place = jax.vmap(lambda label: find(y == label)[0])(jnp.arange(10))
        return x[place.ravel()]

    def means(self, data: Any) -> jax.Array:
        """Return the mean of the real images of each class, once: copies would change nothing."""
        x, y = data["real"]
        one_hot = jax.nn.one_hot(y, 10)
        return (one_hot.T @ x) / one_hot.sum(0)[:, None]

    def accuracies(
        self, images: jax.Array, rate: Any, counts: Sequence[int], key: jax.Array, x: Any, y: Any
    ) -> jax.Array:
        """Return the accuracy on (x, y) of fresh networks after so many steps on the images.

        Args:
          images: class by class, as many of each.
          rate: of the gradient descent.
          counts: numbers of steps, ascending.
          key: decides the networks' first weights.
          x: of the images that they are tried on.
          y: their labels.

        Returns:
          `(networks, counts)`.
        """
        labels = jnp.repeat(jnp.arange(10), len(images) // 10)

        def one(key: jax.Array) -> jax.Array:
            def step(params: Any, _: None) -> tuple[Any, None]:
                grads = jax.grad(cross_entropy)(params, images, labels)
                return jax.tree.map(lambda w, g: w - rate * g, params, grads), None

            params, hits = self.weights(key), []
            for more in np.diff([0, *counts]):
                params = jax.lax.scan(step, params, length=int(more))[0]
                hits.append(jnp.mean(dense_layers.apply(params, x).argmax(-1) == y))
            return jnp.stack(hits)

        return jax.lax.map(one, jax.random.split(key, self.settings["networks"]))

    @property
    def test(self) -> tuple[Any, Any]:
        """The test images, as a network takes them, and their labels."""
        assert self.found.test is not None
        x, y = self.found.test
        return dense_layers.flat(x.astype(np.float32) / 255), y

    def problem(self) -> gradhpo.Problem:
        """Return the problem; λ starts from the random choice of real images."""

        def init(key: jax.Array) -> tuple[Any, Any]:
            first, which = jax.random.split(key)
            images = self.some_of_each(self.split(which))
            return self.weights(first), {"images": images, "log_rate": self.log_rate}

        def train_loss(params: Any, lam: Any, batch: Any) -> jax.Array:
            del batch
            return cross_entropy(params, lam["images"], self.labels)

        def val_loss(params: Any, lam: Any, batch: Any) -> jax.Array:
            del lam
            return cross_entropy(params, *batch)

        def batch(key: jax.Array, data: Any) -> Any:
            rows = jax.random.randint(key, (self.settings["batch"],), 0, self.settings["real"])
            return (), jax.tree.map(lambda a: a[rows], data["real"])

        def metrics(params: Any, lam: Any, data: Any) -> dict[str, Any]:
            del params, data
            rate = jnp.exp(lam["log_rate"])
            key, steps = jax.random.split(jax.random.key(8))[1], self.settings["T"]
            each = self.accuracies(lam["images"], rate, (steps,), key, *self.test)[:, 0]
            return {"test_accuracy": each.mean(), "worst": each.min(), "rate": rate}

        return gradhpo.Problem(
            init, train_loss, val_loss, batch=batch, metrics=metrics, data=self.split
        )

    @property
    def log_rate(self) -> jax.Array:
        """The logarithm of the rate at first."""
        return jnp.log(jnp.asarray(self.settings["rate"], jnp.float32))


def cross_entropy(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    """Return the mean cross-entropy of a network."""
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(
        dense_layers.apply(params, x), y
    )
    return losses.mean()


def evidence(settings: dict[str, Any], method: str, keys: jax.Array) -> dict[str, Any]:
    """Return the measures of a method in a case, for each seed a mean over fresh networks."""
    case = Distillation(settings)
    if method != "distilled":
        rows = undistilled(case, method, keys)
        return {name: np.asarray([row[name] for row in rows]) for name in rows[0]}
    tuner = gradhpo.UnrolledOptimizer(
        lambda lam: optax.sgd(jnp.exp(lam["log_rate"])),
        optax.adam(settings["lr_hyper"]),
        unroll_steps=settings["T"],
    )
    episodes: dict[str, Any] = {"episode_length": 1, "episode_init": "fresh"}
    runs = seeds.run(case.problem(), tuner, settings["outer_steps"], keys, 5, **episodes)
    return {
        "test_accuracy": 100 * runs.last["test_accuracy"],
        "worst": 100 * runs.last["worst"],
        "rate": runs.last["rate"],
        "steps": np.full(len(keys), settings["T"]),
        "curve": 100 * runs.evals["test_accuracy"],
    }


def undistilled(case: Distillation, method: str, keys: jax.Array) -> list[dict[str, float]]:
    """Return each seed's measures of images not learned, at their best rate and number of steps."""
    accuracies, start = (
        jax.jit(case.accuracies, static_argnums=2),
        jax.jit(case.problem().start_data),
    )
    counts = tuple(case.settings["T"] * n for n in LONGER)
    pairs = list(itertools.product(RATES, counts))
    chosen, final = jax.random.split(jax.random.key(8))
    rows: list[dict[str, float]] = []
    for key in keys:
        data = start(key)
        images = case.some_of_each(data) if method == "random real images" else case.means(data)
        held = [accuracies(images, rate, counts, chosen, *data["held"]).mean(0) for rate in RATES]
        rate, steps = pairs[int(np.argmax(np.concatenate(held)))]
        each = 100 * np.asarray(accuracies(images, rate, (steps,), final, *case.test))[:, 0]
        rows.append(
            {
                "test_accuracy": float(each.mean()),
                "worst": float(each.min()),
                "rate": rate,
                "steps": steps,
            }
        )
    return rows
