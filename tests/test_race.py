"""Combinations of choices race: who ends, who has the slots, and the same however interrupted."""

import dataclasses
import importlib.util
import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest

from gradhpo.cluster import (
    NEW,
    PBT,
    Race,
    RandomSearch,
    SearchSpace,
    SuccessiveHalving,
    SweepResult,
    events,
    loguniform,
    shard,
    uniform,
    when,
)
from gradhpo.cluster import columns as names
from gradhpo.cluster.deciding import decide, race
from gradhpo.cluster.history import History
from gradhpo.cluster.incarnations import Incarnations
from gradhpo.cluster.objectives import Objectives
from gradhpo.cluster.optuna_study import _Trials
from gradhpo.cluster.orders import Result
from gradhpo.cluster.plan import Layout, Rules, after, first_plan, following, gather, orders
from gradhpo.cluster.race import rung
from gradhpo.cluster.storage import Storage
from tests import raced_operations
from tests.sweeps import assert_same_tables, sweep
from tests.test_kills import kills_of

ROOT = Path(__file__).parent.parent


def scores(*of_shards):
    return np.asarray(of_shards, float)


def test_rungs_are_a_grace_and_its_multiples():
    race = Race(reduction=3, grace=2)
    due = {done: left for done in range(1, 60) if (left := race.left(done, 10)) is not None}
    assert due == {2: 4, 6: 2, 18: 1, 54: 1}


def test_the_worse_half_ends_and_hands_its_shards_over():
    held = np.arange(4)
    found = rung(Race(), 1, 4, held, scores([3, 2], [1, 9], [np.nan, np.nan], [8, 0.5]))
    assert [tuple(one) for one in found.ended] == [(0, 2.0, 3, 4), (2, None, 4, 4)]
    assert found.variant.tolist() == [3, 1, 1, 3]  # the best one first
    last = rung(Race(), 2, 4, found.variant, scores([3, 2], [1, 9], [7, 7], [8, np.inf]))
    assert last.variant.tolist() == [1, 1, 1, 1]
    assert [tuple(one) for one in last.ended] == [(3, 2.0, 2, 2)]
    assert held.tolist() == [0, 1, 2, 3], "what was given is not changed"


def test_shares_stay_as_equal_as_shards_allow():
    held = np.repeat(np.arange(5), 2)
    found = rung(Race(), 1, 5, held, np.arange(10.0)[:, None])
    assert np.bincount(found.variant).tolist() == [4, 3, 3]
    assert (found.variant[:6] == held[:6]).all(), "who goes on keeps its own"


@pytest.mark.parametrize("done", [2, 3, 5])
def test_between_rungs_nobody_ends(done):
    found = rung(Race(grace=4), done, 2, np.arange(2), scores([1], [2]))
    assert found.variant.tolist() == [0, 1]
    assert not found.ended


def test_where_all_diverged_nothing_is_compared_and_the_next_rung_makes_up_for_it():
    held, none = np.arange(4), np.full((4, 1), np.nan)
    assert rung(Race(), 1, 4, held, none).variant.tolist() == [0, 1, 2, 3]
    found = rung(Race(), 2, 4, held, scores([4], [3], [np.nan], [2]))
    assert found.variant.tolist() == [3, 3, 3, 3]
    assert [one.variant for one in found.ended] == [1, 0, 2]


def test_of_equal_combinations_that_goes_on_whose_best_trial_is_in_the_first_slot():
    """The winner of a sweep is the first of equal ones, too: its state is still to be written."""
    found = rung(Race(), 2, 4, np.asarray([2, 1, 2, 1]), scores([5, 1], [1, 1], [0, 1], [0, 0]))
    assert found.variant.tolist() == [2, 2, 2, 2]


# --- histories: the controller's decisions, on scores that stand for steps -----------------------

CHOICES = {"method": ["a", "b", "c"], "width": [1, 2]}


def history(scheduler, seed, generations=9):
    """Run a race in numbers; yield each generation's plan, orders, whole table and what is next."""
    space = SearchSpace(
        {"x": uniform(0, 1), "y": when(loguniform(0.1, 1), method=["a", "b"])},
        [when(uniform(1, 2), method="a"), when(0.5, method="c", width=2)],
        CHOICES,
        Race(grace=2),
    )
    layout, rng = Layout(6, 12, 3, races=True), np.random.default_rng(seed)
    rules = Rules(scheduler, space, seed, Objectives({"val_loss": 1}))
    plan = first_plan(layout, rules)
    seen = History(layout.beginning(), space, rules.objectives, [].__getitem__)
    for _ in range(generations):
        made = orders(plan, [None] * 12, layout, space)
        table = gather(plan, [_result(order, space, rng) for order in made], layout)
        tables = seen.tables(plan.generation, table)
        decided = race(table, plan, decide(tables, plan, layout, rules), layout, rules)
        whole = {
            **table,
            **names.of_decision(decided.decision),
            names.NEXT_VARIANT: decided.variant,
        }
        coming = following(plan, decided, rules)
        yield plan, made, whole, decided, (layout, rules, coming)
        plan = coming


