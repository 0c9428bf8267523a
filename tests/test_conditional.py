"""Settings that exist only where a choice has a given value, and numbers of every kind."""

import json
import tomllib

import numpy as np
import pytest

from gradhpo.cluster import (
    Race,
    RandomSearch,
    SearchSpace,
    choice,
    loguniform,
    uniform,
    when,
)
from gradhpo.cluster.objectives import Objectives
from gradhpo.cluster.optuna_study import _Setting
from gradhpo.cluster.plan import Layout, Rules, first_plan
from tests import pages
from tests.sweeps import sweep

METHODS = {"method": ["one-step", "greedy", "t1t2"], "width": [8, 16]}
SPACE = SearchSpace(
    hyperparams={
        "decay": uniform(0, 1),
        "rate": [
            when(loguniform(1e-3, 0.1), method="greedy"),
            when(loguniform(1e-2, 1), method="one-step", width=16),
        ],
    },
    lr_hyper=[when(0.1, method="greedy"), when(uniform(1, 2), method=["one-step", "t1t2"])],
    choices=METHODS,
    race=Race(grace=3),
)
TOML = """
[hyperparams]
decay = {uniform = [0, 1]}
rate = [
    {loguniform = [1e-3, 0.1], when = {method = "greedy"}},
    {loguniform = [1e-2, 1], when = {method = "one-step", width = 16}},
]
[choices]
method = ["one-step", "greedy", "t1t2"]
width = [8, 16]
[[lr_hyper]]
value = 0.1
when = {method = "greedy"}
[[lr_hyper]]
uniform = [1, 2]
when = {method = ["one-step", "t1t2"]}
[race]
grace = 3
"""


def test_each_combination_has_its_own_space():
    found = [SPACE.of(one).settings() for one in SPACE.variants()]
    assert ["rate" in one for one in found] == [False, True, True, True, False, False]
    assert found[1]["rate"] == loguniform(1e-2, 1)
    assert found[2]["rate"] == loguniform(1e-3, 0.1)
    assert [one["lr_hyper"].bounds for one in found] == [(1, 2)] * 2 + [(0.1, 0.1)] * 2 + [
        (1, 2)
    ] * 2
    assert all(one["decay"] == uniform(0, 1) for one in found)
    with pytest.raises(ValueError, match=r"'rate' depends on choices: ask space.of"):
        SPACE.settings()
    plain = SearchSpace({"decay": uniform(0, 1)}, choices=METHODS)
    assert plain.of(plain.variants()[0]) is plain


def test_toml_and_a_manifest_say_the_same():
    assert SearchSpace.parse(tomllib.loads(TOML)) == SPACE
    assert SearchSpace.parse(json.loads(json.dumps(SPACE.describe()))) == SPACE


def test_the_page_says_the_same_in_python_and_in_toml():
    code = pages.block("cluster", "race=Race")
    text = pages.block("cluster", "[space.race]", "toml")
    made = {}
    exec(code, made)
    assert SearchSpace.parse(tomllib.loads(text)["space"]) == made["space"]


def test_first_trials_draw_what_their_combination_has_and_no_more():
    variant = np.repeat(np.arange(6), 50)
    drawn = SPACE.draw_first(np.random.default_rng(0), variant)
    assert drawn["decay"].mask.all()
    assert drawn["rate"].mask.tolist() == np.isin(variant, [1, 2, 3]).tolist()
    for number, (low, high) in {1: (1e-2, 1), 2: (1e-3, 0.1), 3: (1e-3, 0.1)}.items():
        of = drawn["rate"].add[variant == number]
        assert low <= of.min() < of.max() <= high
    plan = first_plan(
        Layout(6, 6, 50), Rules(RandomSearch(), SPACE, 0, Objectives({"val_loss": 1}))
    )
    assert (plan.lr_hyper[np.isin(variant, [2, 3])] == 0.1).all()
    assert (plan.lr_hyper[np.isin(variant, [0, 1, 4, 5])] >= 1).all()


