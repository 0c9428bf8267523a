"""Bad input is refused before anything compiles, in words that name the argument."""

import dataclasses
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradhpo
from gradhpo import Problem, solve
from gradhpo.parallel.compilations import CompileCounter
from tests.small import (
    BATCH,
    INNER,
    OPTIMIZERS,
    OUTER,
    build,
    run_arguments,
    start,
    train_loss,
    update_fn,
    val_loss,
)

PROBLEM = Problem(start, train_loss, val_loss, batch=lambda key: (BATCH, BATCH))


def step(name, *, train=train_loss, val=val_loss, batch=BATCH, **settings):
    optimizer, rate = build(name, **settings)
    state = optimizer.init(*start())
    with CompileCounter() as compiled:
        try:
            optimizer.step(state, batch, BATCH, train, val, *rate)
        finally:
            assert compiled.count == 0


@pytest.mark.parametrize("cls", OPTIMIZERS.values())
def test_neither_or_both_of_inner_optimizer_and_update_fn(cls):
    with pytest.raises(ValueError, match=r"inner_optimizer and update_fn; got neither"):
        cls(outer_optimizer=OUTER)
    with pytest.raises(ValueError, match=r"inner_optimizer and update_fn; got both"):
        cls(inner_optimizer=INNER, outer_optimizer=OUTER, update_fn=update_fn)


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "greedy"])
def test_neither_or_both_of_outer_optimizer_and_lr_hyper(name):
    losses = (train_loss, val_loss)
    plain, outer = build(name)[0], build(name, outer=True)[0]
    draw, T = (lambda: BATCH, lambda: BATCH), run_arguments(name, 2)
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="outer_optimizer and lr_hyper; got neither"):
        plain.step(plain.init(*start()), BATCH, BATCH, *losses)
    with pytest.raises(ValueError, match="outer_optimizer and lr_hyper; got both"):
        outer.step(outer.init(*start()), BATCH, BATCH, *losses, 0.1)
    with pytest.raises(ValueError, match="got neither"):
        plain.run(plain.init(*start()), 1, *T, *draw, *losses)
    with pytest.raises(ValueError, match="got both"):
        outer.run(outer.init(*start()), 1, *T, *draw, *losses, lr_hyper=0.1)
    with pytest.raises(ValueError, match="got neither"):
        solve(PROBLEM, plain, 3, key)
    with pytest.raises(ValueError, match="got both"):
        solve(PROBLEM, outer, 3, key, lr_hyper=0.1)


def test_greedy_needs_an_outer_optimizer():
    with pytest.raises(ValueError, match="needs an outer_optimizer"):
        gradhpo.GreedyOptimizer(INNER)


@pytest.mark.parametrize("gamma", [-0.1, 1.1, float("nan")])
@pytest.mark.parametrize("name", ["t1t2", "greedy", "hyperdistill"])
def test_gamma_out_of_range(name, gamma):
    with pytest.raises(ValueError, match=r"gamma must be a number in .0, 1\], got"):
        build(name, gamma=gamma)


def test_greedy_refuses_gamma_zero_and_an_empty_unroll():
    with pytest.raises(ValueError, match=r"gamma must be a number in \(0, 1\], got 0.0"):
        build("greedy", gamma=0)
    with pytest.raises(ValueError, match="unroll_steps must be at least 1, got 0"):
        build("greedy", unroll_steps=0)
    with pytest.raises(TypeError, match=r"unroll_steps must be an integer .* got 2.5"):
        build("greedy", unroll_steps=2.5)
    with pytest.raises(ValueError, match='batches must be "repeat" or "stack"'):
        build("greedy", batches="both")


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("which", ["train", "val"])
def test_a_loss_that_is_not_a_floating_scalar(name, which):
    def vector(w, lam, batch):
        return (batch[0] @ w - batch[1]) ** 2

    def integer(w, lam, batch):
        return jnp.sum(w > 0)

    def pair(w, lam, batch):
        return train_loss(w, lam, batch), 0

    with pytest.raises(ValueError, match=rf"{which}_loss_fn must return .* shape \(12,\)"):
        step(name, **{which: vector})
    with pytest.raises(TypeError, match=rf"{which}_loss_fn must return .* got int32"):
        step(name, **{which: integer})
    with pytest.raises(TypeError, match=rf"{which}_loss_fn must return .* got tuple"):
        step(name, **{which: pair})
    with pytest.raises(TypeError, match=f"{which}_loss_fn must be a function, got NoneType"):
        step(name, **{which: None})