def _result(order, space, rng):
    of = space.of(space.variants()[order.variant])
    columns = {f"hyperparams.{name}": rng.uniform(0.1, 1, 3) for name in of.hyperparams}
    score = rng.normal(size=3) + order.variant
    score[rng.random(3) < 0.2] = np.nan
    return Result(order.shard, order.generation, {"val_loss": score, **columns}, (), 1, 0.0)


SCHEDULERS = (PBT(quantile=0.34), SuccessiveHalving(), RandomSearch(2))


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda one: type(one).__name__)
@pytest.mark.parametrize("seed", range(4))
def test_every_history_keeps_what_is_promised(scheduler, seed):
    before, best, trials = None, {}, set()
    for plan, made, table, decided, (layout, rules, coming) in history(scheduler, seed):
        living = set(plan.variant.tolist())
        assert {order.variant for order in made} == living
        if before is not None:
            moved = plan.variant != before
            changed = [order.before is not None for order in made]
            assert changed == moved[::3].tolist()
            assert [o.before for o in made if o.before is not None] == before[::3][changed].tolist()
            assert (plan.parents[moved] == NEW).all(), "who takes a shard over begins anew"
            kept = ~moved & (plan.parents >= 0)
            assert (plan.variant[kept] == before[plan.parents[kept]]).all()
            assert living <= set(before.tolist()), "nobody comes back"
        rates = np.isin(plan.variant, [0, 1, 5])
        assert (np.isfinite(plan.lr_hyper) == rates).all(), "NaN where there is none"
        assert (plan.lr_hyper[plan.variant == 5] == 0.5).all()
        new = set(plan.trial[plan.born == plan.generation].tolist())
        assert not new & trials, "no number twice"
        trials |= new
        best = {v: np.nanmin(table["val_loss"][plan.variant == v], initial=np.inf) for v in living}
        assert all(best[one.variant] >= min(best.values()) for one in decided.ended)
        # From the table alone comes the same plan, to the bit.
        again = after(plan.generation, table, layout, rules)
        for field in ("trial", "born", "parents", "lr_hyper", "variant", "before"):
            assert getattr(again, field).tobytes() == getattr(coming, field).tobytes(), field
        assert again.changes.keys() == coming.changes.keys()
        for name, change in coming.changes.items():
            for part, other in zip(change, again.changes[name], strict=True):
                assert part.tobytes() == other.tobytes()
        before = plan.variant
    assert len(living) == 1, "2, 4 and 8 generations: six, three, two, one"


def test_a_slot_that_changes_hands_draws_all_settings_of_its_new_combination():
    for _, _, _, _, (_, rules, coming) in history(RandomSearch(), 0):
        taken = coming.variant != coming.before
        for number in set(coming.variant[taken].tolist()):
            slots = taken & (coming.variant == number)
            of = rules.space.of(rules.space.variants()[number])
            assert {n for n, change in coming.changes.items() if change.mask[slots].any()} == set(
                of.hyperparams
            )
            for name in of.hyperparams:
                low, high = of.settings()[name].bounds
                drawn = coming.changes[name].add[slots]
                assert (coming.changes[name].multiply[slots] == 0).all()
                assert ((low <= drawn) & (drawn <= high)).all()


# --- sweeps ------------------------------------------------------------------------------------


def raced(storage, **changes):
    """A small sweep of two methods, one of which ends after two generations."""
    space = SearchSpace(
        {
            "log_rate": when(loguniform(1e-3, 3e-1, stored="log"), method="one-step"),
            "log_decay": when(uniform(-4, -2), method="first-order"),
        },
        choices={"method": ["first-order", "one-step"]},
        race=Race(grace=2),
    )
    given = {"space": space, "population": 4, "shards": 2, "generations": 4}
    return sweep(storage, **{**given, **changes})


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """All generations at once, and what an observer was told."""
    told = []

    class Observer:
        def observe(self, event):
            told.append(event)

    return raced(tmp_path_factory.mktemp("straight")).run(observers=[Observer()]), told


@pytest.fixture(scope="module")
def three(straight, tmp_path_factory):
    """The storage of three generations, and what they gave: interrupted where the race ends."""
    storage = tmp_path_factory.mktemp("three")
    raced(storage, generations=2).run()
    return storage, raced(storage, generations=3).run()


