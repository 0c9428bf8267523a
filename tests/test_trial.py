"""One trial is written once: `solve`, a `Population` and a `Sweep` of one trial are equal."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradhpo
from gradhpo.cluster import SearchSpace, Sweep, trial_key
from gradhpo.parallel import Population
from gradhpo.timetable import Timetable
from tests.problems import assert_close, assert_same_bits
from tests.quick import slow_but
from tests.small import X, Y, build, start, train_loss, val_loss

STEPS, T = 24, 4


def batch(key):
    rows = jax.random.permutation(key, 12)[:8]
    x, y = jnp.asarray(X), jnp.asarray(Y)
    return (x[rows], y[rows]), (x[:8], y[:8])


PROBLEM = gradhpo.Problem(
    start, train_loss, val_loss, batch=batch, metrics=lambda w, lam: {"first": w[0]}
)


def remembering_train(w, lam, batch, *, model_state, key):
    """With noise on the weights, and a running mean of the rows."""
    noise = 0.1 * jax.random.normal(key, w.shape)
    new = 0.9 * model_state + 0.1 * batch[0].mean(0)
    aux = gradhpo.Aux(model_state=new, metrics={"noise": noise.sum()})
    return train_loss(w + noise, lam, batch), aux


def remembering_val(w, lam, batch, *, model_state):
    x, y = batch
    return val_loss(w, lam, (x - model_state, y))


REMEMBERING = gradhpo.Problem(
    lambda key: (*start(key), jnp.zeros(3)),
    remembering_train,
    remembering_val,
    batch=batch,
    metrics=lambda w, lam, *, model_state: {"first": w[0] + model_state[0]},
)


def falling(step):
    """A rate that falls with the trial's step."""
    return 0.05 * 0.9 ** (step / 4)


def made(name):
    settings = {"T": T, "estimation_period": 2} if name == "hyperdistill" else {}
    return build(name, **settings)[0]


def solved(optimizer, key, steps=STEPS, problem=PROBLEM, **settings):
    rate = {} if optimizer.outer_optimizer else {"lr_hyper": falling}
    return gradhpo.solve(problem, optimizer, steps, key, **rate, **settings)


def trials_state(state):
    """A population's one slot, without what a `solve` does not count."""
    slot = jax.tree.map(lambda x: np.asarray(x)[0], jax.device_get(state))
    kept = {n: v for n, v in slot.metadata.items() if n not in ("trial_step", "diverged_at")}
    return dataclasses.replace(slot, metadata=kept)


EPISODES = {
    "no": {},
    "remembering": {"episode_length": T, "lr_reptile": 0.5},
    "reptile": {"episode_length": T, "lr_reptile": 0.5},
    "fresh": {"episode_length": T, "episode_init": "fresh"},
}


# By the sweep's door too: one with a model state, one with an outer optimizer, and one that
# calibrates and averages.
SWEPT = [("one-step", "remembering"), ("greedy", "reptile"), ("hyperdistill", "reptile")]


@pytest.mark.parametrize(
    ("name", "kind"),
    slow_but(
        [
            *SWEPT,
            # Whose step has branches and loops of its own.
            *((name, "reptile") for name in ("t1t2", "drmad", "implicit")),
            # Without episodes there is less to do; who calibrates does it otherwise.
            *(("hyperdistill", "no"), ("one-step", "fresh")),
        ],
        ("one-step", "remembering"),
        # And HyperDistill in `test_host`, on pairs from the host.
        compiler=[("greedy", "reptile"), ("one-step", "fresh")],
    ),
)
def test_one_trial_is_the_same_at_every_door(name, kind, tmp_path):
    optimizer, key, episodes = made(name), trial_key(3, 0), EPISODES[kind]
    problem = REMEMBERING if kind == "remembering" else PROBLEM
    solution = solved(optimizer, key, problem=problem, **episodes)

    trials = Population(problem, optimizer, 1, batching="map", **episodes)
    rate = () if optimizer.outer_optimizer else (falling,)
    states, rows = [trials.init(key[None])], []
    for _ in range(3):
        state, row = trials.run(states[-1], STEPS // 3, key[None], *rate)
        states.append(state)
        rows.append(row)
    assert_same_bits(trials_state(states[-1]), jax.device_get(solution.state))
    for metric in rows[0]:
        of_slot = np.concatenate([row[metric][:, 0] for row in rows])
        assert_same_bits(of_slot, solution.metrics[metric])

    if (name, kind) not in SWEPT:
        return
    rated = {} if optimizer.outer_optimizer else {"lr_hyper": 1.0}
    result = Sweep(
        problem, optimizer, SearchSpace(**rated), population=1, generations=3,
        steps_per_generation=STEPS // 3, storage=tmp_path, seed=3, batching="map", **episodes,
        lr_schedule=falling if rated else None, executor="local", progress=False,
    ).run()  # fmt: skip
    for metric in (*rows[0], *solution.evals):
        of_trial = {**solution.metrics, **solution.evals}[metric][-1]
        np.testing.assert_array_equal(result.table[metric][-1], of_trial)
    best = jax.tree.map(lambda x: x[None], jax.device_get(result.best.state))
    then = states[result.best.generation + 1]  # which need not be the last
    assert_same_bits(trials_state(best), trials_state(then))


@pytest.mark.slow
@pytest.mark.parametrize("episode_length", slow_but([None, T], T))
def test_theta_is_estimated_when_the_timetable_says_so(episode_length):
    optimizer, seen = made("hyperdistill"), []

    def note(steps, state):
        seen.append((steps, float(state.metadata["theta"])))

    key = jax.random.key(1)
    solved(optimizer, key, episode_length=episode_length, eval_every=1, callback=note)
    steps, theta = zip(*seen, strict=True)
    assert steps == tuple(range(1, STEPS + 1))
    changes = [0] + [i for i in range(1, STEPS) if theta[i] != theta[i - 1]]
    assert changes == ([0] if episode_length is None else [0, 8, 16])
    timetable = Timetable.of(optimizer, episode_length)
    assert [i for i in range(STEPS) if timetable.calibrates_at(i)] == changes


@pytest.mark.parametrize("layout", ["map", 3])
@pytest.mark.slow
def test_slots_of_different_ages_keep_their_own_time(layout):
    """A slot that started later calibrates, and ends its episodes, by its own count."""
    optimizer = made("hyperdistill")
    keys = jax.random.split(jax.random.key(5), 4)
    trials = Population(PROBLEM, optimizer, 4, batching=layout, episode_length=T)
    first = trials.init(keys)
    older, _ = trials.run(first, 7, keys, falling)
    mixed = jax.tree.map(lambda a, b: a.at[2:].set(b[2:]), older, first)
    state, _ = trials.run(mixed, 7, keys, falling)  # the same program
    for slot, steps in ((0, 14), (3, 7)):
        alone = solved(optimizer, keys[slot], steps, episode_length=T)
        found = jax.tree.map(lambda x: x[slot], jax.device_get(state))  # noqa: B023
        assert found.metadata["trial_step"] == steps
        assert_close(found.params, alone.state.params, rtol=1e-5)
        assert_close(found.metadata["theta"], alone.state.metadata["theta"], rtol=1e-4)


def test_a_sweep_refuses_a_schedule_without_a_rate(tmp_path):
    with pytest.raises(ValueError, match="lr_schedule needs SearchSpace"):
        Sweep(PROBLEM, made("one-step"), SearchSpace(), 1, 1, 1, tmp_path, lr_schedule=falling)
