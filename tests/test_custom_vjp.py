"""Operations with a VJP of their own and no JVP, such as fused kernels, under every method."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest

import gradhpo
from tests.quick import slow_but
from tests.small import OPTIMIZERS, REFERENCES, UNROLLING, X, Y

pytestmark = pytest.mark.usefixtures("only_x64")


@jax.custom_vjp
def fused(x):
    return jnp.tanh(x)


fused.defvjp(lambda x: (jnp.tanh(x), x), lambda x, g: (g * (1 - jnp.tanh(x) ** 2),))


def losses(f, where):
    """Losses with `f` around the model's outputs, the weights, λ, or a part that λ never meets."""

    def in_train(place):
        return f if where in (place, "everywhere") else jnp.tanh

    def train(w, lam, batch):
        x, y = batch
        errors = (in_train("outputs")(x @ in_train("weights")(w)) - y) ** 2
        return jnp.mean(errors) * in_train("lambda")(lam) + jnp.exp(lam) * jnp.sum(w**2)

    def val(w, lam, batch):
        x, y = batch
        g = f if where in ("validation", "everywhere") else jnp.tanh
        return jnp.mean((g(x @ w) - y) ** 2) + 0.1 * g(lam)

    return train, val


INNER, OUTER = optax.sgd(0.1, momentum=0.9), optax.sgd(0.1)


def made(name, **settings):
    unrolled = {"unroll_steps": 3} if name in UNROLLING else {}
    inner = settings.pop("inner_optimizer", INNER)
    return (OPTIMIZERS | REFERENCES)[name](inner, OUTER, **unrolled, **settings)


def hypergradient(optimizer, f, where):
    batch = (jnp.asarray(X, float), jnp.asarray(Y, float))
    state = optimizer.init(jnp.array([0.5, -0.4, 0.8]), jnp.asarray(0.3))
    return optimizer.compute_hypergradient(state, batch, batch, *losses(f, where))


@functools.cache
def plain(name, **settings):
    """With JAX's own operation, which is everywhere: the same wherever another takes its place."""
    return hypergradient(made(name, **settings), jnp.tanh, "nowhere")


PLACES = ["outputs", "weights", "lambda", "validation"]


@pytest.mark.parametrize(
    ("name", "where"),
    slow_but(
        [("one-step", where) for where in PLACES]
        + [(name, "everywhere") for name in (*OPTIMIZERS, *REFERENCES)],
        ("one-step", "outputs"),
        ("one-step", "lambda"),
        ("forward", "everywhere"),
    ),
)
def test_every_method_gives_the_same_as_with_the_plain_operation(name, where):
    got, expected = hypergradient(made(name), fused, where), plain(name)
    # T1-T2 takes a difference, whose rounding is not the same.
    assert abs(got - expected) <= (1e-8 if name == "t1t2" else 1e-12) * max(1, abs(expected))


@pytest.mark.parametrize(
    ("name", "where"),
    slow_but(
        [("one-step", where) for where in ("outputs", "weights", "lambda")]
        + [(name, "everywhere") for name in ("greedy", "hyperdistill", "unrolled")],
        ("one-step", "weights"),
    ),
)
def test_forward_over_reverse_takes_them_too(name, where):
    got = hypergradient(made(name, mode="forward-over-reverse"), fused, where)
    expected = plain(name, mode="reverse-over-reverse")
    assert abs(got - expected) <= 1e-12


@pytest.mark.parametrize("name", ["one-step", "greedy", "unrolled"])
def test_reverse_over_forward_refuses_them_by_name(name):
    with pytest.raises(ValueError, match=r"mode='reverse-over-forward'.*jax\.custom_vjp.*use mode"):
        hypergradient(made(name, mode="reverse-over-forward"), fused, "outputs")


def test_reverse_over_forward_takes_them_where_lambda_does_not_meet_them():
    got, expected = (
        hypergradient(made("one-step", mode="reverse-over-forward"), f, "lambda")
        for f in (fused, jnp.tanh)
    )
    assert abs(got - expected) <= 1e-12


def test_forward_refuses_them_in_the_optimizer():
    optimizer = made("forward", inner_optimizer=lambda lam: optax.sgd(0.1 * fused(lam)))
    with pytest.raises(ValueError, match=r"ForwardOptimizer.*custom_vjp.*UnrolledOptimizer"):
        hypergradient(optimizer, jnp.tanh, "outputs")
    update = gradhpo.ForwardOptimizer(update_fn=lambda w, lam, batch: w * fused(lam))
    with pytest.raises(ValueError, match="ForwardOptimizer takes a derivative by forward mode"):
        hypergradient(update, jnp.tanh, "outputs")
