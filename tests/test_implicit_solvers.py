"""The solvers of implicit differentiation against closed forms, in float64; warm starts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradhpo
from gradhpo.fingerprint import settings
from gradhpo.nystrom import nystrom
from gradhpo.parallel import Population, data_parallel, make_mesh
from tests import problems
from tests.problems import Exact
from tests.quick import slow_but
from tests.small import BATCH, start, train_loss, val_loss

pytestmark = pytest.mark.usefixtures("x64")

ROWS, VAL = problems.TRAIN[0], problems.VAL
LOSSES = (problems.quadratic_train, problems.quadratic_val)
RHO = 0.7
KEY = jax.random.key(0)
WARM = {"solver": "nystrom", "K": 2, "damping": 0.1, "warm_start": True}
TUNER = gradhpo.ImplicitOptimizer(optax.sgd(0.05), optax.sgd(0.1), **WARM)
PROBLEM = gradhpo.Problem(start, train_loss, val_loss, lambda key: (BATCH, BATCH))


def implicit(**given):
    return gradhpo.ImplicitOptimizer(optax.sgd(0.0), **given)


def of_ridge(rho):
    """The hypergradient at the first weights with `(H + ρI)⁻¹`."""
    w, lam = problems.W0, problems.LAM0
    ridge = problems.G + np.diag(lam) + rho * np.eye(problems.N)
    x = np.linalg.solve(ridge, Exact.alpha(w, lam, VAL))
    return Exact.direct(w, lam) + x @ Exact.dphi_dlam(w, ROWS) / problems.LR


@pytest.mark.parametrize(
    "given",
    [
        {"solver": "cg"},
        pytest.param({"solver": "neumann", "K": 400, "neumann_rate": 0.2}, marks=pytest.mark.slow),
        {"solver": "nystrom", "K": problems.N},
    ],
    ids=["cg", "neumann", "nystrom"],
)
def test_a_ridge_is_that_of_each_solver(given):
    optimizer = implicit(damping=RHO, **given)
    state = optimizer.init(problems.W0, problems.LAM0)
    found = optimizer.compute_hypergradient(state, ROWS, VAL, *LOSSES)
    problems.assert_close(found, of_ridge(RHO), rtol=1e-9)


@pytest.mark.slow
def test_nystrom_is_exact_for_a_hessian_of_its_rank_in_trees_and_batches():
    rng = np.random.default_rng(0)
    root = rng.normal(size=(20, 2))
    hessian = root @ root.T

    def apart(v):
        return {"a": v[:12].reshape(3, 4), "b": v[12:]}

    def product(tree):
        return apart(hessian @ jnp.concatenate([tree["a"].ravel(), tree["b"]]))

    b = rng.normal(size=(3, 20))
    expected = np.linalg.solve(hessian + RHO * np.eye(20), b.T).T
    solve = jax.jit(jax.vmap(lambda b: nystrom(product, apart(b), 5, RHO, KEY)))
    found = solve(jnp.asarray(b))  # of rank 5: three directions are rounding
    problems.assert_close(found, jax.vmap(apart)(jnp.asarray(expected)), rtol=1e-8)


@pytest.mark.slow
def test_nystrom_takes_negative_curvature_for_none():
    values, b = np.linspace(-3.0, 3.0, 8), np.ones(8)

    @jax.jit
    def solve(values, key):
        return nystrom(lambda v: values * v, jnp.asarray(b), 4, 0.1, key)

    for seed in range(5):
        x = np.asarray(solve(values, jax.random.key(seed)))
        # (H_k + ρI)⁻¹ with a positive H_k: no longer than b/ρ, and not turned round.
        assert np.linalg.norm(x) <= np.linalg.norm(b) / 0.1
        assert x @ b > 0
    np.testing.assert_allclose(solve(0 * values, KEY), b / 0.1)


@pytest.mark.parametrize(
    "given",
    slow_but(
        [
            {"K": 1},
            {"solver": "neumann", "K": 2, "neumann_rate": 0.2},
            {"solver": "nystrom", "K": 2},
        ]
    ),
    ids=["cg", "neumann", "nystrom"],
)
def test_a_warm_start_goes_on_from_the_step_before(given):
    optimizer = implicit(damping=RHO, warm_start=True, **given)
    state = optimizer.init(problems.W0, problems.LAM0)
    errors = []
    for _ in range(25):
        found = optimizer.compute_hypergradient(state, ROWS, VAL, *LOSSES)
        errors.append(np.linalg.norm(found - of_ridge(RHO)))
        state = optimizer.step(state, ROWS, VAL, *LOSSES, 0.0)  # nothing moves but the solution
    assert errors[0] > 1e-3
    assert errors[-1] < 1e-3 * errors[0]
    assert state.metadata["solution"].shape == problems.W0.shape


@pytest.mark.slow
def test_a_solution_that_is_worse_than_none_is_dropped():
    optimizer = implicit(K=1, warm_start=True)
    state = optimizer.init(problems.W0, problems.LAM0)
    cold = optimizer.compute_hypergradient(state, ROWS, VAL, *LOSSES)
    for bad in (1e6, np.nan):
        stale = state.update(metadata={"solution": jnp.full(problems.N, bad)})
        found = optimizer.compute_hypergradient(stale, ROWS, VAL, *LOSSES)
        problems.assert_same_bits(found, cold)


@pytest.mark.slow
def test_a_run_with_warm_starts_is_resumed_to_the_bit(tmp_path):
    whole = gradhpo.solve(PROBLEM, TUNER, 4, KEY)
    half = gradhpo.solve(PROBLEM, TUNER, 2, KEY)
    half.save(tmp_path / "half")
    read = gradhpo.Solution.load(tmp_path / "half", PROBLEM, TUNER)
    rest = gradhpo.solve(PROBLEM, TUNER, 4, KEY, resume=read)
    problems.assert_same_bits(rest.state.metadata["solution"], whole.state.metadata["solution"])
    problems.assert_same_bits(rest.state.hyperparams, whole.state.hyperparams)


def test_runs_from_before_there_was_a_ridge_are_of_the_same_optimizer():
    before = "ImplicitOptimizer(K=10, batches='repeat', solver='cg', unroll_steps=1)"
    assert settings(implicit()) == before
    assert "damping=0.5" in settings(implicit(damping=0.5))
    assert "warm_start=True" in settings(implicit(warm_start=True))


def test_a_state_without_a_solution_is_refused_by_name():
    state = implicit().init(problems.W0, problems.LAM0)
    with pytest.raises(ValueError, match="lacks 'solution'"):
        implicit(warm_start=True).compute_hypergradient(state, ROWS, VAL, *LOSSES)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"damping": -1}, ValueError, r"damping must be a number in \[0, inf\], got -1"),
        ({"solver": "nystrom"}, ValueError, "needs a damping above 0, got 0"),
        ({"warm_start": 1}, TypeError, "warm_start must be True or False, got 1"),
    ],
)
def test_bad_settings(given, error, message):
    with pytest.raises(error, match=message):
        implicit(**given)


@pytest.mark.slow
def test_four_devices_keep_the_solution_of_one():
    optimizer = gradhpo.ImplicitOptimizer(optax.sgd(0.05), unroll_steps=2, **WARM)
    batch = jax.tree.map(np.float64, BATCH)
    states = []
    for one in (optimizer, data_parallel(optimizer, make_mesh(data=4))):
        state = one.init(*jax.tree.map(lambda x: np.asarray(x, float), start()))
        for _ in range(3):
            state = one.step(state, batch, batch, train_loss, val_loss, 0.1)
        states.append(state)
    problems.assert_close(states[1].metadata["solution"], states[0].metadata["solution"], 1e-9)
    problems.assert_close(states[1].hyperparams, states[0].hyperparams, 1e-9)


@pytest.mark.slow
def test_each_slot_of_a_population_has_a_solution_of_its_own():
    population = Population(PROBLEM, TUNER, 2, batching="vmap")
    keys = jax.random.split(KEY, 2)
    state, _ = population.run(population.init(keys), 3, keys)
    alone = gradhpo.solve(PROBLEM, TUNER, 3, keys[1]).state.metadata["solution"]
    np.testing.assert_allclose(state.metadata["solution"][1], alone, rtol=1e-4)
    assert not np.allclose(*state.metadata["solution"])
    copied = population.select(state, [1, 1])
    problems.assert_same_bits(*copied.metadata["solution"])
