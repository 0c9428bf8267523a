"""An exception in a function of the user's says which one, and on what shapes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradhpo
from gradhpo.cluster import SearchSpace, Sweep, uniform
from gradhpo.parallel import Population
from gradhpo.parallel.compilations import CompileCounter
from tests.small import BATCH, INNER, OUTER, start, train_loss, val_loss

KEY = jax.random.key(0)
OPTIMIZER = gradhpo.OneStepOptimizer(INNER, OUTER)
ROWS = np.ones((12, 3), np.float32)


class OwnError(Exception):
    """A user's."""


def fails(*args):
    raise OwnError("on purpose")


def draw(key, data):
    return BATCH, data


PROBLEM = gradhpo.Problem(
    start,
    train_loss,
    val_loss,
    batch=draw,
    data=lambda key: BATCH,
    metrics=lambda w, lam, data: {"first": w[0]},
)
LAM = r"\(\['decay'\] float32\[\], \['l'\] float32\[3\]\)"
PAIR = r"\(\[0\] float32\[12,3\], \[1\] float32\[12\]\)"
LOSS = rf"params \(float32\[3\]\), hyperparams {LAM}"
NOTES = {
    "init": r"Problem.init with key \(key<fry>\[\]\)",
    "train_loss": rf"train_loss_fn \(Problem.train_loss\) with {LOSS}, train_batch {PAIR}",
    "val_loss": rf"val_loss_fn \(Problem.val_loss\) with {LOSS}, val_batch {PAIR}",
    "batch": rf"Problem.batch with key \(key<fry>\[\]\), data {PAIR}",
    "data": r"Problem.data with key \(key<fry>\[\]\)",
    "metrics": rf"Problem.metrics with params \(float32\[3\]\), hyperparams {LAM}, data {PAIR}",
}


def solve(problem, folder):
    gradhpo.solve(problem, OPTIMIZER, 2, KEY, progress=False)


def population(problem, folder):
    trials = Population(problem, OPTIMIZER, 2, batching="vmap")
    trials.run(trials.init(KEY), 2, jax.random.split(KEY, 2))


def sweep(problem, folder):
    space = SearchSpace(hyperparams={"decay": uniform(-4, -2)})
    settings = {"population": 2, "generations": 1, "steps_per_generation": 1, "batching": "vmap"}
    settings |= {"executor": "local", "progress": False, "storage": folder}
    Sweep(problem=problem, optimizer=OPTIMIZER, space=space, **settings).run()


def notes(error):
    return "\n".join(getattr(error, "__notes__", []))


@pytest.mark.parametrize(
    ("run", "name"),
    [(run, name) for run in (solve, sweep) for name in NOTES]
    + [(population, name) for name in NOTES if name != "metrics"],
)
def test_the_function_that_raised_is_named(run, name, tmp_path):
    problem = dataclasses.replace(PROBLEM, **{name: fails})
    with pytest.raises(OwnError) as caught:
        run(problem, tmp_path)
    told = notes(caught.value)
    assert told.count("while tracing") == 1
    with pytest.raises(RuntimeError, match=NOTES[name]):
        raise RuntimeError(told)


@pytest.mark.parametrize("name", ["train_loss", "val_loss"])
def test_a_loss_of_step_is_named(name):
    losses = {"train_loss": train_loss, "val_loss": val_loss} | {name: fails}
    state = OPTIMIZER.init(*start())
    with pytest.raises(OwnError) as caught:
        OPTIMIZER.step(state, BATCH, BATCH, *losses.values())
    assert f"while tracing {name}_fn (Problem.{name}) with params" in notes(caught.value)


def test_a_batch_of_the_wrong_kind_is_described_where_the_loss_fails():
    problem = dataclasses.replace(PROBLEM, batch=lambda key, data: BATCH)  # inputs and targets
    with pytest.raises(ValueError, match="too many values to unpack") as caught:
        solve(problem, None)
    assert "train_batch (float32[12,3])" in notes(caught.value)


def test_indexing_numpy_by_a_traced_index_says_what_to_do():
    def indexing(key, data):
        return ROWS[jax.random.randint(key, (4,), 0, 12)], data

    with pytest.raises(jax.errors.TracerArrayConversionError) as caught:
        solve(dataclasses.replace(PROBLEM, batch=indexing), None)
    assert "while tracing Problem.batch" in notes(caught.value)
    assert "index jnp arrays, for example what Problem.data returns" in notes(caught.value)


def test_large_trees_are_not_told_in_full():
    def init(key):
        return {f"layer{i}": jnp.ones(2) for i in range(20)}, start()[1]

    with pytest.raises(OwnError) as caught:
        solve(dataclasses.replace(PROBLEM, init=init, train_loss=fails, metrics=None), None)
    assert "['layer15'] float32[2], and 12 more leaves)" in notes(caught.value)


@pytest.mark.parametrize("run", [solve, sweep])
@pytest.mark.parametrize(
    ("metrics", "got"),
    [
        (lambda w, lam, data: w, r"float32\[3\]"),
        (lambda w, lam, data: (w, w), "a tuple of 2"),
        (lambda w, lam, data: None, "NoneType"),
        (lambda w, lam, data: {0: w[0]}, "names that are not strings"),
    ],
    ids=["array", "tuple", "nothing", "numbered"],
)
def test_metrics_must_be_named(run, metrics, got, tmp_path):
    problem = dataclasses.replace(PROBLEM, metrics=metrics)
    message = f"Problem.metrics must return a dict of arrays by name, got {got}"
    with pytest.raises(TypeError, match=message):
        run(problem, tmp_path)


def test_metrics_are_checked_before_the_run_compiles():
    problem = dataclasses.replace(PROBLEM, metrics=lambda w, lam, data: w)
    with CompileCounter() as compiled, pytest.raises(TypeError, match=r"Problem\.metrics must"):
        solve(problem, None)
    assert compiled.count <= 1  # of the key
