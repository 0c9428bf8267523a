"""A script in the manner of `gradhpo` 0.1.3: learned learning rates, one for each parameter."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gradhpo import (
    BilevelState,
    DataBatch,
    FOOptimizer,
    GreedyOptimizer,
    LossFunctions,
    OneStepOptimizer,
    OnlineHypergradientOptimizer,
    T1T2Optimizer,
    tree_dot,
    tree_l2_norm,
    tree_lerp,
    tree_normalize,
    tree_zeros_like,
    update_w_star,
    vjp_wrt_both,
    vjp_wrt_lambda,
)
from gradhpo.parallel.compilations import CompileCounter

T = 20
RNG = np.random.default_rng(0)
CENTRES = RNG.normal(size=(5, 10)) * 2


def dataset(n):
    labels = RNG.integers(0, 5, n)
    inputs = (CENTRES[labels] + 0.5 * RNG.normal(size=(n, 10))).astype(np.float32)
    return DataBatch(jnp.asarray(inputs), jax.nn.one_hot(labels, 5))


TRAIN, VAL = dataset(256), dataset(128)


def mlp(key):
    k1, k2 = jax.random.split(key)
    return {
        "w1": jax.random.normal(k1, (10, 32)) * jnp.sqrt(0.2),
        "b1": jnp.zeros(32),
        "w2": jax.random.normal(k2, (32, 5)) * jnp.sqrt(1 / 16),
        "b2": jnp.zeros(5),
    }


def loss(params, hyperparams, batch):
    hidden = jax.nn.relu(batch.inputs @ params["w1"] + params["b1"])
    logits = hidden @ params["w2"] + params["b2"]
    return -jnp.mean(jnp.sum(jax.nn.log_softmax(logits) * batch.targets, axis=-1))


def update_fn(w, lam, batch):
    grads = jax.grad(loss)(w, lam, batch)
    return jax.tree.map(lambda w, lr, g: w - jax.nn.softplus(lr) * g, w, lam, grads)


class Batches:
    def __init__(self, data, key):
        self.data, self.key = data, key

    def __call__(self):
        self.key, subkey = jax.random.split(self.key)
        rows = jax.random.randint(subkey, (64,), 0, len(self.data.inputs))
        return DataBatch(self.data.inputs[rows], self.data.targets[rows])


def play(optimizer, M, *T, **settings):
    w = mlp(jax.random.PRNGKey(0))
    lam = jax.tree.map(lambda p: jnp.full_like(p, -3.0), w)
    assert sum(leaf.size for leaf in jax.tree.leaves(lam)) == 517
    seen = []

    def callback(episode, state):
        seen.append(float(state.get_metric("val_loss")))
        assert state.step in (1, 20)

    k1, k2 = jax.random.split(jax.random.PRNGKey(1))
    state = optimizer.init(w, lam)
    with CompileCounter() as compiled:
        final = optimizer.run(
            state,
            M,
            *T,
            Batches(TRAIN, k1),
            Batches(VAL, k2),
            loss,
            loss,
            lr_reptile=1.0,
            callback=callback,
            **settings,
        )
    return final, seen, compiled.count


@pytest.mark.parametrize(
    ("optimizer", "M", "length"),
    [
        (OnlineHypergradientOptimizer(update_fn=update_fn, estimation_period=3, T=T), 6, ()),
        (OneStepOptimizer(update_fn=update_fn), 6, (T,)),
        (FOOptimizer(update_fn=update_fn), 6, (T,)),
        (T1T2Optimizer(update_fn=update_fn, T=T), 3, ()),  # 517 differences a step
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.slow
def test_the_demo_runs_unchanged_and_compiles_its_step_once(optimizer, M, length):
    final, seen, compiles = play(optimizer, M, *length, lr_hyper=3e-3)
    assert len(seen) == M
    assert seen[-1] < 0.5 * seen[0]
    assert set(final.metadata) >= {"val_loss"}
    # The step, its beginning, Reptile, the callback's loss, θ and its stack of batches, and what
    # `Batches` itself compiles; 0.1.3 compiled the step at every call.
    assert compiles < 25


@pytest.mark.slow
def test_the_demo_with_greedy_which_takes_lr_hyper_in_vain():
    outer = optax.sgd(3e-3)
    optimizer = GreedyOptimizer(None, outer, unroll_steps=5, gamma=0.9, update_fn=update_fn)
    with pytest.warns(UserWarning, match="ignores lr_hyper"):
        _, seen, _ = play(optimizer, 20, lr_hyper=3e-3)
    assert seen[-1] < seen[0]


@pytest.mark.slow
def test_a_state_built_by_hand_and_steps_by_hand():
    optimizer = OneStepOptimizer(update_fn=update_fn)
    w = mlp(jax.random.PRNGKey(0))
    lam = tree_zeros_like(w)
    state = BilevelState(w, lam, None, None, step=0)
    assert state.update(step=None).step == 0
    losses = LossFunctions(loss, loss)
    new = optimizer.step(state, TRAIN, VAL, losses.train_loss, losses.val_loss, lr_hyper=0.01)
    gradient = optimizer.compute_hypergradient(state, TRAIN, VAL, loss, loss)
    jax.tree.map(
        lambda a, b, g: np.testing.assert_allclose(b, a - 0.01 * g, rtol=1e-4, atol=1e-7),
        lam,
        new.hyperparams,
        gradient,
    )
    assert new.step == 1


@pytest.mark.slow
def test_tree_functions():
    a, b = {"x": jnp.asarray([3.0, 4.0])}, {"x": jnp.asarray([1.0, 2.0])}
    assert tree_l2_norm(a) == 5
    assert tree_dot(a, b) == 11
    np.testing.assert_allclose(tree_lerp(a, b, 0.25)["x"], [2.5, 3.5])
    np.testing.assert_allclose(tree_normalize(a)["x"], [0.6, 0.8], rtol=1e-6)
    np.testing.assert_allclose(update_w_star(a, b, 0.5, 1)["x"], b["x"])
    np.testing.assert_allclose(update_w_star(a, b, 0.5, 2)["x"], [5 / 3, 8 / 3], rtol=1e-6)

    def phi(w, lam, batch):
        return {"x": w["x"] * lam["x"] * batch}

    np.testing.assert_allclose(vjp_wrt_lambda(phi, a, b, 2.0, a)["x"], [18, 32])
    alpha_a, alpha_b = vjp_wrt_both(phi, a, b, 2.0, a)
    np.testing.assert_allclose(alpha_a["x"], [6, 16])
    np.testing.assert_allclose(alpha_b["x"], [18, 32])
