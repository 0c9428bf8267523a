"""What `solve` keeps beside the last state: the best one, λ of every step; and when it stops."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradhpo
from gradhpo import Problem, Stop, solve
from tests.problems import assert_same_bits
from tests.small import BATCH, OPTIMIZERS, build, start, train_loss, val_loss

KEY = jax.random.key(7)
KEYS = jax.random.split(KEY, 3)
OPTIMIZER = build("one-step", outer=True)[0]


def valley(w, lam):
    """A metric that falls, and rises again: how far λ's decay is from where it passes."""
    return {"far": jnp.abs(lam["decay"] + 2.6), "nested": {"w": w, "l": lam["l"]}}


PROBLEM = Problem(start, train_loss, val_loss, lambda key: (BATCH, BATCH), metrics=valley)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_best_state_is_that_of_its_step(name):
    optimizer = build(name, outer=True)[0]
    found = solve(PROBLEM, optimizer, 20, KEY, eval_every=2, metric="far")
    at = int(found.eval_steps[np.argmin(found.evals["far"])])
    assert int(found.best.step) == at
    assert found.best.score == found.evals["far"].min()
    assert_same_bits(found.best.state, solve(PROBLEM, optimizer, at, KEY).state)


@pytest.mark.parametrize("mode", ["min", "max"])
def test_each_run_of_a_batch_has_its_own_best_and_a_resumed_run_the_same(mode):
    settings = {"eval_every": 3, "metric": "far", "mode": mode}
    whole = solve(PROBLEM, OPTIMIZER, 18, KEYS, **settings)
    part = solve(PROBLEM, OPTIMIZER, 9, KEYS, **settings)
    assert_same_bits(whole, solve(PROBLEM, OPTIMIZER, 18, KEYS, resume=part, **settings))
    best = getattr(np, f"arg{mode}")(whole.evals["far"], axis=0)
    np.testing.assert_array_equal(whole.best.step, whole.eval_steps[best])
    decays = whole.best.state.hyperparams["decay"]
    np.testing.assert_allclose(np.abs(decays + 2.6), whole.best.score, rtol=1e-6)


def test_a_score_that_is_no_number_is_never_the_best():
    def metrics(w, lam):
        return {"odd": jnp.where(lam["decay"] < -2.9, jnp.nan, -lam["decay"])}

    problem = dataclasses.replace(PROBLEM, metrics=metrics)
    found = solve(problem, OPTIMIZER, 12, KEY, eval_every=1, metric="odd", mode="max")
    assert np.isnan(found.evals["odd"][0])
    assert found.best.score == np.nanmax(found.evals["odd"])


def test_lambda_of_every_step_is_kept():
    found = solve(PROBLEM, OPTIMIZER, 11, KEY)
    assert set(found.record) == {"decay"}  # the scalar leaf
    assert found.record["decay"].shape == (11,)
    assert found.record["decay"][-1] == found.state.hyperparams["decay"]
    at_4 = solve(PROBLEM, OPTIMIZER, 4, KEY, record=[])
    assert at_4.record == {}
    assert found.record["decay"][3] == at_4.state.hyperparams["decay"]
    named = solve(PROBLEM, OPTIMIZER, 11, KEYS, record=["l"])
    assert named.record["l"].shape == (11, 3, 3)
    assert_same_bits(named.record["l"][-1], named.state.hyperparams["l"])

    def rate(lam):
        return {"rate": jnp.exp(lam["decay"])}

    part = solve(PROBLEM, OPTIMIZER, 5, KEY, record=rate)
    own = solve(PROBLEM, OPTIMIZER, 11, KEY, record=rate, resume=part)
    np.testing.assert_allclose(own.record["rate"], np.exp(found.record["decay"]), rtol=1e-6)


def test_metrics_may_be_a_tree_of_arrays():
    found = solve(PROBLEM, OPTIMIZER, 6, KEY, eval_every=2)
    assert found.evals["nested"]["w"].shape == (3, 3)
    assert_same_bits(found.evals["nested"]["w"][-1], found.state.params)
    assert solve(PROBLEM, OPTIMIZER, 6, KEYS).evals["nested"]["l"].shape == (1, 3, 3)


def patient_end(steps, scores, patience):
    """Where a loop of one's own would end: after so many evaluations without a new best, in all."""
    best, waited = np.full(scores.shape[1:], np.inf), np.zeros(scores.shape[1:], int)
    for step, score in zip(steps, scores, strict=True):
        waited = np.where(score < best, 0, waited + 1)
        best = np.minimum(best, score)
        if (waited >= patience).all():
            return step
    return steps[-1]