@pytest.mark.slow
def test_a_race_is_in_the_table_the_journal_the_events_and_the_result(tmp_path, straight, three):
    result, told = straight
    assert result.report.compiles == 2, "shapes stay: once for each combination"
    table, (ended,) = result.table, result.ended
    lost = 1 - table["variant"][-1]
    assert ended.choices == {"method": ["first-order", "one-step"][lost]}
    assert (ended.generation, ended.place, ended.of) == (1, 2, 2)
    rows = (table["generation"] == 1) & (table["variant"] == lost)
    assert ended.score == np.nanmin(table["val_loss"][rows])
    assert (table["variant"][table["generation"] > 1] == 1 - lost).all()
    assert (table["parent"][(table["generation"] == 2) & (table["slot"] // 2 == lost)] == NEW).all()
    (event,) = [one for one in told if isinstance(one, events.CombinationEnded)]
    assert (event.generation, event.choices, event.score) == (2, ended.choices, ended.score)
    assert "2 of 2" in event.line()
    # Settings that one method alone has are empty for the other.
    for number, name in enumerate(("log_decay", "log_rate")):
        there = np.isfinite(table[f"hyperparams.{name}"])
        assert (there == (table["variant"] == number)).all()
    assert result.best.choices == {"method": ["first-order", "one-step"][1 - lost]}
    from_storage = SweepResult.from_storage(result.where)
    assert from_storage.ended == result.ended
    replayed = result.replay()
    np.testing.assert_array_equal(replayed.params, result.best.params)

    if importlib.util.find_spec("optuna") is not None:
        assert_study_has_what_was_drawn(result)

    # Started again after some generations, it ends equal to the bit.
    made = raced(shutil.copytree(three[0], tmp_path / "b"))
    again = made.run()
    assert_same_tables(again, result)
    assert again.ended == result.ended
    assert len([one for one in made.events if isinstance(one, events.Prepared)]) == 1, "who is left"


def assert_study_has_what_was_drawn(result):
    import optuna

    study = optuna.create_study()
    study.add_trials(_Trials(optuna, result).frozen())
    assert len(study.trials) == len(set(result.table["trial"].tolist()))
    own = {"first-order": "log_decay", "one-step": "log_rate"}
    for trial in study.trials:
        assert set(trial.params) == {"method", own[trial.params["method"]]}


@pytest.mark.slow
def test_two_workers_share_what_is_left_of_a_race(tmp_path, three):
    """Each compiles a method; then both hold shards of one, which the other one loads."""
    alone = three[1]
    made = raced(tmp_path / "b", generations=3, executor="processes", workers=2)
    result = made.run()
    assert_same_tables(result, alone)
    told = [one for one in made.events if isinstance(one, events.Compiling)]
    assert [(one.number, one.of) for one in told[:2]] == [(1, 2), (2, 2)]
    assert told[0].line() == "compiling 1 of 2: method=first-order"
    assert result.report.compiles == 2
    assert 1 <= result.report.loads <= 2  # as shards were moved before the race, too


@pytest.mark.parametrize("held", [True, False])
def test_a_shard_that_changes_hands_begins_with_nothing_and_what_is_kept_of_it_stays(
    tmp_path, monkeypatch, held
):
    """Its best trial is written from the state that it had, by whoever has the shard now."""
    monkeypatch.setattr(shard, "Variant", raced_operations.Variant)
    made = sweep(tmp_path, space=raced_operations.SPACE, population=6, shards=3)
    spec = made._spec()
    hosts = [shard.ShardHost(spec), shard.ShardHost(spec)]
    for host, number in itertools.product(hosts, (0, 2)):
        host.prepare(number, "map")
    layout, rules = made.layout, Rules(PBT(), spec.space, 0, Objectives({"val_loss": 1}))
    plan = first_plan(layout, rules)
    first = orders(plan, [None] * 3, layout, spec.space)[2]
    Incarnations(spec.storage).own({2: 1})
    hosts[0].run(first, 1)
    state = {name: x.copy() for name, x in hosts[0]._states[2].state.items()}
    saved = hosts[0].checkpoint(2, 0)
    then = dataclasses.replace(first, generation=1, variant=0, before=2, winners=(1,), start=saved)
    host = hosts[0 if held else 1]
    result = host.run(then, 1)
    kept = Storage(tmp_path).load(result.winner)[0]
    for name, array in state.items():
        np.testing.assert_array_equal(kept[name], array[[1]])
    assert host._states[2].state[".params"].shape == (2, 100)
    for one in hosts:
        one.close()


@pytest.mark.slow
def test_a_kill_while_shards_change_hands_changes_no_bit(tmp_path):
    (killed,) = kills_of("raced_operations", tmp_path, (2, 0, 23, "PBT"))
    assert killed > 4
