"""Non-dominated sorting, crowding and hypervolume, against brute force and closed forms."""

import dataclasses
import itertools

import numpy as np
import pytest

from gradhpo.checkpoints import Saved
from gradhpo.cluster import ASHA, SuccessiveHalving, front
from gradhpo.cluster.dominance import crowding, fronts, nondominated, places
from gradhpo.cluster.front import Found, found_in, joined
from gradhpo.cluster.hypervolume import hypervolume
from gradhpo.cluster.objectives import Objectives, checked
from gradhpo.cluster.schedulers import NEW, PBT, Table
from gradhpo.cluster.space import SearchSpace


def dominates(a, b):
    return all(x <= y for x, y in zip(a, b, strict=True)) and tuple(a) != tuple(b)


def by_hand(rows):
    """The fronts, peeled off one after the other."""
    left, found, number = list(range(len(rows))), np.zeros(len(rows), int), 0
    while left:
        now = [i for i in left if not any(dominates(rows[j], rows[i]) for j in left)]
        found[now], number = number, number + 1
        left = [i for i in left if i not in now]
    return found


CASES = [(n, k, seed) for (n, k), seed in itertools.product([(1, 2), (30, 2), (40, 3)], range(3))]


@pytest.mark.parametrize(("n", "k", "seed"), CASES)
def test_fronts_are_those_of_brute_force(n, k, seed):
    rows = np.random.default_rng(seed).integers(0, 6, (n, k)).astype(float)  # with equal ones
    np.testing.assert_array_equal(fronts(rows), by_hand(rows.tolist()))
    first = {tuple(row): i for i, row in reversed(list(enumerate(rows.tolist())))}
    expected = [
        i for i in np.flatnonzero(by_hand(rows.tolist()) == 0) if first[tuple(rows[i])] == i
    ]
    np.testing.assert_array_equal(nondominated(rows), expected)


def test_crowding_is_the_sum_of_the_gaps_around_a_row():
    rows = np.array([[0.0, 10], [1, 6], [3, 5], [4, 0]])
    expected = [np.inf, 3 / 4 + 5 / 10, 3 / 4 + 6 / 10, np.inf]
    np.testing.assert_allclose(crowding(rows), expected)
    assert crowding(np.array([[1.0, 2], [1, 2], [1, 2]])).tolist() == [0, 0, 0]
    some = np.random.default_rng(0).normal(size=(50, 4))
    for order in itertools.permutations(range(4)):
        assert crowding(some[:, order]).tobytes() == crowding(some).tobytes()


def test_places_go_by_front_and_then_by_room_and_diverged_rows_have_none():
    rows = np.array([[2.0, 2], [0, 4], [1, 3.9], [np.nan, 0], [4, 0], [3, 3], [np.inf, 1]])
    assert fronts(rows[[0, 1, 2, 4, 5]]).tolist() == [0, 0, 0, 0, 1]
    np.testing.assert_array_equal(places(rows), [2, 0, 3, np.nan, 1, 4, np.nan])
    assert np.isnan(places(np.full((3, 2), np.nan))).all()


def volume_by_samples(rows, corner, n=200_000):
    points = np.random.default_rng(0).uniform(0, corner, (n, len(corner)))
    inside = np.zeros(n, bool)
    for row in rows:
        inside |= (points >= row).all(axis=1)
    return inside.mean() * np.prod(corner)


def test_hypervolume_has_its_closed_forms():
    assert hypervolume(np.array([[0.25]]), np.array([1.0])) == 0.75
    stairs = np.array([[0.0, 2], [1, 1], [2, 0]])
    assert hypervolume(stairs, np.array([3.0, 3])) == 3 + 2 + 1
    assert hypervolume(np.array([[0.0, 0, 0]]), np.array([2.0, 3, 4])) == 24
    three = np.array([[0.0, 1, 1], [1, 0, 1], [1, 1, 0]])
    assert hypervolume(three, np.array([2.0, 2, 2])) == 3 * 2 - 3 + 1  # boxes of 2, overlaps of 1
    more = np.array([[5.0, 5, 5], [np.nan, 0, 0], [2, 0, 0]])  # not below the corner
    assert hypervolume(np.concatenate([three, three, more]), np.array([2.0, 2, 2])) == 4
    assert hypervolume(np.empty((0, 2)), np.array([1.0, 1])) == 0
    # A quarter of a circle, by many boxes.
    angle = np.linspace(0, np.pi / 2, 400)
    arc = 1 - np.stack([np.cos(angle), np.sin(angle)], 1)
    assert hypervolume(arc, np.array([1.0, 1])) == pytest.approx(np.pi / 4, abs=4e-3)
    with pytest.raises(ValueError, match=r"got \(3, 2\) and \(3,\)"):
        hypervolume(stairs, np.ones(3))


@pytest.mark.parametrize("k", [2, 3, 4])
def test_hypervolume_is_what_sampling_says(k):
    rows, corner = np.random.default_rng(k).uniform(size=(12, k)), np.ones(k)
    assert hypervolume(rows, corner) == pytest.approx(volume_by_samples(rows, corner), abs=4e-3)


