"""Flax NNX and Equinox models, as their users would write them."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from gradhpo import Problem, solve
from tests.small import build

RNG = np.random.default_rng(0)
X = RNG.normal(size=(40, 5)).astype(np.float32)
Y = (X[:, 0] > 0).astype(np.int32)
BATCH = {"x": X, "y": Y, "index": np.arange(40)}


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(5, 8, rngs=rngs)
        self.out = nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.relu(self.hidden(x)))


def nnx_model():
    graph, params = nnx.split(NnxNet(nnx.Rngs(0)), nnx.Param)
    return params, lambda params, x: nnx.merge(graph, params)(x)


def equinox_model():
    model = eqx.nn.MLP(5, 2, 8, depth=1, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    return params, lambda params, x: jax.vmap(eqx.combine(params, static))(x)


def losses(apply):
    def each(params, batch):
        logits = apply(params, batch["x"])
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["y"])

    def train(params, lam, batch):
        weights = jax.nn.sigmoid(lam["example"][batch["index"]])
        decay = jnp.exp(lam["decay"]) * optax.tree.norm(params, squared=True)
        return jnp.mean(weights * each(params, batch)) + decay

    def val(params, lam, batch):
        return jnp.mean(each(params, batch))

    return train, val


@pytest.mark.parametrize(
    ("model", "name"),
    [(nnx_model, "hyperdistill"), (nnx_model, "greedy"), (equinox_model, "t1t2")],
)
@pytest.mark.slow
def test_a_models_weights_go_in_and_come_out_as_they_are(model, name):
    params, apply = model()
    train, val = losses(apply)
    lam = {"example": jnp.zeros(40), "decay": jnp.asarray(-6.0)}
    problem = Problem(lambda key: (params, lam), train, val, batch=lambda key: (BATCH, BATCH))
    optimizer, _ = build(name, outer=True, inner_optimizer=optax.adam(0.05))
    solution = solve(problem, optimizer, 40, jax.random.key(0))
    assert jax.tree.structure(solution.state.params) == jax.tree.structure(params)
    assert solution.metrics["val_loss"][-1] < 0.5 * solution.metrics["val_loss"][0]
    logits = apply(solution.state.params, X)
    assert (jnp.argmax(logits, axis=-1) == Y).mean() > 0.9


def test_an_equinox_model_with_its_functions_is_refused_by_path():
    model = eqx.nn.MLP(5, 2, 8, depth=1, key=jax.random.key(0))
    with pytest.raises(TypeError, match=r"params\.activation must be .*eqx.partition"):
        build("one-step")[0].init(model, jnp.ones(2))
