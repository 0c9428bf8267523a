"""What goes wrong in the first ten minutes is told in the caller's words, and early."""

import functools
import re
import tomllib
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradhpo
from gradhpo import OneStepOptimizer, Problem
from gradhpo.cluster import doctor, settings
from gradhpo.errors import advice, shown
from gradhpo.parallel.compilations import CompileCounter
from tests.small import BATCH, INNER, OUTER, X, start, train_loss, val_loss
from tests.test_pages import ROOT
from tests.test_stopping import command

TUNER = OneStepOptimizer(INNER, OUTER)
KEY, WEIGHTS = jax.random.key(0), jnp.ones(3)


def draw(key):
    return BATCH, BATCH


PROBLEM = Problem(start, train_loss, val_loss, batch=draw)


def problem(**changed):
    return Problem(**{"init": start, "train_loss": train_loss, "val_loss": val_loss} | changed)


def solve(given=PROBLEM, tuner=TUNER, key=KEY, **more):
    return gradhpo.solve(given, tuner, 2, key, **more)


def solve_from(**changed):
    return solve(problem(**{"batch": draw} | changed))


def inner(make):
    return functools.partial(solve, tuner=OneStepOptimizer(make, OUTER))


def outer(optimizer):
    return functools.partial(solve, tuner=OneStepOptimizer(INNER, optimizer))


def constant_rate():
    """The rate is in λ, and the optimizer was built with a number."""

    def init(key):
        return start()[0], {"rate": jnp.asarray(0.1)}

    def loss(w, lam, batch):
        return val_loss(w, {"l": 0.0}, batch)

    solve_from(init=init, train_loss=loss, val_loss=loss)


def accuracy(w, lam, batch):
    return jnp.mean((batch[0] @ w > 0) == (batch[1] > 0))


