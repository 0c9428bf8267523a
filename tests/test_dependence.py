"""What a function depends on, leaf by leaf and coordinate by coordinate."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from gradhpo.dependence import (
    FOLLOWED,
    dependents,
    depends,
    depends_by_coordinate,
    influences,
)

UNRAVEL = ravel_pytree({"rate": jnp.zeros(()), "decay": jnp.zeros((2, 1))})[1]


def test_depends_sees_through_loops_branches_and_jit_and_stops_at_stop_gradient():
    argument = {name: jnp.ones(2) for name in "abcde"}

    @jax.jit
    def function(x, other):
        def body(carry, _):
            first, second = carry
            return (first + x["a"], second * other), None

        looped, _ = jax.lax.scan(body, (x["b"], jnp.zeros(2)), length=3)
        branched = jax.lax.cond(x["c"][0] > 0, lambda x: x["d"], lambda x: 2 * x["d"], x)
        return looped[0] + branched + jax.lax.stop_gradient(x["e"])

    found = depends(function, argument, jnp.ones(2))
    assert dict(zip("abcde", found, strict=True)) == {
        "a": True, "b": True, "c": False, "d": True, "e": False
    }  # fmt: skip


def repeated(body):
    """A `while` loop of three rounds."""
    return lambda x: jax.lax.fori_loop(0, 3, lambda _, carry: body(carry), x)


@pytest.mark.parametrize(
    ("function", "derivative", "value"),
    [
        (lambda x: 2.0, False, False),
        (lambda x: x * 2, True, True),
        (lambda x: 0 * x, True, False),
        (jax.lax.stop_gradient, False, True),
        (jnp.round, False, True),
        (lambda x: (x > 0).astype(float), False, True),
        (lambda x: jnp.where(x > 0, 1.0, 2.0), False, True),
        (jnp.argmax, False, True),
        (jax.nn.relu, True, True),
        (jax.checkpoint(jnp.sin), True, True),
        (repeated(jnp.sin), True, True),
        (repeated(lambda x: x * 0 + jnp.floor(x)), True, True),
        (repeated(jnp.floor), True, True),  # after no round it is x
        (jax.grad(lambda x: jnp.sum(jax.lax.stop_gradient(x) * x)), False, True),
        (jax.grad(lambda x: jnp.sum(x**2)), True, True),
        (jax.vmap(lambda x: x**2), True, True),
        (lambda x: jax.lax.while_loop(lambda c: c < x.sum(), lambda c: c + 1, 0.0), False, True),
    ],
)  # fmt: skip
def test_derivatives_and_values(function, derivative, value):
    x = jnp.ones(3)
    assert depends(function, x) == [derivative]
    assert depends(function, x, derivative=False) == [value]


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: x[0], [1, 0, 0]),
        (lambda x: jnp.exp(x)[-1], [0, 0, 1]),
        (lambda x: sum(jnp.unstack(2 * x)[1:]), [0, 1, 1]),
        (lambda x: jnp.split(-x, 3)[1], [0, 1, 0]),
        (lambda x: x[::2] * 3, [1, 0, 1]),
        (lambda x: jnp.flip(x)[0], [0, 0, 1]),
        (lambda x: (x[None] * jnp.ones((2, 1)))[:, 1], [0, 1, 0]),
        (lambda x: jnp.concatenate([x[1:], x[:1]]).reshape(3, 1).T[0, 2], [1, 0, 0]),
        (lambda x: (x * x)[1], [0, 1, 0]),
        (lambda x: UNRAVEL(x)["rate"], [0, 0, 1]),
        (jax.jit(lambda x: jnp.tanh(x)[0]), [1, 0, 0]),
        (lambda x: jax.lax.cond(x[0] > 0, lambda x: x[1], lambda x: x[2], x), [0, 1, 1]),
        (lambda x: jax.lax.scan(lambda c, _: (c * x[0], c), x[1], length=2)[0], [1, 1, 0]),
        (lambda x: optax.sgd(jnp.exp(x[2])).update(jnp.ones(2), (optax.EmptyState(),) * 2)[0],
         [0, 0, 1]),
        (jnp.sum, [1, 1, 1]),
        (lambda x: jnp.sort(x)[0], [1, 1, 1]),
    ],
)  # fmt: skip
def test_single_coordinates(function, expected):
    (found,) = depends_by_coordinate(function, jnp.arange(3.0))
    np.testing.assert_array_equal(found, np.array(expected, bool))


def test_a_large_leaf_is_followed_as_a_whole_and_an_empty_one_depends_on_nothing():
    x = {"large": jnp.ones(FOLLOWED + 1), "none": jnp.ones((0, 2)), "small": jnp.ones((2, 2))}

    def function(x):
        return x["large"][0] + x["none"].sum() + x["small"][0, 1]

    large, none, small = depends_by_coordinate(function, x)
    assert large.all()
    assert none.shape == (0, 2)
    np.testing.assert_array_equal(small, [[False, True], [False, False]])


def test_leaves_that_are_joined_and_parted_again_stay_apart():
    x = {"large": jnp.ones(FOLLOWED + 1), "other": jnp.ones((2, 2)), "unused": jnp.ones(3)}

    def function(x):
        vector, unravel = ravel_pytree(x)
        again = unravel(2 * vector)
        return again["large"].sum() + again["other"][1].sum()

    large, other, unused = depends_by_coordinate(function, x)
    assert large.all()
    np.testing.assert_array_equal(other, [[False, False], [True, True]])
    assert not unused.any()


def test_a_leaf_of_hundreds_of_elements_is_followed_one_by_one():
    (found,) = depends_by_coordinate(lambda x: x[3] + x[200], jnp.ones(300))
    np.testing.assert_array_equal(np.flatnonzero(found), [3, 200])


@jax.custom_jvp
def straight_through(x):
    """Rounds, and has the derivative of x."""
    return jnp.round(x)


straight_through.defjvp(lambda primals, tangents: (jnp.round(primals[0]), tangents[0]))
cube = jax.custom_vjp(lambda x: x**3)
cube.defvjp(lambda x: (x**3, x), lambda x, g: (3 * x * x * g,))


def test_a_leaf_that_is_followed_as_a_whole_costs_nothing_by_its_size():
    more_than_fits = jax.ShapeDtypeStruct((10**8, 10**4), np.float32)
    (found,) = depends_by_coordinate(jnp.sum, more_than_fits)
    assert found.shape == more_than_fits.shape
    assert found[0, 0]


@pytest.mark.parametrize("function", [straight_through, cube, jax.nn.softplus])
def test_a_custom_derivative_passes(function):
    assert depends_by_coordinate(lambda x: function(x)[1], jnp.ones(3))[0][1]
    assert not depends_by_coordinate(lambda x: jax.lax.stop_gradient(function(x)), 1.0)[0].any()


def test_values_behind_a_mutable_reference_are_taken_to_depend_on_everything():
    def function(x):
        ref = jax.new_ref(jnp.zeros(3))
        ref[...] = x
        return ref[...].sum()

    assert depends(function, jnp.ones(3)) == [True]


def test_large_arrays_are_not_followed_element_by_element():
    def function(x, y):
        return x["rate"] * y + x["none"][0]

    x, large = {"rate": jnp.ones(()), "none": jnp.ones(2)}, jnp.ones(2**20)
    assert depends(function, x, large) == [True, True]


def test_influences_tell_every_input_from_every_output():
    def function(w, s, lam):
        return {"a": w["a"] * lam, "b": w["b"] + s[0]}, (s[0] * 0.9, s[1] + 1)

    w, s = {"a": jnp.ones(2), "b": jnp.ones(2)}, (jnp.ones(2), jnp.int32(0))
    # Leaves: w.a, w.b, s[0], the count s[1], λ.
    assert influences(function, (w, s, jnp.ones(()))) == [{0, 4}, {1, 2}, {2}, set()]


def test_dependents_are_the_outputs_behind_an_argument():
    def function(x, other):
        return {"both": x["a"] * x["b"], "count": jnp.int32(x["a"] > 0), "other": 2 * other}

    argument = {"a": jnp.ones(()), "b": jnp.ones(3)}
    assert dependents(function, argument, jnp.ones(2)) == [True, False, False]
