"""λ that is tuned for a validation cross-entropy can lose accuracy: what it is tuned for instead.

Hyper-cleaning with a small MLP, as in `hypercleaning.py`. Half of the labels are random, so a
network that has learned what is right says so with little confidence: its cross-entropy is high
and its accuracy too. λ can lower the one at the price of the other. Three objectives of λ:

- the cross-entropy of the validation images;
- the same at a temperature of its own, `CE(logits / τ)`, τ being tuned with λ, so that confidence
  is worth nothing;
- the expected error, `1 - p(label)`.
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import data_sets
import dense_layers
import hyperclean
import hypercleaning
import jax
import jax.numpy as jnp
import numpy as np
import optax
import seeds

import gradhpo

OBJECTIVES = ("no HPO", "cross-entropy", "own temperature", "expected error")


def problem(settings: dict[str, Any], objective: str) -> gradhpo.Problem:
    """Return the problem: λ holds `weights`, and the logarithm of the temperature."""
    found = data_sets.read(settings["data"])
    test = found.some_for_test(settings["test"])
    sizes = (settings["train"], settings["validation"], (2, 2, 2), settings["noise"])
    base = hypercleaning.problem(found.x, found.y, *sizes, test)
    pixels = int(np.prod(found.x.shape[1:]))

    def init(key: jax.Array) -> tuple[Any, Any]:
        layers = dense_layers.init(key, pixels, settings["width"], 10)
        return layers, {"weights": jnp.zeros(settings["train"]), "log_temperature": jnp.zeros(())}

    def logits(params: Any, images: hypercleaning.Images) -> jax.Array:
        return dense_layers.apply(params, dense_layers.flat(images.x))

    def losses(logits: jax.Array, images: hypercleaning.Images) -> jax.Array:
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, images.y)

    def train_loss(params: Any, lam: Any, images: hypercleaning.Images) -> jax.Array:
        weights = jax.nn.sigmoid(lam["weights"])
        return jnp.mean(weights * losses(logits(params, images), images))

    def val_loss(params: Any, lam: Any, images: hypercleaning.Images) -> jax.Array:
        out = logits(params, images)
        if objective == "own temperature":
            out = out * jnp.exp(-lam["log_temperature"])
        each = losses(out, images)
        return jnp.mean(1 - jnp.exp(-each) if objective == "expected error" else each)

    def metrics(params: Any, lam: Any, data: Any) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for part in ("val", "test"):
            out = logits(params, data[part])
            made[f"{part}_accuracy"] = jnp.mean(out.argmax(-1) == data[part].y)
            made[f"{part}_loss"] = losses(out, data[part]).mean()
        return made | {"temperature": jnp.exp(lam["log_temperature"])}

    return dataclasses.replace(
        base, init=init, train_loss=train_loss, val_loss=val_loss, metrics=metrics
    )


def evidence(settings: dict[str, Any], method: str, keys: jax.Array) -> dict[str, Any]:
    """Return the measures of an objective in a case; with no HPO λ is held."""
    inner, outer = optax.sgd(settings["rate"], momentum=0.9), optax.adam(settings["lr_hyper"])
    if method == "no HPO":  # the same inner steps, and no hypergradient
        held = gradhpo.FOOptimizer(inner, optax.set_to_zero())
        tuner, objective = hyperclean.LastOf(held, settings["T"]), "cross-entropy"
    else:
        tuner = gradhpo.UnrolledOptimizer(inner, outer, unroll_steps=settings["T"])
        objective = method
    made = problem(settings, objective)
    with warnings.catch_warnings():
        # Only one of the objectives has a temperature, and what is held has no hypergradient.
        warnings.simplefilter("ignore", gradhpo.UnreachedWarning)
        runs = seeds.run(made, tuner, settings["outer_steps"], keys)
    evals, each = runs.evals, np.arange(len(keys))
    best = evals["val_accuracy"].argmax(axis=0)
    at_best = {name: values[best, each] for name, values in evals.items()}
    return {
        "test_accuracy": 100 * runs.last["test_accuracy"],
        "val_loss": runs.last["val_loss"],
        "test_loss": runs.last["test_loss"],
        "stopped": 100 * at_best["test_accuracy"],
        "accuracy_change": 100 * (runs.last["test_accuracy"] - at_best["test_accuracy"]),
        "loss_change": runs.last["val_loss"] - at_best["val_loss"],
        "curve": 100 * evals["test_accuracy"],
        "loss_curve": evals["val_loss"],
    }
