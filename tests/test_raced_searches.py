"""Combinations that race, with settings of their own, and all that searches: nothing gets lost."""

import dataclasses

import numpy as np
import pytest

from gradhpo.cluster import (
    ASHA,
    NEW,
    OptunaSampler,
    Race,
    RandomSearch,
    SearchSpace,
    SweepResult,
    choice,
    integer,
    loguniform,
    points,
    points_from,
    shard,
    uniform,
    when,
)
from gradhpo.cluster.columns import first_of, of_first
from gradhpo.cluster.deciding import follow
from gradhpo.cluster.dominance import places
from gradhpo.cluster.drawing import Drawing
from gradhpo.cluster.objectives import Objectives
from gradhpo.cluster.optuna_kinds import spanning
from gradhpo.cluster.plan import Layout, Plan, Rules, first_plan
from tests import raced_operations
from tests.decisions import Decided
from tests.sweeps import assert_same_tables, sweep

SPACE = SearchSpace(
    {
        "a": uniform(-2, 3),
        "b": [
            when(loguniform(1e-3, 1, stored="log"), method="x"),
            when(integer(2, 9), method="y"),
        ],
    },
    choices={"method": ["x", "y", "z"]},
    race=Race(grace=2),
)
METRICS = {"loss": lambda a, b: (a - 1) ** 2 + np.where(np.isnan(b), 9, abs(b - 3))}
BEGIN = ({"a": 0.5, "b": 7.0}, {"b": 0.1}, {"a": 1.0, "method": "z"})


@dataclasses.dataclass
class Watched:
    """Draws by its generator, and keeps what it was told, by combination."""

    told: dict

    def ask(self, space, history, rng, n):
        assert list(space.searched()) == list(history.values)
        self.told.setdefault(tuple(map(str, space.searched().values())), []).append((history, n))
        bounds = {"a": (-2, 3)}
        if "b" in space.searched():
            bounds["b"] = (2, 9) if space.searched()["b"] == integer(2, 9) else (1e-3, 1)
        drawn = {name: rng.uniform(*ends, n) for name, ends in bounds.items()}
        return {**drawn, "b": np.round(drawn["b"])} if bounds.get("b") == (2, 9) else drawn


def raced(sampler, scheduler=None, generations=6):
    made = Decided(
        SPACE,
        METRICS,
        Drawing(sampler, points.checked(BEGIN, SPACE)),
        scheduler or RandomSearch(trial_generations=2),
        slots=12,
        shards=2,
    )
    made.run(generations)
    return made


def test_a_sampler_is_told_of_its_own_combination_and_draws_in_slots_that_change_hands():
    made = raced(Watched(told := {}))
    (winner,) = set(made.plan.variant.tolist())
    held = [[len(t.score) for t in tables.values()] for tables in made.tables]
    assert held == [[4, 4, 4], [4, 4, 4], [6, 6], [6, 6], [12], [12]], "3, 2 and 1 are left"
    for variant, of in enumerate(map(SPACE.of, SPACE.variants())):
        asked = told[tuple(map(str, of.searched().values()))]
        sizes = [len(history) for history, _ in asked]
        begins = [size + n for (_, n), size in zip(asked, sizes, strict=True)]
        assert sizes[1:] == begins[:-1], "every trial of the combination, and none of others"
        history = made.past.history(variant)
        assert history.given.sum() == 1
        assert all(np.isfinite(column).all() for column in history.values.values())
        drawn = [made.drawn[g]["a"] for g in history.born]
        assert all(a in there for a, there in zip(history.values["a"], drawn, strict=True))
        assert variant == winner or history.ended.all()


def remembered(made, generations):
    """Return what a driver that starts again tells a sampler, from tables and decisions."""
    rules, n = made.rules, made.layout.population
    past = rules.drawing.past(made.space, rules.objectives, rules.seed, n)
    given, beginning = rules.drawing.given(made.space, n), made.layout.beginning()
    past.begin_first(first_of(of_first(made.drawn[0])), given, beginning)
    for generation in range(generations):
        table = made.seen[generation]
        none = np.empty(0)
        variant = table["variant"]
        plan = Plan(generation, none, none, none, {}, None, variant, variant)
        follow(past, plan, table, made.decided[generation])
    return past


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_a_study_made_again_in_the_middle_of_a_race_draws_the_same():
    pytest.importorskip("optuna", reason="optuna is not installed (the extra trackers)")
    settings = {"n_startup_trials": 2, "multivariate": True}
    made = raced(OptunaSampler("TPESampler", **settings))
    for generations in (2, 4, 6):
        again = remembered(made, generations)
        left = set(made.decided[generations - 1].variant.tolist())
        for variant in left:
            history, of = again.history(variant), SPACE.of(SPACE.variants()[variant])
            cold = OptunaSampler("TPESampler", **settings)
            cold.ask(of, history, np.random.default_rng(0), 1)  # raises where it draws otherwise
            if generations == 6:
                now = made.past.history(variant)
                for name, column in now.values.items():
                    assert column.tobytes() == history.values[name].tobytes()


