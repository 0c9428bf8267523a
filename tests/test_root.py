"""gradhpo.root against closed forms, in float64: both modes, jit, vmap, aux, trees."""

import functools
import sys

import jax
import jax.numpy as jnp
import lineax
import numpy as np
import pytest

from gradhpo import root
from tests.quick import slow_but

pytestmark = pytest.mark.usefixtures("x64")

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(8, 3)), RNG.normal(size=8)
SOLVERS = {
    "direct": {},
    "cg": {
        "linear_solver": lineax.CG(rtol=1e-12, atol=1e-12),
        "tags": lineax.positive_semidefinite_tag,
    },
    "gmres": {"linear_solver": lineax.GMRES(rtol=1e-12, atol=1e-12)},
}


def ridge_loss(w, penalty, x, y):
    return jnp.sum((x @ w - y) ** 2) / 2 + penalty * jnp.sum(w**2) / 2


def ridge(**settings):
    @root.custom_root(jax.grad(ridge_loss), **settings)
    def solve(init, penalty, x, y):
        del init
        system = x.T @ x + penalty * jnp.eye(3)
        return jax.lax.stop_gradient(jnp.linalg.solve(system, x.T @ y))  # no derivative of its own

    return solve


def in_numpy(penalty):
    """The solution, its derivatives in the penalty and in y, and the system's matrix."""
    system = X.T @ X + penalty * np.eye(3)
    w = np.linalg.solve(system, X.T @ Y)
    return w, -np.linalg.solve(system, w), np.linalg.solve(system, X.T), system


@pytest.mark.parametrize("name", slow_but(SOLVERS, "direct"))
def test_ridge_regression_has_the_closed_form_s_derivatives_in_both_modes(name):
    solve = functools.partial(ridge(**SOLVERS[name]), None)
    both = jax.jit(lambda p, y: [d(solve, (0, 2))(p, X, y) for d in (jax.jacrev, jax.jacfwd)])
    for found in both(0.7, Y):
        for part, expected in zip(found, in_numpy(0.7)[1:3], strict=True):
            np.testing.assert_allclose(part, expected, rtol=1e-8)


@pytest.mark.slow
def test_second_derivatives():
    solve = ridge()
    found = jax.jit(jax.hessian(lambda p: jnp.sum(solve(None, p, X, Y) ** 2)))(0.7)
    w, first, _, system = in_numpy(0.7)
    second = -2 * np.linalg.solve(system, first)
    np.testing.assert_allclose(found, 2 * (first @ first + w @ second), rtol=1e-10)


@pytest.mark.slow
def test_many_problems_at_once():
    solve = ridge()
    penalties = np.asarray([0.1, 1.0, 10.0])
    gradient = jax.jit(jax.vmap(jax.grad(lambda p: jnp.sum(solve(None, p, X, Y)))))(penalties)
    np.testing.assert_allclose(gradient, [in_numpy(p)[1].sum() for p in penalties], rtol=1e-10)


def affine(x, params):
    """A contraction of two leaves that are not symmetric in one another."""
    return {
        "a": 0.4 * jnp.sin(x["b"]) + params["shift"],
        "b": 0.3 * x["a"] * params["scale"] + 0.1 * x["b"] ** 2,
    }


@root.custom_fixed_point(affine, has_aux=True)
def iterate(init, params, most=200):
    def goes_on(carry):
        x, before, count = carry
        far = jnp.abs(x["a"] - before["a"]).max() + jnp.abs(x["b"] - before["b"]).max()
        return (count < most) & (far > 1e-14)

    def step(carry):
        x, _, count = carry
        return affine(x, params), x, count + 1

    far = jax.tree.map(lambda x: x + 1.0, init)
    x, _, count = jax.lax.while_loop(goes_on, step, (init, far, 0))
    return x, {"count": count, "norm": jnp.sum(x["a"] ** 2)}


PARAMS = {"shift": np.asarray([0.2, -0.3]), "scale": np.asarray([0.5, 1.5])}
ZERO = {"a": np.zeros(2), "b": np.zeros(2)}


