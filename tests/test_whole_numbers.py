"""Whole numbers and categories in the space: drawn, perturbed, checked, written."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradhpo
from gradhpo.cluster import (
    PBT,
    Change,
    Decision,
    SearchSpace,
    Sweep,
    Table,
    categorical,
    choice,
    integer,
    loguniform,
    uniform,
)
from gradhpo.cluster.optuna_study import export_study
from gradhpo.cluster.schedulers.decision import check

KINDS = {
    "integer": integer(-3, 8),
    "integer by its logarithm": integer(1, 20, log=True),
    "two integers": integer(0, 1),
    "categorical": categorical([0, 4, 2.5]),
}


def allowed(kind):
    low, high = kind.bounds
    return set(getattr(kind, "values", np.arange(low, high + 1)))


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_draws_and_perturbations_are_values(kind):
    space, rng, n = SearchSpace({"x": kind}), np.random.default_rng(0), 400
    values = space.draw(rng, np.ones(n, bool))["x"].add
    assert set(values) <= allowed(kind)
    assert {kind.bounds[0], kind.bounds[1]} <= set(values)
    parents = np.roll(np.arange(n), 1)
    for resample in (0.0, 0.5):
        settings = {"factors": (0.8, 1.25), "resample": resample}
        change = space.explore(rng, {"x": values}, parents, **settings)["x"]
        assert (change.multiply == 0).all()
        assert set(change.add) <= allowed(kind)
        check(Decision(parents, {"x": change}), n, space.settings())
    inside = (values > kind.bounds[0]) & (values < kind.bounds[1])
    moved = kind.perturb(rng, values, (0.8, 1.25))[1]
    assert (moved[inside] != values[inside]).all()


@pytest.mark.parametrize(
    ("factor", "moves"),
    [
        (1.25, {1: 2, 2: 3, 3: 4, 10: 12, 100: 125, 0: 1, -1: -2, -10: -12, 200: 200}),
        (0.8, {1: 0, 2: 1, 3: 2, 10: 8, 100: 80, 0: -1, -1: 0, -10: -8, -200: -160}),
    ],
)
def test_an_integer_moves_by_its_factor_and_by_one_at_least(factor, moves):
    current = np.asarray(list(moves), float)
    moved = integer(-200, 200).perturb(np.random.default_rng(0), current, (factor,))[1]
    assert dict(zip(moves, moved, strict=True)) == moves


def test_an_integer_drawn_by_its_logarithm_is_small_as_often_as_large():
    drawn = integer(1, 1000, log=True).sample(np.random.default_rng(0), 4000)
    shares = np.histogram(np.log(drawn + 0.0), np.log([0.5, 10.5, 100.5, 1000.5]))[0] / 4000
    widths = np.log([10.5 / 0.5, 100.5 / 10.5, 1000.5 / 100.5]) / np.log(1000.5 / 0.5)
    np.testing.assert_allclose(shares, widths, atol=0.03)


def test_a_category_is_resampled_among_the_others():
    kind, seen = categorical([5, 1, 3]), set()
    for seed in range(20):
        moved = kind.perturb(np.random.default_rng(seed), np.asarray([5.0, 1.0, 3.0]), ())[1]
        seen |= set(zip((5, 1, 3), moved.tolist(), strict=True))
    assert seen == {(a, b) for a in (5, 1, 3) for b in (5, 1, 3) if a != b}


def test_coordinates_are_from_0_to_1_and_categories_equally_far():
    np.testing.assert_allclose(integer(0, 4).unit(np.arange(5.0))[:, 0], np.linspace(0, 1, 5))
    by_logarithm = integer(1, 100, log=True).unit(np.asarray([1.0, 10, 100]))[:, 0]
    np.testing.assert_allclose(by_logarithm, [0, 0.5, 1], atol=1e-15)
    np.testing.assert_allclose(choice([1, 5, 6]).unit(np.asarray([6.0, 1, 5]))[:, 0], [1, 0, 0.5])
    for stored in ("value", "log"):
        values = np.asarray([1e-4, 1e-2, 1.0])
        values = np.log(values) if stored == "log" else values
        np.testing.assert_allclose(
            loguniform(1e-4, 1, stored=stored).unit(values)[:, 0], [0, 0.5, 1], atol=1e-15
        )
    np.testing.assert_allclose(uniform(-1, 3).unit(np.asarray([0.0]))[:, 0], [0.25])
    corners = categorical([7, 0, 2]).unit(np.asarray([0.0, 2, 7]))
    distances = np.linalg.norm(corners[:, None] - corners, axis=2)
    np.testing.assert_allclose(distances, 1 - np.eye(3))


def test_a_space_is_what_its_description_says():
    space = SearchSpace(dict(KINDS), integer(1, 3))
    again = SearchSpace.parse(space.describe())
    assert again.settings() == space.settings()
    written = {"hyperparams": {"k": {"integer": [1, 9], "log": True}, "c": {"categorical": [2, 0]}}}
    assert SearchSpace.parse(written).describe() == written


def test_pbt_perturbs_them_by_kind():
    space = SearchSpace({"k": integer(1, 9), "c": categorical([0, 1, 2])})
    values = {"k": np.full(8, 4.0), "c": np.full(8, 1.0)}
    table = Table(0, np.arange(8.0), np.arange(8), np.ones(8, int), values, {})
    decision = PBT(resample=0)(table, space, np.random.default_rng(0))
    copies = decision.changes["k"].mask
    assert set(decision.changes["k"].add[copies]) <= {3.0, 5.0}
    assert set(decision.changes["c"].add[copies]) <= {0.0, 2.0}


def changed(multiply, add, name="k"):
    space = SearchSpace({"k": integer(1, 9), "c": categorical([0, 1, 5])})
    one = Change(np.array([False, True]), np.full(2, multiply), np.full(2, add))
    return check(Decision(np.zeros(2, int), {name: one}), 2, space.settings())


def test_a_scheduler_sets_whole_numbers_or_moves_by_whole_steps():
    for multiply, add in ((0.0, 9.0), (1.0, -2.0)):
        assert changed(multiply, add).changes["k"].add[1] == add


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: integer(1, 1), ValueError, "low < high"),
        (lambda: integer(0, 8, log=True), ValueError, "at least 1"),
        (lambda: integer(1, 2.5), TypeError, "high must be a whole number, got 2.5"),
        (lambda: integer(1, 2**24 + 1), ValueError, "integer: high"),
        (lambda: integer(1, 2, log=1), TypeError, "log must be a boolean"),
        (lambda: categorical([1]), ValueError, "two or more different"),
        (lambda: categorical([1, 1.0]), ValueError, "two or more different"),
        (lambda: SearchSpace({"x": 3}), TypeError, r"integer\(…\) or categorical\(…\)"),
        (lambda: SearchSpace.parse({"lr_hyper": {"integer": [1]}}), ValueError, "lr_hyper must be"),
        (
            lambda: SearchSpace.parse({"lr_hyper": {"uniform": [1, 2], "log": True}}),
            ValueError,
            r"lr_hyper must be .*\{integer = \[low, high\]\}",
        ),
        (lambda: changed(0.0, 2.5), ValueError, r"whole numbers from 1 to 9, got 2\.5 for slot 1"),
        (lambda: changed(0.0, 10.0), ValueError, "whole numbers from 1 to 9, got 10"),
        (lambda: changed(1.25, 0.0), ValueError, "got 1.25 times, and 0 for slot 1"),
        (lambda: changed(0.0, 2.0, "c"), ValueError, "one of 0, 1, 5, got 2 for slot 1"),
    ],
)
def test_what_is_wrong_is_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


def counting():
    """A problem whose λ says how many of five weights count, and by which of three losses."""

    def train(w, lam, x):
        there = jnp.arange(5) < lam["count"]
        losses = [jnp.abs, jnp.square, lambda r: jnp.log1p(r**2)]
        residual = jnp.where(there, x @ w - 1, 0.0)
        kind = jax.lax.switch(lam["kind"].astype(int), losses, residual)
        return kind.mean() + jnp.exp(lam["decay"]) * jnp.sum(w**2)

    return gradhpo.Problem(
        init=lambda key: (
            jnp.zeros((3, 5)),
            {"count": jnp.float32(1), "kind": jnp.float32(0), "decay": jnp.float32(-3)},
        ),
        train_loss=train,
        val_loss=lambda w, lam, x: jnp.mean((x @ w - 1) ** 2),
        batch=lambda key, data: (data, data),
        data=lambda key: jax.random.normal(key, (6, 3)),
        metrics=lambda w, lam, data: {
            "counted": (jnp.abs(w).sum(0) > 0).sum().astype(float),
            "index": lam["kind"].astype(int).astype(float),
        },
    )


def still():
    """An optimizer that leaves whole numbers to the scheduler."""
    labels = {"count": "fixed", "kind": "fixed", "decay": "tuned"}
    outer = optax.multi_transform({"tuned": optax.sgd(0.1), "fixed": optax.set_to_zero()}, labels)
    return gradhpo.OneStepOptimizer(optax.sgd(0.1), outer)


def counting_sweep(storage, space, **settings):
    return Sweep(
        problem=counting, optimizer=still, space=space, population=8, generations=3,
        steps_per_generation=2, storage=storage, executor="local", batching="map",
        progress=False, **settings,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of Optuna's
def test_a_program_gets_the_numbers_that_the_space_says(tmp_path):
    space = SearchSpace({"count": integer(1, 5), "kind": categorical([0, 1, 2])})
    scheduler = PBT(quantile=0.5, resample=0.2)
    table = counting_sweep(tmp_path, space, scheduler=scheduler).run().table
    counts, kinds = table["hyperparams.count"], table["hyperparams.kind"]
    assert set(counts) <= {1, 2, 3, 4, 5}
    assert set(kinds) == {0, 1, 2}
    assert len(set(counts)) > 2
    np.testing.assert_array_equal(table["index"], kinds)
    first = table["generation"] == 0
    np.testing.assert_array_equal(table["counted"][first], counts[first])
    study = export_study(tmp_path, f"sqlite:///{tmp_path}/study.db", "whole")
    kinds = study.trials[-1].distributions
    assert (kinds["count"].low, kinds["count"].high) == (1, 5)
    assert type(kinds["count"]).__name__ == "IntDistribution"
    assert kinds["kind"].choices == (0, 1, 2)
    drawn = [(trial.params["count"], trial.params["kind"]) for trial in study.trials[:8]]
    assert drawn == list(zip(counts[:8], table["hyperparams.kind"][:8], strict=True))


def test_a_leaf_that_cannot_hold_the_numbers_is_refused_by_its_name(tmp_path):
    space = SearchSpace({"count": integer(1, 3000)})

    def halved(key):
        weights, lam = counting().init(key)
        return weights, {**lam, "count": jnp.float16(1)}

    half = dataclasses.replace(counting(), init=halved)
    with pytest.raises(ValueError, match=r"'count'.*from 1 to 3000.*float16.*up to 2048"):
        Sweep(
            problem=lambda: half, optimizer=still, space=space, population=2, generations=1,
            steps_per_generation=1, storage=tmp_path, executor="local", progress=False,
        ).run()  # fmt: skip


@pytest.mark.parametrize("values", [["a", "b"], "12", [1], [1, 1], 3])
def test_categories_that_are_no_numbers_are_refused_by_name(values):
    with pytest.raises(ValueError, match="categorical takes two or more different finite numbers"):
        categorical(values)
