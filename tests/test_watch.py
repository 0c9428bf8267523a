"""What `solve` keeps beside the last state: the best one, λ of every step; and when it stops."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradhpo
from gradhpo import Problem, Stop, solve
from tests.problems import assert_close, assert_same_bits
from tests.quick import slow_but
from tests.small import BATCH, build, start, train_loss, val_loss

KEY = jax.random.key(7)
KEYS = jax.random.split(KEY, 3)
OPTIMIZER = build("one-step", outer=True)[0]


def valley(w, lam):
    """A metric that falls, and rises again: how far λ's decay is from where it passes."""
    return {"far": jnp.abs(lam["decay"] + 2.6), "nested": {"w": w, "l": lam["l"]}}


PROBLEM = Problem(start, train_loss, val_loss, lambda key: (BATCH, BATCH), metrics=valley)


@pytest.mark.parametrize("name", slow_but(["one-step", "hyperdistill"], "one-step"))
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


@pytest.mark.slow
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


@pytest.mark.parametrize("name", slow_but(["one-step", "hyperdistill"], "one-step"))
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
        if episode:
            firsts.append(problem.start(jax.random.fold_in(stream, 4 * episode))[0])
            state = optimizer.reset(state, firsts[-1])
        elif name == "hyperdistill":
            theta = optimizer.estimate_theta(state, [BATCH] * 4, BATCH, train_loss, val_loss)
            state = state.update(metadata={"theta": theta})
        for _ in range(4):
            state = optimizer.step(state, BATCH, BATCH, train_loss, val_loss)
    assert len({tuple(w.tolist()) for w in firsts}) == 2
    # What was trained, and scored, is what there is; the next start is made when it is needed.
    assert found.state.step == 4
    assert_close(found.state.params, state.params, rtol=1e-9)
    assert_close(found.state.hyperparams, state.hyperparams, rtol=1e-9)
    assert_close(found.phi, firsts[-1], rtol=1e-12)
    part = solve(problem, optimizer, 8, KEY, episode_length=4, episode_init="fresh")
    again = solve(problem, optimizer, 12, KEY, episode_length=4, episode_init="fresh", resume=part)
    assert_same_bits(again.state, found.state)


@pytest.mark.slow
def test_a_host_run_starts_its_episodes_anew_as_one_on_the_device():
    settings = {"episode_length": 4, "episode_init": "fresh"}
    optimizer = build("hyperdistill", outer=True, T=4, estimation_period=1)[0]
    on_device = solve(PROBLEM, optimizer, 12, KEY, **settings)
    host = dataclasses.replace(PROBLEM, batch=None, batches=[(BATCH, BATCH)] * 24)
    on_host = solve(host, optimizer, 12, KEY, **settings)
    assert_close(on_host.state.params, on_device.state.params, rtol=1e-5)
    assert_close(on_host.record["decay"], on_device.record["decay"], rtol=1e-5)


def test_another_metric_looks_for_the_best_anew():
    part = solve(PROBLEM, OPTIMIZER, 5, KEY, eval_every=5)
    found = solve(PROBLEM, OPTIMIZER, 20, KEY, eval_every=5, metric="far", resume=part)
    assert found.best.score == found.evals["far"][1:].min()
    assert (found.best.metric, found.best.mode) == ("far", "min")


@pytest.mark.slow
def test_the_best_of_a_diverged_run_is_before_that():
    def loss(w, lam, batch):
        return train_loss(w, lam, batch) + jnp.where(lam["decay"] < -2.85, 0, jnp.nan)

    problem = dataclasses.replace(PROBLEM, train_loss=loss, metrics=None)
    for key in (KEY, KEYS):
        with pytest.warns(gradhpo.DivergenceWarning):
            found = solve(problem, OPTIMIZER, 40, key)
        last = found.diverged_at - 1
        assert (last > 0).all()
        np.testing.assert_array_equal(found.best.step, last)
        rows = solve(problem, OPTIMIZER, int(np.max(last)), key).metrics["val_loss"]
        assert_same_bits(found.best.score, rows[np.max(last) - 1])


def test_what_a_resumed_run_keeps_must_stay_the_same():
    part = solve(PROBLEM, OPTIMIZER, 5, KEY)
    with pytest.raises(
        ValueError, match=r"record must be as in the run .*\['decay'\], got \['l'\]"
    ):
        solve(PROBLEM, OPTIMIZER, 9, KEY, record=["l"], resume=part)
    fewer = dataclasses.replace(PROBLEM, metrics=lambda w, lam: {"far": lam["decay"]})
    with pytest.raises(ValueError, match=r"Problem.metrics must be as in the run that is resumed"):
        solve(fewer, OPTIMIZER, 9, KEY, resume=part)


def test_a_state_by_hand_goes_on_without_rows():
    part = solve(PROBLEM, OPTIMIZER, 5, KEY)
    by_hand = gradhpo.Solution(part.state, {}, {}, np.zeros(0, int), 5, None, np.zeros((), int))
    found = solve(PROBLEM, OPTIMIZER, 9, KEY, resume=by_hand)
    assert_same_bits(found.state, solve(PROBLEM, OPTIMIZER, 9, KEY).state)
    assert found.best.score == found.metrics["val_loss"][-1]


def test_a_callback_may_answer_with_an_array():
    found = solve(
        PROBLEM,
        OPTIMIZER,
        40,
        KEY,
        eval_every=2,
        callback=lambda n, s: s.metadata["val_loss"] < 1e9,
    )
    assert found.steps == 2


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
        ({"record": 3}, TypeError, "record must be a function .*, got 3"),
        ({"lr_hyper": lambda t: 0.1}, ValueError, "exactly one of"),
        ({"record": "decay"}, TypeError, "record must be a function .*, or a list of names"),
        ({"episode_init": "fresh"}, ValueError, "needs episode_length"),
        ({"episode_init": "new"}, ValueError, 'must be "reptile" or "fresh"'),
    ],
)
def test_mistakes_are_named(settings, error, message):
    with pytest.raises(error, match=message):
        solve(PROBLEM, OPTIMIZER, 4, KEY, **settings)


def test_a_stop_that_never_stops_is_refused():
    with pytest.raises(ValueError, match="Stop takes patience, target or seconds"):
        Stop()
    with pytest.raises(ValueError, match="patience"):
        Stop(patience=0)


def test_a_rate_that_is_a_function_is_named_in_what_goes_wrong():
    optimizer = build("one-step")[0]
    with pytest.raises(jax.errors.TracerBoolConversionError) as raised:
        solve(PROBLEM, optimizer, 4, KEY, lr_hyper=lambda t: 0.1 if t < 2 else 0.0)
    assert any("lr_hyper, a function of the step" in note for note in raised.value.__notes__)
    with pytest.raises(ValueError, match=r"lr_hyper must return one number .* shape \(1,\)"):
        solve(PROBLEM, optimizer, 4, KEY, lr_hyper=lambda t: jnp.ones(1))


def test_things_of_the_wrong_kind_are_named():
    with pytest.raises(TypeError, match="optimizer must be a BilevelOptimizer, got Gradient"):
        solve(PROBLEM, build("one-step")[0].inner_optimizer, 4, KEY)
    with pytest.raises(TypeError, match="problem must be a Problem, got dict"):
        solve({}, OPTIMIZER, 4, KEY)
