"""The search space: draws and perturbations stay inside, and texts say what they mean."""

import numpy as np
import pytest

from gradhpo.cluster import SearchSpace, choice, loguniform, uniform

KINDS = {
    "uniform": uniform(-2, 3),
    "loguniform": loguniform(1e-4, 1e-1),
    "stored as a log": loguniform(1e-4, 1e-1, stored="log"),
    "choice": choice([1, 2, 4]),
}


def apply(change, values, bounds):
    moved = np.clip(values * change.multiply + change.add, *bounds)
    return np.where(change.mask, moved, values)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_draws_and_perturbations_stay_inside(kind):
    space, rng = SearchSpace({"x": kind}), np.random.default_rng(0)
    n = 500
    low, high = kind.bounds
    drawn = space.draw(rng, np.ones(n, bool))["x"]
    values = apply(drawn, np.zeros(n), (low, high))
    assert ((values >= low) & (values <= high)).all()
    assert len(np.unique(values)) > 2
    parents = np.roll(np.arange(n), 1)
    for resample in (0.0, 0.5, 1.0):
        change = space.explore(rng, {"x": values}, parents, factors=(0.8, 1.25), resample=resample)
        moved = apply(change["x"], values[parents], (low, high))
        assert ((moved >= low) & (moved <= high)).all()
        assert (moved != values[parents]).mean() > 0.5


def test_a_perturbation_multiplies_by_a_factor_or_adds_its_logarithm():
    values, parents = np.asarray([0.01, 0.02]), np.asarray([1, 1])
    rng = np.random.default_rng(0)
    for kind, expected in (
        (loguniform(1e-3, 1), {0.02 * 0.8, 0.02 * 1.25}),
        (loguniform(1e-3, 1, stored="log"), {0.02 + np.log(0.8), 0.02 + np.log(1.25)}),
    ):
        seen = set()
        for _ in range(20):
            change = SearchSpace({"x": kind}).explore(
                rng, {"x": values}, parents, factors=(0.8, 1.25), resample=0
            )["x"]
            seen.add(float(values[1] * change.multiply[0] + change.add[0]))
            assert change.mask.tolist() == [True, False]  # slot 1 copies nobody
        assert seen == expected


def test_a_choice_moves_to_a_neighbour():
    values, parents = np.asarray([4.0, 1.0, 2.0]), np.asarray([2, 0, 1])
    space, rng, seen = SearchSpace({"x": choice([1, 2, 4])}), np.random.default_rng(0), set()
    for _ in range(30):
        change = space.explore(rng, {"x": values}, parents, factors=(), resample=0)["x"]
        seen |= set(enumerate(change.add.tolist()))
    assert seen == {(0, 1.0), (0, 4.0), (1, 2.0), (1, 4.0), (2, 1.0), (2, 2.0)}


def test_variants_are_all_combinations():
    space = SearchSpace(choices={"method": ["a", "b"], "width": [1, 2]})
    assert space.variants() == [{"method": m, "width": w} for m in ("a", "b") for w in (1, 2)]
    assert SearchSpace().variants() == [{}]


@pytest.mark.parametrize("rate", [None, 0.5, loguniform(1e-3, 1)])
def test_a_space_is_what_its_description_says(rate):
    space = SearchSpace(dict(KINDS), rate, {"method": ["a", "b"]})
    again = SearchSpace.parse(space.describe())
    assert again.settings() == space.settings()
    assert again.variants() == space.variants()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: uniform(1, 1), "low < high"),
        (lambda: loguniform(0, 1), "low must be above 0"),
        (lambda: loguniform(1, 2, stored="ln"), "stored"),
        (lambda: choice([1]), "two or more"),
        (lambda: SearchSpace({"x": 3}), "'x' must be a distribution"),
        (lambda: SearchSpace(choices={"m": "ab"}), r"choices\['m'\] must be a list"),
        (lambda: SearchSpace(choices={"m": [object()]}), "strings, numbers"),
        (lambda: SearchSpace.parse({"hyperparameters": {}}), "'hyperparameters'"),
        (lambda: SearchSpace.parse({"hyperparams": {"x": [1, 2]}}), "x must be"),
        (lambda: SearchSpace.parse({"hyperparams": {"x": {"normal": [0, 1]}}}), "x must be"),
        (lambda: SearchSpace.parse({"lr_hyper": {"uniform": [1]}}), "lr_hyper must be"),
    ],
)
def test_what_is_wrong_is_named(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()
