"""Combinations race whose trials lie over several devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradhpo
from gradhpo.cluster import Race, SearchSpace, Sweep, loguniform
from gradhpo.cluster.check import check_storage
from tests.sweeps import assert_same_tables

METHODS = {
    "one-step": (gradhpo.OneStepOptimizer, {}),
    "greedy": (gradhpo.GreedyOptimizer, {"unroll_steps": 2}),
}
SPACE = SearchSpace(
    {"rate": loguniform(1e-3, 0.1, stored="log")},
    choices={"method": list(METHODS)},
    race=Race(reduction=2, grace=1),
)


def start(key):
    return {"w": jax.random.normal(key, (8, 4))}, {"rate": jnp.asarray(-2.0)}


def loss(w, lam, x):
    del lam
    return jnp.mean((x @ w["w"] - 1) ** 2)


PROBLEM = gradhpo.Problem(
    start, loss, loss, batch=lambda key: (jax.random.normal(key, (8, 8)) + 1, jnp.ones((8, 8)))
)


def optimizer(method):
    kind, more = METHODS[method]
    return kind(lambda lam: optax.sgd(jnp.exp(lam["rate"])), optax.adam(1e-2), **more)


def raced(storage, generations):
    return Sweep(
        PROBLEM, optimizer, SPACE, population=8, shards=4, steps_per_generation=4,
        generations=generations, storage=storage, mesh={"data": 4}, rules={"": "data"},
        executor="local", progress=False, seed=1,
    ).run()  # fmt: skip


@pytest.mark.slow
def test_shards_that_change_hands_lie_over_the_devices_too(tmp_path):
    whole = raced(tmp_path / "whole", 4)
    assert len(whole.ended) == 1
    np.testing.assert_array_equal(whole.replay().params["w"], whole.best.params["w"])
    for generations in (1, 4):  # the race ends its loser after the first
        parts = raced(tmp_path / "parts", generations)
    assert_same_tables(parts, whole)
    assert all(finding.whole for finding in check_storage(tmp_path / "parts"))
