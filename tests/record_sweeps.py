"""Write `recorded/digits.npz`, tables of two small sweeps: `python -m tests.record_sweeps`.

A network of 16 hidden units is trained on scikit-learn's digits by batches of 16. The scheduler
moves its learning rate and momentum; the decay of each layer has hypergradients. One sweep is PBT
that copies half of the population and draws all settings anew, so that its tables say what any
settings do to any network; the other is random search.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import gradhpo
from gradhpo.cluster import PBT, RandomSearch, SearchSpace, Sweep, loguniform, uniform

FILE = Path(__file__).parent / "recorded" / "digits.npz"
SPACE = SearchSpace({"log_rate": loguniform(1e-3, 3, stored="log"), "momentum": uniform(0, 0.97)})
SCHEDULERS = {"pbt": PBT(quantile=0.5, resample=1.0), "random": RandomSearch()}
SIZES = {"population": 32, "generations": 16, "steps_per_generation": 15}
KEPT = {"trial": np.int16, "born": np.int16, "parent": np.int16, "val_loss": np.float32}
KEPT |= {f"hyperparams.{name}": np.float32 for name in SPACE.hyperparams}


def loss(w, batch):
    """Cross-entropy."""
    pixels, labels = batch
    scores = jax.nn.relu(pixels @ w["in"]) @ w["out"]
    return optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean()


def problem():
    """Return the network on 500 digits, 400 others for validation."""
    digits = load_digits()
    pixels = np.asarray(digits.data[:900] / 16, np.float32)
    labels = np.asarray(digits.target[:900], np.int32)

    def init(key):
        keys = jax.random.split(key)
        weights = {
            "in": jax.random.normal(keys[0], (64, 16)) / 8,
            "out": jax.random.normal(keys[1], (16, 10)) / 4,
        }
        decay = {"in": jnp.float32(-8), "out": jnp.float32(-8)}
        return weights, {"log_rate": jnp.float32(0), "momentum": jnp.float32(0), "decay": decay}

    def train_loss(w, lam, batch):
        decays = jax.tree.map(lambda d, x: jnp.exp(d) * jnp.sum(x**2), lam["decay"], w)
        return loss(w, batch) + sum(jax.tree.leaves(decays))

    def batch(key, data):
        rows = jax.random.randint(key, (16,), 0, 500)
        return jax.tree.map(lambda x: x[rows], data), jax.tree.map(lambda x: x[500:], data)

    return gradhpo.Problem(
        init=init,
        train_loss=train_loss,
        val_loss=lambda w, lam, b: loss(w, b),
        batch=batch,
        data=lambda key: (pixels, labels),
    )


def optimizer():
    """Return One-Step, which leaves the rate and the momentum alone."""
    labels = {"log_rate": "fixed", "momentum": "fixed", "decay": "tuned"}
    outer = optax.multi_transform({"tuned": optax.adam(0.1), "fixed": optax.set_to_zero()}, labels)
    return gradhpo.OneStepOptimizer(
        lambda lam: optax.sgd(jnp.exp(lam["log_rate"]), momentum=lam["momentum"]), outer
    )


def record(scheduler):
    """Return what is kept of a sweep's table, each column `(generations, slots)`."""
    with tempfile.TemporaryDirectory() as storage:
        sweep = Sweep(
            problem=problem,
            optimizer=optimizer,
            space=SPACE,
            scheduler=scheduler,
            storage=storage,
            executor="local",
            batching="vmap",
            progress=False,
            **SIZES,
        )
        table = sweep.run().table
    shape = SIZES["generations"], SIZES["population"]
    return {name: table[name].astype(kind).reshape(shape) for name, kind in KEPT.items()}


def main():
    """Record both."""
    arrays = {
        f"{name}.{column}": values
        for name, scheduler in SCHEDULERS.items()
        for column, values in record(scheduler).items()
    }
    FILE.parent.mkdir(exist_ok=True)
    np.savez_compressed(FILE, **arrays)
    print(f"{FILE}: {FILE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
