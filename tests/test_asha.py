"""ASHA: a rung remembers all that ever reached it."""

import numpy as np
import pytest

from gradhpo.cluster import ASHA, NEW, SearchSpace, SuccessiveHalving, Table


def sweep_of(scores, ages):
    """Tables, a row of scores and of ages for each generation; the last one is returned."""
    tables = []
    for generation, (row, age) in enumerate(zip(scores, ages, strict=True)):
        score = np.asarray(row, float)
        tables.append(
            Table(
                generation, score, np.arange(len(score)), np.asarray(age), {}, {},
                earlier=tables.__getitem__,
            )
        )  # fmt: skip
    return tables[-1]


def goes_on(scheduler, table, seed=0):
    parents = scheduler(table, SearchSpace(), np.random.default_rng(seed)).parents
    return (parents == np.arange(len(parents))).tolist()


def test_a_trial_is_compared_with_all_that_ever_reached_its_rung():
    scores = [[1.0, 2, 3, 4], [9.0, 9, 2.5, 0.5]]
    ages = [[1, 1, 1, 1], [2, 2, 1, 1]]  # two goes on of the first four, two new ones reached 1
    table = sweep_of(scores, ages)
    # On the first rung were 1, 2, 3, 4, 2.5 and 0.5: the best third are 0.5 and 1.
    assert goes_on(ASHA(longest=9), table) == [True, True, False, True]
    # Among themselves, one of the two goes on, for halving; and both are on no other rung.
    assert sum(goes_on(SuccessiveHalving(reduction=2, longest=3), table)[2:]) == 1


def test_a_strong_cohort_goes_on_as_a_whole_and_a_weak_one_not_at_all():
    first, ages = [1.0, 2, 3, 4], [[1] * 4] * 2
    assert goes_on(ASHA(reduction=2, longest=9), sweep_of([first, [0.1, 0.2, 0.3, 0.4]], ages)) == [
        True, True, True, True,
    ]  # fmt: skip
    assert not any(goes_on(ASHA(reduction=2, longest=9), sweep_of([first, [5, 6, 7, 8]], ages)))


def test_the_first_on_a_rung_goes_on_and_so_does_the_best_ever():
    table = sweep_of([[5.0, 6], [4.5, 7], [4.0, 6]], [[1, 1], [2, 1], [3, 1]])
    assert goes_on(ASHA(longest=9), table) == [True, False]
    assert goes_on(ASHA(longest=9), sweep_of([[5.0, 6], [4.9, 9]], [[1, 1], [1, 2]]))[0]


def test_diverged_and_complete_trials_are_replaced():
    table = sweep_of([[1.0, 2, np.nan, 4], [0.5, np.nan, np.nan, 3]], [[1] * 4, [2, 2, 1, 1]])
    assert goes_on(ASHA(reduction=2, longest=2), table) == [False, False, False, True]
    assert goes_on(ASHA(reduction=2, longest=8), table) == [True, False, False, True]


@pytest.mark.parametrize("slots", [1, 4, 27])
def test_it_never_runs_out_of_new_trials(slots):
    rng, tables, fresh = np.random.default_rng(0), [], []
    age, score = np.ones(slots, int), rng.random(slots)
    for generation in range(60):
        table = Table(generation, score, np.arange(slots), age, {}, {}, earlier=tables.__getitem__)
        tables.append(table)
        started = ASHA()(table, SearchSpace(), rng).parents == NEW
        fresh.append(started.sum())
        age = np.where(started, 1, age + 1)
        score = np.where(started, rng.random(slots), score)
    assert age.max() <= max(1, slots)
    assert np.mean(fresh[30:]) >= slots / 9


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reduction": 1}, "reduction"),
        ({"grace": 0}, "grace"),
        ({"grace": 3, "longest": 2}, "longest"),
    ],
)
def test_what_is_wrong_is_named(settings, message):
    with pytest.raises((ValueError, TypeError), match=message):
        ASHA(**settings)