def test_where_nothing_depends_on_a_choice_draws_are_those_of_before():
    space = SearchSpace({"a": uniform(0, 1), "b": choice([1, 2, 4])}, loguniform(0.1, 1), METHODS)
    fresh = np.ones(12, bool)
    before = space.draw(np.random.default_rng(3), fresh)
    now = space.draw_first(np.random.default_rng(3), np.repeat(np.arange(6), 2))
    for name, change in before.items():
        for one, other in zip(change, now[name], strict=True):
            assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: when(uniform(0, 1)), "when needs the value of a choice"),
        (lambda: when(uniform(0, 1), method=[]), "when: method must be a value"),
        (lambda: space(when(uniform(0, 1), metod="a")), "'x' depends on 'metod'; .* 'method'"),
        (lambda: space(when(uniform(0, 1), method="c")), "'x' depends on method='c'; .* 'a', 'b'"),
        (lambda: space(when(0.5, method="a")), "'x' must be a distribution"),
        (lambda: space([when(uniform(0, 1), method="a"), uniform(1, 2)]), "several .* method=a"),
        (lambda: SearchSpace({}, when(np.inf, method="a"), {"method": ["a"]}), "must be finite"),
        (lambda: SearchSpace({"x": uniform(0, 1)}, race=Race()), "race needs choices"),
        (lambda: SearchSpace(["x"]), r"SearchSpace.hyperparams must be a table by name, got"),
        (lambda: SearchSpace(choices=["x"]), r"SearchSpace.choices must be a table by name, got"),
        (lambda: SearchSpace(choices={1: ["x"]}), r"SearchSpace.choices must be a table by name"),
        (lambda: SearchSpace(choices={"x": [np.nan, 1]}), r"SearchSpace.choices\['x'\] has a NaN"),
        (lambda: space([]), r"'x' must be a distribution: .* got an empty list"),
        (lambda: SearchSpace.parse(3), "space must be a table by name, got 3"),
        (lambda: SearchSpace.parse({"hyperparams": 3}), "space.hyperparams must be a table"),
        (lambda: SearchSpace(choices=METHODS, race=3), "race must be a Race"),
        (lambda: Race(reduction=1), "Race: reduction"),
        (lambda: SearchSpace.parse({"race": {"grce": 1}}), "space.race must be"),
        (lambda: parsed({"uniform": [0, 1], "when": "greedy"}), "x: when must be"),
        (lambda: parsed([{"uniform": [0, 1]}]), "each of which needs when"),
        (lambda: parsed({"value": "a", "when": {"method": "a"}}), "x must be"),
    ],
)
def test_what_is_wrong_is_named(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def space(setting):
    return SearchSpace({"x": setting}, choices={"method": ["a", "b"]})


def parsed(text):
    return SearchSpace.parse({"hyperparams": {"x": text}, "choices": {"method": ["a", "b"]}})


def test_true_is_not_one():
    given = SearchSpace({"x": when(uniform(0, 1), flag=True)}, choices={"flag": [True, False, 2]})
    assert [len(given.of(one).settings()) for one in given.variants()] == [1, 0, 0]
    with pytest.raises(ValueError, match="flag=1"):
        SearchSpace({"x": when(uniform(0, 1), flag=1)}, choices={"flag": [True, False]})


@pytest.mark.parametrize("number", [np.float32(0.1), np.float64(0.1), np.int64(1), 0.1])
def test_numpy_numbers_are_numbers(number, tmp_path):
    """Right: the rate of every trial is the number itself, in a manifest and in the first plan."""
    choices = {"method": np.asarray(["a", "b"]), "width": [np.int64(3)]}
    given = [
        SearchSpace(lr_hyper=number),
        SearchSpace({}, when(number, width=np.int64(3)), choices),
    ]
    for one in given:
        assert SearchSpace.parse(json.loads(json.dumps(one.describe()))) == one
        layout = Layout(len(one.variants()), 2, 2)
        plan = first_plan(layout, Rules(RandomSearch(), one, 0, Objectives({"val_loss": 1})))
        assert (plan.lr_hyper == float(number)).all()
    made = sweep(tmp_path, space=given[0])
    assert made.identity.space.lr_hyper == float(number)


@pytest.mark.filterwarnings("default")
def test_a_parameter_of_a_study_is_there_where_the_setting_is():
    optuna = pytest.importorskip("optuna", reason="optuna is not installed (the extra trackers)")
    settings = [SPACE.of(one).settings() for one in SPACE.variants()]
    about = {number: one["rate"] for number, one in enumerate(settings) if "rate" in one}
    first = np.asarray([np.nan, 0.5, 0.01, 2.0])
    found = _Setting(optuna, about, first, np.asarray([0, 1, 2, 3]))
    assert found.kind == optuna.distributions.FloatDistribution(1e-3, 2.0, log=True)
    values = [found.value(x, number) for number, x in enumerate(first)]
    assert values == [None, 0.5, 0.01, 2.0]
    alone = _Setting(optuna, {1: choice([1, 2])}, np.asarray([np.nan, 2.0]), np.asarray([0, 1]))
    assert alone.kind == optuna.distributions.CategoricalDistribution((1.0, 2.0))
