"""Numbers that Python or NumPy draws in `Problem.batch` are told, and nothing else is."""

import itertools
import random
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradhpo import FrozenWarning, Problem, solve
from gradhpo.frozen import check_frozen
from gradhpo.parallel import Population
from tests.quick import slow_but
from tests.small import X, Y, build, start, train_loss, val_loss

KEY = jax.random.key(0)
COUNT = itertools.count(1)


def asked(batch, data=None):
    problem = Problem(start, train_loss, val_loss, batch=batch, data=data)
    check_frozen(problem, KEY, problem.start_data(KEY))


@pytest.mark.parametrize(
    "factor",
    [
        lambda: np.random.default_rng().random(X.shape, np.float32),
        lambda: float(np.random.default_rng().random()),
        random.random,
        lambda: next(COUNT),
        lambda: jax.random.key_data(jax.random.key(next(COUNT)))[1],
    ],
    ids=["array", "number", "random", "counter", "key"],
)
def test_what_is_drawn_at_tracing_is_told_once(factor):
    def batch(key):
        return (X * jnp.asarray(factor()), Y), (X, Y)

    with pytest.warns(FrozenWarning, match=r"Problem\.batch is not the same .* np\.random"):
        asked(batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        asked(batch)


HOLES = np.where(np.arange(36).reshape(12, 3) % 5, X, np.nan)


@pytest.mark.parametrize(
    "rows",
    [
        lambda key: jnp.asarray(HOLES),
        lambda key: jax.nn.relu(X) + jax.random.normal(key, X.shape),
        lambda key: X + jax.random.normal(jax.random.fold_in(jax.random.key(3), 1), X.shape),
        lambda key: X + np.random.default_rng(0).normal(size=X.shape),
        lambda key: jax.pure_callback(lambda: X, jax.ShapeDtypeStruct(X.shape, X.dtype)),
        lambda key: jax.lax.cond(key[None].size > 0, lambda: X, lambda: -X),
    ],
    ids=["nan", "custom_jvp", "own key", "seeded", "callback", "branch"],
)
def test_what_does_not_change_is_not_told(rows):
    asked(lambda key: ((rows(key), Y), (X, Y)))


def test_data_are_arguments():
    asked(lambda key, data: (data, data), lambda key: (jax.random.normal(key, X.shape), Y))


def in_a_population(problem, optimizer):
    trials = Population(problem, optimizer, 2, batching="vmap")
    trials.run(trials.init(KEY), 1, jax.random.split(KEY, 2))


@pytest.mark.parametrize(
    "run",
    slow_but(
        [
            lambda problem, optimizer: solve(problem, optimizer, 1, KEY),
            lambda problem, optimizer: solve(problem, optimizer, 1, jax.random.split(KEY, 2)),
            in_a_population,
        ],
        in_a_population,
    ),
    ids=["solve", "keys", "population"],
)
def test_every_run_asks(run):
    def batch(key):
        return (X * np.random.default_rng().random(), Y), (X, Y)

    problem = Problem(start, train_loss, val_loss, batch=batch)
    with pytest.warns(FrozenWarning):
        run(problem, build("first-order", outer=True)[0])