@pytest.mark.slow
def test_a_fixed_point_of_a_tree_with_aux_has_both_modes_and_its_start_no_derivative():
    # A `while_loop` has no reverse mode of its own.
    def by_steps(params):
        return jax.lax.fori_loop(0, 60, lambda _, x: affine(x, params), ZERO)

    def everything(params):
        def solve(params):
            return iterate(ZERO, params)[0]

        def from_elsewhere(start):
            x, aux = iterate(jax.tree.map(lambda x: x + start, ZERO), params)
            return jnp.sum(x["a"]) + aux["norm"]

        none = (
            jax.grad(from_elsewhere)(0.1),
            jax.grad(lambda p: iterate(ZERO, p)[1]["norm"])(params),
        )
        found = [jax.jacrev(solve)(params), jax.jacfwd(solve)(params)]
        return iterate(ZERO, params), none, found, jax.jacfwd(by_steps)(params)

    (x, aux), none, found, expected = jax.jit(everything)(PARAMS)
    assert 5 < aux["count"] < 60
    close = functools.partial(np.testing.assert_allclose, rtol=1e-9)
    jax.tree.map(close, x, by_steps(PARAMS))
    for jacobian in found:
        jax.tree.map(close, jacobian, expected)
    assert all(not leaf.any() for leaf in jax.tree.leaves(none))


@pytest.mark.slow
def test_arguments_by_keyword_and_numbers_that_stay_python_s():
    @root.custom_fixed_point(lambda x, theta, power, kind: 0.5 * x**power + theta)
    def solve(init, theta, power, kind):
        assert kind == "plain"
        x = init
        for _ in range(40 * power):  # an integer of Python's, though a derivative is taken
            x = 0.5 * x**power + theta
        return x

    # x = 2θ.
    by_place = jax.jit(jax.grad(lambda t: solve(jnp.zeros(()), t, 1, "plain")))(0.3)
    by_name = jax.jit(jax.grad(lambda t: solve(jnp.zeros(()), kind="plain", theta=t, power=1)))(0.3)
    np.testing.assert_allclose([by_place, by_name], 2, rtol=1e-10)


@pytest.mark.slow
def test_a_quadratic_program_by_projected_gradient():
    # min ½‖x - θ‖²_Q under 0 ≤ x ≤ 1, by its projected gradient's fixed point.
    q = jnp.asarray([[2.0, 0.3], [0.3, 1.0]])

    def step(x, theta):
        return jnp.clip(x - 0.3 * q @ (x - theta), 0, 1)

    @root.custom_fixed_point(step)
    def solve(init, theta):
        return jax.lax.fori_loop(0, 200, lambda _, x: step(x, theta), init)

    def everything(theta):
        of_theta = functools.partial(solve, jnp.zeros(2))
        return of_theta(theta), jax.jacrev(of_theta)(theta), jax.jacfwd(of_theta)(theta)

    x, *jacobians = jax.jit(everything)(jnp.asarray([0.4, 2.0]))
    # The second is at its bound; the first then minimizes q00 (x - θ0)² / 2 + q01 (x - θ0)(1 - θ1).
    np.testing.assert_allclose(x, [0.4 + 0.15, 1.0], rtol=1e-10)
    for jacobian in jacobians:
        np.testing.assert_allclose(jacobian, [[1.0, 0.15], [0.0, 0.0]], atol=1e-10)


def test_what_is_refused_is_named():
    with pytest.raises(TypeError, match="optimality_fun must be a function"):
        root.custom_root(3)
    with pytest.raises(TypeError, match="decorated solver must be a function"):
        root.custom_root(lambda x: x)(3)

    def zero(**settings):
        return root.custom_root(lambda x, *args: (x, x), **settings)

    other_tree = zero()(lambda init, theta: init)
    with pytest.raises(ValueError, match="optimality_fun's result"):
        jax.grad(lambda theta: other_tree(jnp.zeros(()), theta))(1.0)
    with pytest.raises(TypeError, match=r"the solution x.*floating"):
        zero()(lambda init: init)(jnp.zeros((), int))
    with pytest.raises(TypeError, match=r"must return \(x, aux\), got"):
        zero(has_aux=True)(lambda init: init)(jnp.zeros(()))
    with pytest.raises(TypeError, match="got theta by keyword only"):
        zero()(lambda init, *, theta: init)(jnp.zeros(()), theta=1.0)


def test_without_lineax_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lineax", None)
    with pytest.raises(ImportError, match=r"gradhpo\[root\]"):
        root.custom_fixed_point(lambda x: x)