@pytest.mark.parametrize("key", [KEY, KEYS], ids=["one", "batch"])
@pytest.mark.parametrize("patience", [1, 3])
def test_patience(key, patience):
    settings = {"eval_every": 2, "metric": "far"}
    whole = solve(PROBLEM, OPTIMIZER, 60, key, **settings)
    patient = solve(PROBLEM, OPTIMIZER, 60, key, stop=Stop(patience=patience), **settings)
    assert 2 < patient.steps < 60
    assert patient.steps == patient_end(whole.eval_steps, whole.evals["far"], patience)
    assert_same_bits(patient.metrics["val_loss"], whole.metrics["val_loss"][: patient.steps])
    assert_same_bits(patient.evals["far"], whole.evals["far"][: len(patient.evals["far"])])


def test_target():
    settings = {"eval_every": 2, "metric": "far"}
    whole = solve(PROBLEM, OPTIMIZER, 40, KEY, **settings)
    near = solve(PROBLEM, OPTIMIZER, 40, KEY, stop=Stop(target=0.1), **settings)
    assert near.steps == whole.eval_steps[np.argmax(whole.evals["far"] <= 0.1)]
    assert 2 < near.steps < 40


def test_a_callback_sees_the_evaluation_and_stops():
    seen = []

    def callback(steps, state, evals):
        seen.append((steps, float(evals["far"])))
        return steps >= 6

    found = solve(PROBLEM, OPTIMIZER, 40, KEY, eval_every=2, callback=callback)
    assert found.steps == 6
    assert [steps for steps, _ in seen] == [2, 4, 6]
    np.testing.assert_array_equal([far for _, far in seen], found.evals["far"])
    whole = solve(PROBLEM, OPTIMIZER, 10, KEY, resume=found)
    assert_same_bits(whole.state, solve(PROBLEM, OPTIMIZER, 10, KEY).state)


@pytest.mark.parametrize("name", ["one-step", "hyperdistill"])
def test_fresh_episodes_start_from_new_weights(name, x64):
    """Each episode is a run from new weights, with λ and its optimizer going on."""

    def draw(key):
        return jax.random.normal(key, (3,)), start()[1]

    problem = Problem(draw, train_loss, val_loss, lambda key: (BATCH, BATCH))
    settings = {"T": 4, "estimation_period": 100} if name == "hyperdistill" else {}
    optimizer = build(name, outer=True, **settings)[0]
    found = solve(problem, optimizer, 12, KEY, episode_length=4, episode_init="fresh")
    firsts, state = [], optimizer.init(*problem.start(KEY))
    stream = gradhpo.problem.stream(KEY, "episodes")
    for episode in range(3):
        if name == "hyperdistill" and not episode:
            theta = optimizer.estimate_theta(state, [BATCH] * 4, BATCH, train_loss, val_loss)
            state = state.update(metadata={"theta": theta})
        for _ in range(4):
            state = optimizer.step(state, BATCH, BATCH, train_loss, val_loss)
        fresh = problem.start(jax.random.fold_in(stream, 4 * episode + 3))[0]
        firsts.append(fresh)
        state = optimizer.reset(state, fresh)
    assert len({tuple(w.tolist()) for w in firsts}) == 3
    np.testing.assert_allclose(found.state.params, firsts[-1], rtol=1e-12)
    for leaf, expected in zip(
        *map(jax.tree.leaves, (found.state.hyperparams, state.hyperparams)), strict=True
    ):
        np.testing.assert_allclose(leaf, expected, rtol=1e-9)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"metric": "accuracy"}, ValueError, r"metric must be one of .*'far'.*got 'accuracy'"),
        ({"metric": "nested"}, ValueError, "metric='nested' must be one number, got a tree"),
        ({"mode": "least"}, ValueError, 'mode must be "min" or "max"'),
        ({"stop": Stop(patience=1)}, ValueError, "stop needs eval_every"),
        ({"stop": 3, "eval_every": 1}, TypeError, r"stop must be a gradhpo.Stop, got 3"),
        ({"record": ["decai"]}, ValueError, "record has 'decai'; λ has 'decay', 'l'"),
        ({"record": lambda lam: lam["l"]}, TypeError, "record must return a dict of arrays"),
        ({"record": "decay"}, TypeError, "record must be a function .*, or a list of names"),
        ({"episode_init": "fresh"}, ValueError, "needs episode_length"),
        ({"episode_init": "new"}, ValueError, 'must be "reptile" or "fresh"'),
    ],
)
def test_mistakes_are_named(settings, error, message):
    with pytest.raises(error, match=message):
        solve(PROBLEM, OPTIMIZER, 4, KEY, **settings)


def test_a_stop_that_never_stops_is_refused():
    with pytest.raises(ValueError, match="Stop takes patience, target or both"):
        Stop()
    with pytest.raises(ValueError, match="patience"):
        Stop(patience=0)