def test_a_loss_that_cannot_be_hashed():
    class Loss(list):
        def __call__(self, w, lam, batch):
            return train_loss(w, lam, batch)

    with pytest.raises(TypeError, match="train_loss_fn must be hashable"):
        step("one-step", train=Loss())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_update_fn_whose_result_differs_names_the_leaf(name):
    params = {"a": jnp.ones(3), "b": {"c": jnp.ones((2, 2))}}

    def loss(w, lam, batch):
        return jnp.sum(w["a"]) * lam + jnp.sum(w["b"]["c"])

    cases = {
        r"lacks the leaf \['b'\]\['c'\]": lambda w: {"a": w["a"]},
        r"has the leaf \['d'\]": lambda w: w | {"d": w["a"]},
        r"shape \(4,\), not \(2, 2\) .* \['b'\]\['c'\]": lambda w: w | {"b": {"c": jnp.ones(4)}},
        r"dtype bfloat16, not float32 .* \['a'\]": lambda w: w | {"a": w["a"].astype("bfloat16")},
    }
    for message, change in cases.items():
        optimizer, rate = build(name, update_fn=lambda w, lam, batch, change=change: change(w))
        state = optimizer.init(params, 1.0)
        with pytest.raises((ValueError, TypeError), match=f"update_fn .*{message}"):
            optimizer.step(state, BATCH, BATCH, loss, loss, *rate)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_trees_without_gradients_are_refused_by_path(name):
    optimizer, _ = build(name)
    w, lam = start()
    for empty in ({}, None, ()):
        with pytest.raises(ValueError, match="hyperparams has no arrays"):
            optimizer.init(w, empty)
        with pytest.raises(ValueError, match="params has no arrays"):
            optimizer.init(empty, lam)
    refused = {
        r"hyperparams\['n'\] must be a floating-point array, got int": 3,
        r"hyperparams\['n'\] .* got int32": jnp.arange(3),
        r"hyperparams\['n'\] .* got bool": np.asarray([True]),
        r"hyperparams\['n'\] .* got complex64": jnp.ones(2, jnp.complex64),
        r"hyperparams\['n'\] .* got key": jax.random.key(0),
        r"hyperparams\['n'\] .* got str": "0.1",
    }
    for message, leaf in refused.items():
        with pytest.raises(TypeError, match=message):
            optimizer.init(w, lam | {"n": leaf})
        with pytest.raises(TypeError, match=message.replace("hyperparams", "params")):
            optimizer.init({"w": w, "n": leaf}, lam)


def test_a_batch_stack_of_the_wrong_length():
    stack = (np.stack([BATCH[0]] * 4), np.stack([BATCH[1]] * 4))
    with pytest.raises(ValueError, match=r"train_batch .* length 3, got shape \(4, 12, 3\)"):
        step("greedy", batches="stack", batch=stack)
    optimizer, _ = build("hyperdistill", T=4)
    state = optimizer.init(*start())
    with pytest.raises(ValueError, match="train_batches gave no batches"):
        optimizer.estimate_theta(state, [], BATCH, train_loss, val_loss)
    uneven = (stack[0], stack[1][:3])
    with pytest.raises(ValueError, match=r"train_batches .* length 4, got shape \(3, 12\)"):
        optimizer.estimate_theta(state, uneven, BATCH, train_loss, val_loss)
    ragged = [BATCH, (BATCH[0][:5], BATCH[1][:5])]
    with pytest.raises(ValueError, match=r"train_batches: batch 1 has shape \(5, 3\)"):
        optimizer.estimate_theta(state, ragged, BATCH, train_loss, val_loss)


