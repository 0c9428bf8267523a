import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradhpo
from gradhpo import BilevelState
from tests.quick import slow_but
from tests.small import BATCH, OPTIMIZERS, build, train_loss, val_loss

METRICS = ("train_loss", "val_loss", "hypergrad_norm", "param_norm", "hyperparam_norm")


def avals(tree):
    """Shapes, dtypes and weak types: all that decides whether `jit` compiles again."""
    return jax.tree.map(lambda x: (x.shape, x.dtype, getattr(x, "weak_type", False)), tree)


def test_create_starts_at_a_traced_step_zero():
    state = BilevelState.create({"w": jnp.ones(3)}, {"l": 0.5}, metadata={"a": 1.0})
    assert state.step == 0
    assert state.step.dtype == jnp.int32
    assert not any(x.weak_type for x in jax.tree.leaves(state))


def test_a_state_is_immutable():
    state = BilevelState.create({"w": jnp.ones(3)}, {"l": 0.5})
    with pytest.raises(dataclasses.FrozenInstanceError):
        state.step = 3


def test_update_merges_metadata_and_leaves_the_old_state():
    old = BilevelState.create(jnp.ones(3), jnp.ones(2), metadata={"a": 1.0, "b": 2.0})
    new = old.update(step=4, metadata={"b": 3.0})
    assert (old.step, old.get_metric("b")) == (0, 2.0)
    assert (new.step, new.get_metric("a"), new.get_metric("b")) == (4, 1.0, 3.0)
    assert new.get_metric("c") is None
    assert new.get_metric("c", 7) == 7


def test_update_refuses_an_unknown_field_by_name():
    with pytest.raises(TypeError, match="unexpected keyword argument 'parms'"):
        BilevelState.create(jnp.ones(3), jnp.ones(2)).update(parms=1)


def test_paths_of_leaves_are_named():
    state = BilevelState.create({"w": jnp.ones(3)}, {"l": 0.5}, metadata={"a": 1.0})
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(state)]
    assert paths == [".params['w']", ".hyperparams['l']", ".step", ".metadata['a']"]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_keeps_the_structure_and_types_of_init_and_its_argument_usable(name):
    optimizer, rate = build(name)
    state = optimizer.init(jnp.ones(3), {"l": jnp.ones(3), "decay": 0.1})
    new = optimizer.step(state, BATCH, BATCH, train_loss, val_loss, *rate)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    assert avals(new) == avals(state)
    assert all(np.isfinite(new.get_metric(metric)) for metric in METRICS)
    assert new.step == 1
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("name", slow_but(["t1t2", "hyperdistill"], "hyperdistill"))
def test_jit_scan_and_vmap_give_what_single_steps_give(name):
    optimizer, rate = build(name)
    start = optimizer.init(jnp.ones(3), {"l": jnp.ones(3), "decay": 0.1})

    def step(state, _=None):
        return optimizer.step(state, BATCH, BATCH, train_loss, val_loss, *rate), None

    by_hand = start
    for _ in range(3):
        by_hand, _ = step(by_hand)
    scanned = jax.jit(lambda s: jax.lax.scan(step, s, length=3)[0])(start)
    many = jax.tree.map(lambda x: jnp.stack([x, x]), start)
    mapped = jax.jit(jax.vmap(lambda s: jax.lax.scan(step, s, length=3)[0]))(many)
    for other in (scanned, jax.tree.map(lambda x: x[1], mapped)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 2e-5, 1e-6), by_hand, other)


@pytest.mark.parametrize("name", slow_but(OPTIMIZERS, "t1t2"))
def test_bfloat16_weights_with_float32_hyperparameters(name):
    optimizer, rate = build(name, inner_optimizer=lambda lam: optax.adam(jnp.exp(lam["decay"])))
    state = optimizer.init(jnp.ones(3, jnp.bfloat16), {"l": jnp.ones(3), "decay": -3.0})
    for _ in range(3):
        new = optimizer.step(state, BATCH, BATCH, train_loss, val_loss, *rate)
        assert avals(new) == avals(state)
        state = new
    assert state.params.dtype == jnp.bfloat16
    assert state.hyperparams["l"].dtype == jnp.float32
    assert all(np.isfinite(state.get_metric(metric)) for metric in METRICS)


def test_equal_optimizers_share_a_compiled_step():
    inner = optax.sgd(0.1)
    assert gradhpo.FOOptimizer(inner) == gradhpo.FOOptimizer(inner)
    assert hash(gradhpo.FOOptimizer(inner)) == hash(gradhpo.FOOptimizer(inner))