def test_slots_of_a_history_are_counted_as_the_last_table_counts_them():
    made = raced(None, RandomSearch(trial_generations=3))
    ((winner, last),) = made.tables[-1].items()
    rows = last.rows()
    numbers = np.concatenate([np.arange(made.layout.population) for _ in made.seen])
    whole = {n: np.concatenate([table[n] for table in made.seen]) for n in made.seen[0]}
    own = whole["variant"] == winner
    assert rows.slot.tolist() == numbers[own].tolist(), "the winner has all slots by now"
    assert rows.parent.tolist() == whole["parent"][own].tolist()
    assert rows.score.tolist() == whole["loss"][own].tolist()
    # A table of fewer slots counts its own.
    before = made.tables[3][winner]
    own = np.flatnonzero(made.seen[3]["variant"] == winner)
    assert before.slots.tolist() == own.tolist()
    parents = made.seen[3]["parent"][own]
    goes_on = parents != NEW
    assert (before.slots[before.parent[goes_on]] == parents[goes_on]).all()
    fell = made.seen[2]["loss"][parents] - made.seen[3]["loss"][own]
    np.testing.assert_array_equal(before.improvement(), np.where(goes_on, fell, np.nan))
    assert goes_on.any()


def test_points_are_for_the_combinations_that_have_what_they_give():
    """7 is a number of y alone and 0.1 of x; what is not given is drawn, where it exists."""
    made = raced(None, generations=1)
    first = {name: column.reshape(3, 4) for name, column in made.drawn[0].items()}
    assert (first["a"][1, 0], first["b"][1, 0]) == (0.5, 7)
    assert first["b"][0, 0] == np.log(0.1)
    assert first["a"][2, 0] == 1
    assert np.isnan(first["b"][2]).all()
    assert np.isfinite(first["b"][:2]).all()


@dataclasses.dataclass(frozen=True)
class Middle:
    """Draws the middle of everything."""

    def ask(self, space, history, rng, n):
        return {name: np.full(n, np.mean(of.bounds)) for name, of in space.searched().items()}


def test_an_outer_rate_of_some_combinations_is_drawn_given_or_not_there():
    rates = [when(uniform(1, 2), method="x"), when(0.5, method="y")]
    space = SearchSpace({"a": uniform(0, 1)}, rates, {"method": ["x", "y", "z"]})
    given = points.checked([{"lr_hyper": 1.75}, {"method": "z", "a": 0.25}], space)
    rules = Rules(RandomSearch(), space, 0, Objectives({"loss": 1}), Drawing(Middle(), given))
    plan = first_plan(Layout(3, 3, 2), rules)
    np.testing.assert_array_equal(plan.lr_hyper, [1.75, 1.5, 0.5, 0.5, np.nan, np.nan])
    assert plan.changes["a"].add[1:].tolist() == [0.5, 0.5, 0.5, 0.25, 0.5]


@pytest.mark.parametrize(
    ("point", "message"),
    [
        ({"b": 3.0, "method": "z"}, r"points\[0\] has 'b', which trials of method=z have not"),
        ({"b": 7.0, "method": "x"}, r"points\[0\]\['b'\] must be from 0.001 to 1, got 7"),
        ({"b": 50}, r"points\[0\]\['b'\] must be .* got 50"),
        ({"c": 1}, r"points\[0\] has 'c'; the space has 'a', 'b', 'method'"),
    ],
)
def test_a_point_that_no_combination_has_is_named(point, message):
    with pytest.raises(ValueError, match=message):
        points.checked([point], SPACE)