def read_again(found, several):
    entry = {"best": None}
    front.write(entry, found, several)
    return found_in(entry)


def test_what_is_kept_is_the_front_of_all_that_was_seen(monkeypatch):
    rng, kept, seen = np.random.default_rng(0), (), []
    for generation in range(6):
        scores = rng.integers(0, 12, (9, 2)).astype(float)
        scores[rng.random(9) < 0.2, 0] = np.nan
        seen += [tuple(row) for row in scores.tolist() if np.isfinite(row).all()]
        kept = joined(kept, scores, np.arange(9) + 100, generation)
        expected = {row for row in seen if not any(dominates(other, row) for other in seen)}
        assert {found.scores for found in kept} == expected
        assert len(kept) == len(expected), "the first of equal ones alone"
    assert read_again(kept, several=True) == kept
    monkeypatch.setattr(front, "MOST", 4)
    line = np.array([[x, 10 - x] for x in (0, 0.1, 0.2, 4, 8, 10)])
    few = joined((), line, np.arange(6), 0)
    assert [found.slot for found in few] == [0, 3, 4, 5]


def test_one_metric_keeps_the_first_of_the_best():
    kept = joined((), np.array([[3.0], [1], [1], [np.nan]]), np.arange(4), 0)
    assert kept == (Found((1.0,), 1, 1, 0, Saved("", "")),)
    assert joined(kept, np.array([[1.0], [2]]), np.arange(2), 1) == kept
    better = joined(kept, np.array([[1.0], [0.5]]), np.arange(2), 1)
    assert [(found.slot, found.generation) for found in better] == [(1, 1)]
    assert read_again(better, several=False) == better
    assert better[0].scores == (0.5,)
    nothing = joined((), np.full((3, 1), np.nan), np.arange(3), 0)
    assert read_again(nothing, several=False) == nothing == ()


def table(columns, signs):
    compared = Objectives(signs)
    scores, n = compared.score(columns), len(next(iter(columns.values())))
    objectives = dict(zip(signs, compared.scores(columns).T, strict=True))
    ages = np.ones(n, int)
    return Table(0, scores, np.arange(n), ages, {}, columns, objectives=objectives)


def test_schedulers_see_the_places():
    rng = np.random.default_rng(0)
    loss, accuracy = np.arange(12.0), np.arange(12.0) * 10  # every trial is on the front
    loss[[1, 7]], accuracy[[3, 7]] = 50, -5
    loss[4] = np.nan
    seen = table({"loss": loss, "accuracy": accuracy}, {"loss": 1, "accuracy": -1})
    assert seen.diverged().tolist() == [slot == 4 for slot in range(12)]
    assert seen.ranking()[-1] == 4
    assert seen.ranking()[-2] == 7, "dominated by all"
    parents = PBT(quantile=0.25)(seen, SearchSpace(), rng).parents
    assert set(np.flatnonzero(parents != np.arange(12))) == {4, 7, seen.ranking()[-3]}
    halved = SuccessiveHalving(reduction=2)(seen, SearchSpace(), rng).parents
    assert (halved == NEW)[[4, 7]].all()
    assert (halved != NEW).sum() == 6


def test_asha_compares_all_that_reached_a_rung_by_their_objectives():
    """Places of different generations say nothing: the first of a weak one is still weak."""
    rng = np.random.default_rng(1)
    strong, weak = rng.uniform(0, 1, (2, 8)), rng.uniform(2, 3, (2, 8))
    first = table(dict(zip("ab", strong, strict=True)), {"a": 1, "b": 1})
    later = table(dict(zip("ab", weak, strict=True)), {"a": 1, "b": 1})
    then = dataclasses.replace(later, generation=1, earlier=lambda generation: first)
    asha = ASHA(reduction=2, longest=4)
    assert (asha(then, SearchSpace(), rng).parents == NEW).all()
    goes_on = asha(first, SearchSpace(), rng).parents != NEW
    assert goes_on.tolist() == (places(strong.T) < 4).tolist()


def test_what_is_compared_is_checked():
    assert checked("loss", "max") == "loss"
    assert checked(["a", "b"], "max") == {"a": "max", "b": "max"}
    assert checked({"a": "max", "b": "min"}, "min") == {"a": "max", "b": "min"}
    assert Objectives.of({"a": "max", "b": "min"}, "min").shown((-1.0, 2.0)) == {"a": 1, "b": 2}
    for metric, mode, said in (
        ("a", "most", "mode must be one of"),
        ({"a": "max", "b": "min"}, "max", "says its own"),
        (["a", "a"], "min", "names an objective twice"),
        (["a"], "min", "two objectives or more"),
        ({"a": "up", "b": "min"}, "min", "metric must be a name, a list"),
        ([1, 2], "min", "metric must be a name, a list"),
        ([["a"], ["b"]], "min", "metric must be a name, a list"),
        ({"a": ["min"], "b": "min"}, "min", "metric must be a name, a list"),
    ):
        with pytest.raises(ValueError, match=said):
            checked(metric, mode)
    with pytest.raises(TypeError, match="metric must be a name, a list"):
        checked(3, "min")
