"""A sweep of several objectives: its front is that of its table, kept, shown, and gone on with."""

import os
import re
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import chex
import numpy as np
import pytest

import gradhpo
from gradhpo.cluster import (
    OptunaSampler,
    RandomSearch,
    SweepError,
    SweepResult,
    check,
    events,
    points_from,
)
from gradhpo.cluster.cli import _chosen
from gradhpo.cluster.hypervolume import hypervolume
from gradhpo.cluster.journal import Journal
from gradhpo.cluster.warm_start import read
from tests.sweeps import sweep
from tests.test_dominance import dominates
from tests.test_events import Kept
from tests.test_kills import MEMORY, kills_of
from tests.test_stopping import command

METRIC = {"test_loss": "min", "param_norm": "max"}
ABOUT = {"metric": METRIC, "generations": 4, "shards": 2, "checkpoint_every": 2}


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A real sweep of two objectives, and what its observers were told."""
    kept = Kept()
    storage = tmp_path_factory.mktemp("objectives")
    result = sweep(storage, points=[{"log_rate": 0.125}], **ABOUT).run(observers=[kept])
    return result, [event for event in kept.told if isinstance(event, events.GenerationDone)]


def scores(table):
    return np.stack([table["test_loss"], -table["param_norm"]], axis=1)


def test_the_front_is_that_of_all_trials_of_all_generations(swept):
    result, told = swept
    rows = scores(result.table).tolist()
    expected = {tuple(row) for row in rows if not any(dominates(other, row) for other in rows)}
    found = {(t.scores["test_loss"], -t.scores["param_norm"]) for t in result.front}
    assert found == expected
    assert len(found) > 2
    losses = [trial.scores["test_loss"] for trial in result.front]
    assert losses == sorted(losses)
    for trial in result.front:
        here = (result.table["generation"] == trial.generation) & (
            result.table["slot"] == trial.slot
        )
        assert result.table["trial"][here] == trial.number == trial.lineage[-1]
        norm = np.sqrt(np.sum(trial.arrays[".params"] ** 2))
        assert norm == pytest.approx(trial.scores["param_norm"], rel=1e-5)
        stored = trial.metrics["hyperparams.log_rate"]
        assert trial.settings == {"log_rate": pytest.approx(np.exp(stored))}
    assert [event.best for event in told] == [None] * 4
    shown = [dict(scores) for scores in told[-1].front]
    assert shown == [trial.scores for trial in result.front]
    ((_, drawn),) = told[-1].points(0)
    assert drawn["front"] == len(found)
    assert drawn["front/least/test_loss"] == losses[0]
    reference = {"test_loss": 10.0, "param_norm": 0.0}
    volume = hypervolume(scores(result.table), np.array([10.0, 0]))
    assert result.hypervolume(reference) == pytest.approx(volume)
    for given, error, said in (
        ({"test_loss": 1}, ValueError, "reference must name test_loss, param_norm, got"),
        (None, ValueError, "reference must name test_loss, param_norm, got None"),
        ({**reference, "param_norm": np.nan}, ValueError, r"reference\['param_norm'\] must be"),
        (
            {**reference, "param_norm": np.inf},
            ValueError,
            r"reference\['param_norm'\] must be finite",
        ),
        (
            {**reference, "test_loss": "1"},
            TypeError,
            r"reference\['test_loss'\] must be .* got '1'",
        ),
    ):
        with pytest.raises(error, match=said):
            result.hypervolume(given)


def test_what_has_one_metric_alone_is_refused_by_name(swept, tmp_path):
    result, _ = swept
    compared = "the objectives are test_loss, param_norm: there is no best trial. Take one of"
    for ask in (lambda: result.best, lambda: result.schedule, result.replay):
        with pytest.raises(SweepError, match=compared):
            ask()
    for ask in (result.replay, result.trajectory, result.schedule_of):
        with pytest.raises(TypeError, match=r"trial must be a trial, .* got 6"):
            ask(6)
    with pytest.raises(SweepError, match="a trial has no score but scores"):
        _ = result.front[0].score
    with pytest.raises(SweepError, match="there is no one metric"):
        _ = result.metric
    with pytest.raises(ValueError, match=r"stop: target=1 is of one metric"):
        sweep(tmp_path, metric=METRIC, stop=gradhpo.Stop(target=1.0))


@pytest.mark.slow
def test_an_objective_that_is_not_there_is_named(tmp_path):
    with pytest.raises(SweepError, match="metric='loss' is not in the table, which has"):
        sweep(tmp_path, metric=["val_loss", "loss"]).run()


def test_the_commands_show_the_front_and_one_of_its_trials(swept, tmp_path):
    result, _ = swept
    said, status = command("best", result.where)
    assert status == 0
    assert "The front, of test_loss, param_norm (max):" in said
    for trial in result.front:
        assert f"trial {trial.number} after generation {trial.generation + 1}" in said
    last = result.front[-1]
    name = f"{last.number}@{last.generation + 1}"
    said, _ = command("best", result.where, "--trial", name, "--output", tmp_path / "a.npz")
    assert f"On the front: trial {last.number} after generation {last.generation + 1}" in said
    with np.load(tmp_path / "a.npz") as saved:
        assert saved[".params"].shape == last.arrays[".params"].shape
    said, status = command("best", result.where, "--trial", 999)
    assert status == 1
    assert "trial 999 is not on the front, which has" in said
    said, status = command("export", result.where, "--safetensors", tmp_path / "a.safetensors")
    assert status == 1
    first = result.front[0]
    assert f"no trial is the best: --trial, one of {first.number}@{first.generation + 1}, " in said
    said, _ = command("status", result.where)
    assert said.count("  front test_loss ") == len(result.front)
    said, status = command("check", result.where)
    assert (status, "DAMAGED" in said) == (0, False)


def test_a_trial_that_a_front_has_several_times_is_told_apart():
    def trial(number, generation):
        return SimpleNamespace(number=number, generation=generation)

    entries = [trial(17, 2), trial(3, 0), trial(17, 4)]
    result: Any = SimpleNamespace(front=entries, objectives=SimpleNamespace(several=True))
    chosen = [_chosen(result, which) for which in ("3", "3@1", "17@5", "17@3")]
    assert chosen == [entries[1], entries[1], entries[2], entries[0]]
    for which, said in (
        (
            "17",
            "17 is on the front as it was after several generations: --trial, one of 17@3, 17@5",
        ),
        ("17@4", "trial 17@4 is not on the front, which has 17@3, 3@1, 17@5"),
        ("x", "trial x is not on the front"),
    ):
        with pytest.raises(ValueError, match=said):
            _chosen(result, which)


def test_the_order_of_objectives_is_part_of_what_a_sweep_is(swept):
    """By it the journal's numbers are told apart."""
    result, _ = swept
    other = {**ABOUT, "metric": dict(reversed(METRIC.items())), "points": [{"log_rate": 0.125}]}
    with pytest.raises(SweepError, match="metric"):
        sweep(result.where, **other).run()
    assert list(SweepResult.from_storage(result.where).front[0].scores) == list(METRIC)