def test_by_several_objectives_that_goes_on_whose_best_trial_is_on_the_better_front():
    """x reaches both ends of the first front, y its middle, and z is behind everywhere."""
    space = SearchSpace(
        {"a": [when(uniform(0, 1), method=["x", "z"]), when(uniform(0.4, 0.6), method="y")]},
        choices={"method": ["x", "y", "z"]},
        race=Race(),
    )
    given = [{"a": 0.0, "method": "x"}, {"a": 1.0, "method": "x"}]

    def far(numbers, methods):
        return numbers + 3 * (np.arange(12) // 4 == methods)

    metrics = {"left": lambda a: far(a, 2), "right": lambda a: far(1 - a, 2)}
    drawing = Drawing(None, tuple(points.checked(given, space)))
    made = Decided(space, metrics, drawing, RandomSearch(), slots=12)
    made.run(2)
    ended = [[(one.variant, one.place, one.of) for one in made.decided[g].ended] for g in (0, 1)]
    assert ended == [[(2, 3, 3)], [(1, 2, 2)]]
    (last,) = made.decided[0].ended
    scores = made.scores[0]
    rank = places(scores)
    assert last.score == rank[8:].min()
    assert rank[8:].min() > rank[:8].max(), "all of z are dominated"
    assert set(made.plan.variant.tolist()) == {0}


def test_one_parameter_of_a_study_spans_the_kinds_of_all_combinations():
    optuna = pytest.importorskip("optuna", reason="optuna is not installed (the extra trackers)")
    kinds = optuna.distributions
    whole = [integer(2, 9), integer(4, 20)]
    assert spanning(optuna, whole, [3.0]) == kinds.IntDistribution(2, 20)
    assert spanning(optuna, [integer(2, 9), choice([0.5, 1])], []) == kinds.FloatDistribution(
        0.5, 9
    )


# --- sweeps of a few lines of NumPy --------------------------------------------------------------

LOWEST = {100: 1e-3, 200: 1e-2, 300: 2e-3}
RATES = [when(loguniform(lowest, 0.3, stored="log"), size=size) for size, lowest in LOWEST.items()]
ABOUT = {
    "space": SearchSpace(
        {"log_rate": RATES},
        choices={"size": list(LOWEST)},
        race=Race(),
    ),
    "population": 6,
    "shards": 6,
    "points": [{"log_rate": 0.2}, {"log_rate": 0.1, "size": 300}],
    "first_seed": 3,
}
SEARCHES = {
    "sampler": {
        "sampler": OptunaSampler("TPESampler", n_startup_trials=2),
        "scheduler": RandomSearch(trial_generations=1),
    },
    "history": {"scheduler": ASHA(reduction=2)},
}


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_a_raced_search_that_starts_again_after_every_generation_ends_equal(
    tmp_path, monkeypatch, search
):
    pytest.importorskip("optuna", reason="optuna is not installed (the extra trackers)")
    monkeypatch.setattr(shard, "Variant", raced_operations.Variant)
    about = {**ABOUT, **SEARCHES[search]}
    result = sweep(tmp_path / "a", **about, generations=4).run()
    for generations in (1, 2, 3, 4):
        again = sweep(tmp_path / "b", **about, generations=generations).run()
    assert_same_tables(again, result)
    assert again.ended == result.ended
    assert [one.of for one in result.ended] == [3, 2]
    found = SweepResult.from_storage(tmp_path / "a")
    assert found.best.settings == result.best.settings
    assert found.best.choices == {"size": 100}
    assert found.best.lineage[-1] == found.best.number
    multiply, add = found.schedule[0].changes["log_rate"]
    assert multiply == 0
    assert np.log(LOWEST[100]) <= add <= np.log(0.3)
    taken = points_from(tmp_path / "a", best=4)
    assert points.checked(taken, about["space"]) == taken


def test_the_front_of_a_race_keeps_what_ended_combinations_found(tmp_path, monkeypatch):
    """By two objectives; the larger a state, the worse by one, and the better by the other."""
    monkeypatch.setattr(shard, "Variant", raced_operations.Variant)
    metric = {"val_loss": "min", "hyperparams.log_rate": "max"}
    about = {**ABOUT, "points": [{"log_rate": 0.2999, "size": 300}], "metric": metric}
    about |= {"scheduler": RandomSearch(), "checkpoint_every": 2, "generations": 5}
    result = sweep(tmp_path / "a", **about).run()
    for generations in (1, 2, 4, 5):
        again = sweep(tmp_path / "b", **{**about, "generations": generations}).run()
    for name, column in result.table.items():
        assert again.table[name].tobytes() == column.tobytes(), name
    assert again.ended == result.ended
    assert [one.of for one in result.ended] == [3, 2]
    for one, other in zip(result.front, again.front, strict=True):
        assert (one.number, one.scores, one.choices) == (other.number, other.scores, other.choices)
        assert one.arrays[".params"].shape == (one.choices["size"],)
        np.testing.assert_array_equal(one.arrays[".params"], other.arrays[".params"])
    ended = {one.choices["size"]: one.generation for one in result.ended}
    assert all(trial.generation <= ended.get(trial.choices["size"], 4) for trial in result.front)
    assert 300 in ended
    assert {100, 300} <= {trial.choices["size"] for trial in result.front}
