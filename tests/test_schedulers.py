"""Schedulers are pure functions of a table and a seed."""

import numpy as np
import pytest

from gradhpo.cluster import (
    ASHA,
    NEW,
    PB2,
    PBT,
    Change,
    Decision,
    RandomSearch,
    SearchSpace,
    SuccessiveHalving,
    Table,
    loguniform,
)
from gradhpo.cluster.schedulers import written as module
from gradhpo.cluster.schedulers.decision import check

SPACE = SearchSpace({"rate": loguniform(1e-3, 1)})
ALL = {
    "pbt": PBT(),
    "pb2": PB2(),
    "asha": ASHA(reduction=2),
    "halving": SuccessiveHalving(reduction=2),
    "random": RandomSearch(trial_generations=3),
}


def table(score, age=None):
    score = np.asarray(score, float)
    n = len(score)
    age = np.full(n, 1) if age is None else np.asarray(age)
    return Table(0, score, np.arange(n), age, {"rate": np.full(n, 0.1)}, {"val_loss": score})


def decide(scheduler, *args, seed=0):
    return check(
        scheduler(table(*args), SPACE, np.random.default_rng(seed)), len(args[0]), SPACE.settings()
    )


@pytest.mark.parametrize("scheduler", ALL.values(), ids=ALL.keys())
def test_the_same_seed_decides_the_same(scheduler):
    scores = np.random.default_rng(0).normal(size=40)
    first, again = decide(scheduler, scores), decide(scheduler, scores)
    np.testing.assert_array_equal(first.parents, again.parents)
    for name, change in first.changes.items():
        np.testing.assert_array_equal(change, again.changes[name])


@pytest.mark.parametrize("scheduler", ALL.values(), ids=ALL.keys())
def test_diverged_trials_are_replaced_and_never_copied(scheduler):
    scores = np.arange(12.0)
    scores[[0, 5, 11]] = [np.nan, np.inf, np.nan]
    decision = decide(scheduler, scores)
    assert all(decision.parents[slot] != slot for slot in (0, 5, 11))
    assert not {0, 5, 11} & set(decision.parents.tolist())


@pytest.mark.parametrize("scheduler", ALL.values(), ids=ALL.keys())
def test_when_all_diverged_all_start_anew(scheduler):
    assert (decide(scheduler, np.full(8, np.nan)).parents == NEW).all()


@pytest.mark.parametrize("population", [1, 2, 3, 8, 100])
def test_pbt_replaces_the_worst_by_the_best(population):
    scores = np.random.default_rng(1).permutation(population).astype(float)
    parents = decide(PBT(quantile=0.25), scores).parents
    count = min(max(1, population // 4), population // 2)
    order = np.argsort(scores)
    losers = np.flatnonzero(parents != np.arange(population))
    assert set(losers) == set(order[population - count :])
    assert set(parents[losers]) <= set(order[:count])


def test_pbt_perturbs_only_what_copies():
    decision = decide(PBT(resample=0), np.arange(8.0))
    change = decision.changes["rate"]
    np.testing.assert_array_equal(change.mask, decision.parents != np.arange(8))
    assert set(change.multiply[change.mask]) <= {0.8, 1.25}


def test_successive_halving_keeps_the_best_of_those_that_reached_a_rung():
    scores, age = [3.0, 1.0, 2.0, 0.0, 9.0, 8.0], [1, 1, 1, 1, 3, 2]
    alone = set()
    for seed in range(20):
        parents = decide(SuccessiveHalving(reduction=2), scores, age, seed=seed).parents
        assert parents[:5].tolist() == [NEW, 1, NEW, 3, 4]  # 9.0 is on no rung
        alone.add(int(parents[5]))  # 8.0 is alone on its rung, and goes on at random
    assert alone == {NEW, 5}
    parents = decide(SuccessiveHalving(reduction=2, longest=3), scores, age).parents
    assert parents[4] == NEW


def test_successive_halving_never_runs_out_of_new_trials():
    scheduler, rng = SuccessiveHalving(), np.random.default_rng(0)
    age, scores, fresh = np.ones(27, int), rng.random(27), []
    for seed in range(60):
        started = decide(scheduler, scores, age, seed=seed).parents == NEW
        fresh.append(started.sum())
        age = np.where(started, 1, age + 1)
        scores = np.where(started, rng.random(27), scores)
    assert age.max() <= 27
    assert min(fresh[30:]) > 0
    assert np.mean(fresh[30:]) > 6


def test_random_search_completes_trials():
    assert decide(RandomSearch(), [1.0, 2.0], [50, 3]).parents.tolist() == [0, 1]
    assert decide(RandomSearch(5), [1.0, 2.0], [5, 3]).parents.tolist() == [NEW, 1]


@pytest.mark.parametrize("scheduler", ALL.values(), ids=ALL.keys())
def test_a_scheduler_is_what_its_description_says(scheduler):
    assert module.parse(module.describe(scheduler)) == scheduler


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PBT(quantile=0.6), "quantile"),
        (lambda: PBT(resample=-1), "resample"),
        (lambda: PBT(factors=()), "factors"),
        (lambda: SuccessiveHalving(reduction=1), "reduction"),
        (lambda: SuccessiveHalving(grace=3, longest=2), "longest"),
        (lambda: RandomSearch(0), "trial_generations"),
        (lambda: module.parse({"name": "Hyperband"}), "PBT, PB2, SuccessiveHalving, ASHA"),
        (lambda: module.parse({"name": "PBT", "quantil": 1}), "quantil"),
        (lambda: check([0], 1, {}), "must return a Decision"),
        (lambda: check(Decision(np.zeros(2, int)), 3, {}), "3 integers"),
        (lambda: check(Decision(np.asarray([0, 3])), 2, {}), "from -1 to 1"),
        (lambda: changed("y", 1.0, 0.0), "the space has"),
        (
            lambda: changed("rate", np.nan, 0.0),
            r"multiply must be finite, got nan",
        ),
        (lambda: changed("rate", 1e300, 0.0), "multiply must be finite"),
        (lambda: changed("rate", 1.0, -np.inf), r"rate'\].add must be finite, got -inf for slot 1"),
        (
            lambda: changed("rate", 0.0, 2.0),
            "must be in the space, from 0.001 to 1, got 2",
        ),
    ],
)
def test_what_is_wrong_is_named(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def changed(name, multiply, add):
    """Check a decision that changes the second of two slots."""
    mask = np.array([False, True])
    one = Change(mask, np.full(2, multiply), np.full(2, add))
    return check(Decision(np.zeros(2, int), {name: one}), 2, SPACE.settings())


def test_a_perturbation_may_lead_out_of_the_space_and_is_clipped():
    assert changed("rate", 1.25, 7.0).changes["rate"].multiply[1] == 1.25