WRONG = {
    "batch is arrays": (
        lambda: problem(batch=BATCH),
        "Problem.batch must be a function, got tuple: ([0] float32[12,3], [1] float32[12])",
    ),
    "batch is a size": (
        lambda: problem(batch=32),
        "Problem.batch must be a function, got int: 32",
    ),
    "no validation batch": (
        lambda: solve_from(batch=lambda key: (BATCH,)),
        "Problem.batch must return (train_batch, val_batch), got a tuple of 1",
    ),
    "init returns the weights alone": (
        lambda: solve_from(init=lambda key: jnp.ones(3)),
        "must return (params, hyperparams), or (params, hyperparams, model_state), got float32[3]",
    ),
    "the method was not called": (
        lambda: solve(tuner=OneStepOptimizer),
        "optimizer must be a BilevelOptimizer, got the class OneStepOptimizer: call it",
    ),
    "a rate for an optimizer": (
        lambda: OneStepOptimizer(0.05, OUTER),
        "inner_optimizer must be an optax.GradientTransformation or a function of the hyper",
    ),
    "an array for an optimizer": (
        lambda: OneStepOptimizer(INNER, X),
        "outer_optimizer must be an optax.GradientTransformation, got float32[12,3]",
    ),
    "a rate that λ was meant for": (
        constant_rate,
        "hyperparams['rate'] gets no hypergradient: neither the update of the weights nor "
        "val_loss_fn uses it (inner_optimizer would as a function: lambda lam: optax.sgd(",
    ),
    "λ by a wrong name": (
        inner(lambda lam: optax.sgd(lam["rate"])),
        "while tracing inner_optimizer, a function of the hyperparameters, with hyperparams (['d",
    ),
    "labels of another tree": (
        outer(optax.multi_transform({"a": OUTER}, {"rate": "a"})),
        "while tracing outer_optimizer.init with hyperparams (['decay'] float32[], ['l']",
    ),
    "an accuracy": (
        lambda: solve_from(val_loss=accuracy),
        "(is it an accuracy?). No hyperparameter would ever move",
    ),
    "many rates": (
        functools.partial(solve, tuner=OneStepOptimizer(INNER), lr_hyper=jnp.ones(3)),
        "lr_hyper must be a number, got float32[3]",
    ),
    "a rate that is none": (
        functools.partial(solve, tuner=OneStepOptimizer(INNER), lr_hyper="0.1"),
        "lr_hyper must be a number, got '0.1'",
    ),
    "NaN": (lambda: gradhpo.Stop(target=float("nan")), "target must be a number, got nan"),
    "a list of keys": (
        lambda: solve(key=[KEY, KEY]),
        "be an array of n such keys, got a list of 2: jnp.stack makes an array of them",
    ),
    "a callback of one": (
        lambda: solve(callback=lambda state: None),
        "callback must be a function of (steps, state, evals) or of (steps, state), got one of (st",
    ),
    "observers are a word": (
        lambda: solve(observers="csv=a.csv"),
        "got 'c': CSV(path) and the others of gradhpo.observers have one",
    ),
    "weights for a state": (
        lambda: TUNER.step(WEIGHTS, BATCH, BATCH, train_loss, val_loss),
        "as an optimizer's init or step returns it; got an array",
    ),
    "a module's activation": (
        lambda: solve_from(init=lambda key: ({"w": X, "f": jnp.tanh}, start()[1])),
        "(nnx.split, eqx.partition; gradhpo.FlaxModel and EquinoxModel do)",
    ),
    "a file for a folder": (
        lambda: solve(checkpoint=__file__),
        f"checkpoint must be the path of a folder, and {__file__!r} is a file",
    ),
    "a misspelled setting": (
        lambda: settings.read({"metrc": "val_loss"}, "a.toml"),
        "a.toml: unknown name 'metrc' (did you mean 'metric'?); a sweep has problem,",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_first_mistake_is_named_before_anything_compiles(name):
    call, words = WRONG[name]
    with CompileCounter() as compiled, pytest.raises(Exception) as caught:  # noqa: PT011
        call()
    text = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", ())])
    assert words in text
    assert len(text) < 1000
    assert compiled.count == 0


def test_a_value_is_shown_short():
    assert shown(0.5) == "0.5"
    assert shown("a" * 100) == "'" + "a" * 78 + "…"
    assert shown({"a": np.zeros((2, 3)), "b": 1}) == "(['a'] float64[2,3], ['b'] int)"
    assert shown(np.float32(2)) == "np.float32(2.0)"


def test_a_run_that_is_not_finite_says_what_fits_it():
    state = TUNER.init(*start())
    assert "look at the batch" in advice("val_loss", 1, state)
    assert advice("val_loss", 2, state) == "Lower the learning rates, or clip"
    assert "learning rates are too high" in advice("hypergrad_norm", 2, state)
    half = state.update(params=state.params.astype(jnp.float16))
    assert "Adam's eps is 0" in advice("val_loss", 2, half)


@pytest.fixture(scope="module")
def solution():
    return solve(eval_every=1)


def test_a_solution_is_printed_in_a_few_lines(solution):
    text = repr(solution)
    assert text.startswith("Solution: 2 steps\n")
    assert f"\n  train_loss {solution.metrics['train_loss'][-1]:.6g}\n" in text
    assert f"\n  best val_loss {solution.best.score:.6g}\n" in text
    assert len(text) < 500
    shapes = jax.eval_shape(lambda: solution)
    assert repr(shapes).endswith("whose arrays have no values here")


def test_several_runs_and_a_divergence_are_printed(solution):
    run = solution.best.state.metadata
    pair = {name: np.stack([x, x + 1], axis=1) for name, x in solution.metrics.items()}
    both = gradhpo.Solution(run, pair, {}, np.zeros(0, int), 2, None, np.array([0, 2]))
    low = solution.metrics["val_loss"][-1]
    assert f"\n  val_loss from {low:.6g} to {low + 1:.6g}\n" in repr(both)
    assert repr(both).startswith("Solution: 2 steps of 2 runs\n")
    assert repr(both).endswith("\n  diverged: 1 of 2")


def test_nothing_was_recorded(solution):
    with pytest.raises(
        ValueError, match=r"nothing was \(solve\(record=…\) says what\); got 'rate'"
    ):
        gradhpo.Solution(*[None] * 7).schedule("rate")
    with pytest.raises(ValueError, match="what was recorded, 'decay'; got 'rate'"):
        solution.schedule("rate")


def test_the_doctor_knows_the_packages_of_every_extra():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extra, needed in extras["optional-dependencies"].items():
        if extra in ("test", "lint", "docs", "examples"):
            continue
        names = {re.split(r"[\[<>=]", one)[0] for one in needed} - {"gradhpo"}
        names -= {"ray"} if extra == "tune" else set()  # which the cluster's line has
        assert names == set(doctor.EXTRAS[extra]), extra


def test_the_command_says_its_version_and_what_is_no_file(tmp_path):
    assert command("--version") == (f"gradhpo {gradhpo.__version__}\n", 0)
    (tmp_path / "a.toml").write_text("import jax")
    said, status = command("sweep", tmp_path / "a.toml")
    assert "a.toml is not TOML: Expected '='" in said
    assert status == 1


def test_a_float16_run_says_that_it_is_float16():
    def init(key):
        return jax.tree.map(lambda x: x.astype(jnp.float16), start())

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        solve_from(init=init)
    assert any("float16 ends at" in str(one.message) for one in told)