def test_arguments_of_run():
    optimizer, _ = build("one-step")
    state, draw = optimizer.init(*start()), (lambda: BATCH, lambda: BATCH)
    good = {"state": state, "M": 2, "T": 2, "get_train_batch": draw[0], "get_val_batch": draw[1]}
    good |= {"train_loss_fn": train_loss, "val_loss_fn": val_loss, "lr_hyper": 0.1}
    bad = {
        "M must be at least 0, got -1": {"M": -1},
        "T must be at least 1, got 0": {"T": 0},
        "get_train_batch must be a function, got tuple": {"get_train_batch": BATCH},
        "get_val_batch must be a function": {"get_val_batch": None},
        "lr_reptile must be": {"lr_reptile": "1"},
        "lr_hyper must be": {"lr_hyper": "0.1"},
        "callback must be a function": {"callback": 3},
    }
    for message, change in bad.items():
        with pytest.raises((ValueError, TypeError), match=message):
            optimizer.run(**good | change)


def test_arguments_of_solve():
    optimizer, _ = build("one-step", outer=True)
    good = {"problem": PROBLEM, "optimizer": optimizer, "steps": 3, "key": jax.random.key(0)}
    bad = {
        "steps must be at least 1, got 0": {"steps": 0},
        "key must be made by jax.random.key, .* got 0": {"key": 0},
        r"got keys of shape \(2, 2\)": {"key": jax.random.split(jax.random.key(0), (2, 2))},
        "episode_length must be at least 1": {"episode_length": 0},
        "eval_every must be an integer": {"eval_every": 2.0},
        "callback must be a function": {"callback": "print"},
    }
    for message, change in bad.items():
        with pytest.raises((ValueError, TypeError), match=message):
            solve(**good | change)
    done = solve(**good)
    with pytest.raises(ValueError, match="resume has taken 3 steps already, more than steps=2"):
        solve(**good | {"steps": 2}, resume=done)


def test_legacy_keys_are_taken():
    optimizer, _ = build("one-step", outer=True)
    old = solve(PROBLEM, optimizer, 3, jax.random.PRNGKey(5))
    new = solve(PROBLEM, optimizer, 3, jax.random.key(5))
    np.testing.assert_array_equal(old.state.params, new.state.params)


def test_arguments_of_problem():
    good = {"init": start, "train_loss": train_loss, "val_loss": val_loss}
    with pytest.raises(ValueError, match="batch and batches; got neither"):
        Problem(**good)
    with pytest.raises(ValueError, match="batch and batches; got both"):
        Problem(**good, batch=lambda key: (BATCH, BATCH), batches=[(BATCH, BATCH)])
    with pytest.raises(TypeError, match=r"Problem.val_loss must be a function"):
        Problem(**good | {"val_loss": None}, batches=[])
    with pytest.raises(TypeError, match=r"Problem.batches must be an iterable of .* got int"):
        Problem(**good, batches=3)


def test_what_a_problem_returns_is_checked():
    optimizer, _ = build("one-step", outer=True)
    good = {"init": start, "train_loss": train_loss, "val_loss": val_loss}

    def fails(error, message, **change):
        problem = Problem(**{**good, **change})
        with pytest.raises(error, match=message):
            solve(problem, optimizer, 3, jax.random.key(0))

    fails(TypeError, r"Problem.batch must return \(train_batch, val_batch\)", batch=lambda key: 3)
    pair = {"batch": lambda key: (BATCH, BATCH)}
    fails(TypeError, r"Problem.init must return", init=lambda key: jnp.ones(3), **pair)
    fails(ValueError, "Problem.batches is empty", batches=[])
    fails(TypeError, r"pairs, got ndarray at index 0", batches=[np.ones(3)])
    small = (BATCH[0][:5], BATCH[1][:5])
    ragged = [(BATCH, BATCH), (BATCH, small)]
    fails(
        ValueError, r"pair 1 has shape \(5, 3\), not \(12, 3\) .* leaf \[1\]\[0\]", batches=ragged
    )