def test_the_front_is_drawn(swept, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (the extra report)")
    swept[0].plot(tmp_path / "front.png")
    assert (tmp_path / "front.png").stat().st_size > 1000


def test_a_front_holds_no_checkpoints_but_its_own_trials(swept):
    result, _ = swept
    entry = Journal(result.where).last[-1]
    files = {member["checkpoint"].file for member in entry["front"] if member["generation"] < 3}
    assert files
    assert all("/winner-" in file for file in files)
    damaged = Path(result.where, min(files))
    whole = damaged.read_bytes()
    try:
        damaged.unlink()
        found = [finding.text for finding in check.check_storage(result.where) if not finding.whole]
        assert len(found) == 1
        (own, *_) = [m for m in entry["front"] if m["checkpoint"].file == min(files)]
        assert re.search(rf"The front's weights of trial .*\b{own['trial']}\b.*: replay", found[0])
    finally:
        damaged.write_bytes(whole)


def test_a_sweep_begins_with_the_best_of_another(swept, tmp_path):
    result, _ = swept
    given = points_from(result.where, 3)
    assert len(given) == 3
    on_front = {round(t.settings["log_rate"], 9) for t in result.front}
    assert {round(point["log_rate"], 9) for point in given} <= on_front
    several = len({tuple(trial.settings.items()) for trial in result.front[:3]})
    three = [(given, 3), (result.front[:3], several), ({"storage": result.where, "best": 3}, 3)]
    for taken, count in three:
        made = sweep(tmp_path, points=read(taken)).identity.points
        assert len(made) == count
        assert all(0.001 <= point["log_rate"] <= 0.3 for point in made)


@pytest.mark.slow
def test_a_trial_of_the_front_is_computed_again_to_the_bit(swept):
    result, _ = swept
    trial = min(result.front, key=lambda trial: trial.generation)
    chex.assert_trees_all_equal(result.replay(trial), trial.state, strict=True)
    assert len(result.schedule_of(trial)) <= trial.generation + 1
    first = SweepResult.from_storage(result.where)
    assert [t.number for t in first.front] == [t.number for t in result.front]


def test_runs_one_after_the_other_are_one_run(tmp_path, numpy_steps):
    """Of two objectives, with new trials from Optuna, and with points."""
    pytest.importorskip("optuna", reason="optuna is not installed (the extra trackers)")
    about = {
        "metric": {"val_loss": "min", "hyperparams.log_rate": "max"},
        "sampler": OptunaSampler("TPESampler", n_startup_trials=6),
        "scheduler": RandomSearch(trial_generations=2),
        "points": [{"log_rate": 0.2}, {}],
    }
    straight = sweep(tmp_path / "a", generations=5, **about).run()
    for generations in (2, 5):
        again = about | {"sampler": OptunaSampler("TPESampler", n_startup_trials=6)}
        parts = sweep(tmp_path / "b", generations=generations, checkpoint_every=3, **again).run()
    for name, column in straight.table.items():
        assert parts.table[name].tobytes() == column.tobytes(), name
    assert len(parts.front) == len(straight.front)
    for one, other in zip(parts.front, straight.front, strict=True):
        assert (one.number, one.scores, one.lineage) == (other.number, other.scores, other.lineage)
        for name, array in other.arrays.items():
            assert one.arrays[name].tobytes() == array.tobytes(), name
    with pytest.raises(SweepError, match="holds another run: its sampler is"):
        sweep(tmp_path / "b", generations=6, **about | {"sampler": None}).run()


@pytest.mark.slow
def test_a_study_of_optuna_has_all_objectives(swept, tmp_path):
    optuna = pytest.importorskip("optuna", reason="optuna is not installed (the extra trackers)")
    result, _ = swept
    url = f"sqlite:///{tmp_path}/study.db"
    said, status = command("export", result.where, "--optuna", url, "--study", "two")
    assert status == 0, said
    study = optuna.load_study(study_name="two", storage=url)
    assert [direction.name for direction in study.directions] == ["MINIMIZE", "MAXIMIZE"]
    final = dict(zip(result.final["trial"].tolist(), scores(result.final).tolist(), strict=True))
    for trial in study.trials:
        if trial.state.name == "COMPLETE":
            loss, norm = trial.values
            assert final[trial.user_attrs["trial"]] == pytest.approx([loss, -norm])
    best = {trial.user_attrs["trial"] for trial in study.best_trials}
    assert {t.number for t in result.front if t.number in final} & best


def test_patience_counts_generations_that_bring_nothing_to_the_front(tmp_path, numpy_steps):
    stop = gradhpo.Stop(patience=2)
    metric = ["hyperparams.log_rate", "diverged_at"]
    about = {"generations": 30, "scheduler": RandomSearch(), "metric": metric, "stop": stop}
    result = sweep(tmp_path, **about).run()
    assert result.generations == 3
    assert result.stopped == "2 generations without a trial for the front, patience=2"
    assert len(result.front) == 1


@pytest.mark.slow
def test_a_kill_at_any_file_operation_changes_no_bit(tmp_path):
    pytest.importorskip("optuna", reason="optuna is not installed (the extra trackers)")
    groups = [(1, "objectives"), (3, "objectives"), (3, "sampler"), (2, "race")]
    place = MEMORY if os.access(MEMORY, os.W_OK) else tmp_path
    with tempfile.TemporaryDirectory(dir=place) as folder:
        about = [(every, 1, 47, kind) for every, kind in groups]
        killed = kills_of("kill_searches", folder, *about)
    assert len(killed) == len(groups)
    assert min(killed) > 3