def test_distill_data_needs_a_batch_and_a_key():
    optimizer = gradhpo.OnlineHypergradientOptimizer(INNER, distill_data=True)
    with pytest.raises(ValueError, match="distill_data=True needs init"):
        optimizer.init(*start())
    with pytest.raises(ValueError, match="only with distill_data=True"):
        build("hyperdistill")[0].init(*start(), key=jax.random.key(0))


def test_an_inner_optimizer_that_is_none():
    with pytest.raises(TypeError, match=r"inner_optimizer must be an optax\.Grad"):
        gradhpo.OneStepOptimizer(0.1)
    with pytest.raises(TypeError, match="the function returned float"):
        gradhpo.OneStepOptimizer(lambda lam: 0.1).init(*start())
    with pytest.raises(TypeError, match="outer_optimizer must be"):
        gradhpo.OneStepOptimizer(optax.sgd(0.1), 0.1)


def test_running_statistics_among_the_weights_are_refused_by_name():
    from flax import nnx

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.BatchNorm(2, rngs=rngs)

    module = Net(nnx.Rngs(0))
    optimizer = gradhpo.OneStepOptimizer(optax.sgd(0.1))
    for params, path in ((module, ".norm.mean"), (nnx.state(module), "['norm']['mean']")):
        with pytest.raises(TypeError, match=re.escape(f"params{path} is an nnx.BatchStat")):
            optimizer.init(params, jnp.zeros(2))
    assert optimizer.init(nnx.state(module, nnx.Param), jnp.zeros(2)).step == 0


@pytest.mark.parametrize("kind", [gradhpo.Problem, gradhpo.Solution])
def test_help_tells_every_field(kind):
    text = inspect.getdoc(kind)
    for field in dataclasses.fields(kind):
        assert re.search(rf"^  {field.name}: ", text, re.MULTILINE), field.name


@pytest.mark.parametrize("name", ["hyperdistill", "t1t2"])
def test_a_state_of_another_method_is_told_by_what_it_lacks(name):
    settings = {"gamma": 0.9} if name == "t1t2" else {}
    optimizer, rate = build(name, **settings)
    state = build("one-step")[0].init(*start())
    with pytest.raises(ValueError, match=r"state\.metadata lacks 'w_star', which this optimizer"):
        optimizer.step(state, BATCH, BATCH, train_loss, val_loss, *rate)


def test_what_is_no_state_is_told():
    optimizer, rate = build("one-step")
    with pytest.raises(TypeError, match=r"state must be a gradhpo\.BilevelState, .*; got tuple"):
        optimizer.step(start(), BATCH, BATCH, train_loss, val_loss, *rate)


@pytest.mark.parametrize("name", ["greedy", "unrolled", "forward", "drmad", "implicit"])
def test_a_stack_where_one_batch_is_repeated_is_told(name):
    optimizer, rate = build(name)
    state = optimizer.init(*start())
    stack = tuple(np.stack([x] * 3) for x in BATCH)

    def loss(w, lam, batch):  # broadcasts
        x, y = batch
        return jnp.mean((x @ w - y) ** 2) + jnp.exp(lam["decay"]) * jnp.sum(w**2) + lam["l"].sum()

    def step(train_batch, val_batch):
        task = gradhpo.Task(train_batch, val_batch, loss, loss)
        return optimizer.advance(state, task, *rate)

    with pytest.warns(UserWarning, match=r"train_batch looks like a stack of 3 batches.*batches="):
        jax.eval_shape(step, stack, BATCH)
    jax.eval_shape(step, BATCH, BATCH)
