"""A sweep as an Optuna study, in Optuna's own storage."""

import numpy as np
import pytest

from gradhpo.cluster import PBT, SearchSpace, choice, loguniform, shard
from tests import file_operations
from tests.sweeps import sweep
from tests.test_stopping import command

optuna = pytest.importorskip("optuna", reason="optuna is not installed (the extra trackers)")
pytestmark = pytest.mark.filterwarnings("default")  # of other people's packages


def test_a_running_sweep_and_then_the_finished_one(tmp_path, numpy_steps):
    storage, url = tmp_path / "digits", f"sqlite:///{tmp_path}/study.db"
    space = SearchSpace(
        hyperparams={"log_rate": loguniform(1e-3, 3e-1, stored="log")},
        choices={"method": ["one-step", "first-order"]},
    )
    about = {"space": space, "scheduler": PBT(quantile=0.34), "shards": 2}

    def export(generation, table):
        if generation == 2:
            said, status = command("export", storage, "--optuna", url)
            assert status == 0, said
            assert "in the study 'digits'" in said

    sweep(storage, generations=4, **about).run(export)
    study = optuna.load_study(study_name="digits", storage=url)
    running = study.get_trials(states=[optuna.trial.TrialState.RUNNING])
    assert len(running) == 12
    result = sweep(storage, generations=4, **about).result()
    command("export", storage, "--optuna", url)
    study = optuna.load_study(study_name="digits", storage=url)
    table = result.table
    assert len(study.trials) == len(set(table["trial"].tolist())) > 12
    for trial in study.trials:
        rows = table["trial"] == trial.user_attrs["trial"]
        steps = dict(zip(table["generation"][rows], table["val_loss"][rows], strict=True))
        assert trial.intermediate_values == pytest.approx(steps)
        rate = np.exp(table["hyperparams.log_rate"][rows][0])
        assert trial.params["log_rate"] == pytest.approx(rate)
        assert trial.params["method"] == ("one-step", "first-order")[table["variant"][rows][0]]
        last = trial.user_attrs["trial"] in result.final["trial"]
        assert trial.state.name == ("COMPLETE" if last else "PRUNED")
    assert study.best_value == pytest.approx(result.final["val_loss"].min())
    copied = {(t.user_attrs["trial"], t.user_attrs["copied"]) for t in study.trials
              if "copied" in t.user_attrs}  # fmt: skip
    assert copied == {(copy.trial, copy.source) for copy in result.copies}


def test_diverged_trials_fail_and_another_study_is_not_replaced(tmp_path, monkeypatch):
    class Diverging(file_operations.Variant):
        def turn(self, state, order):
            state, columns = super().turn(state, order)
            loss = np.where(columns["hyperparams.log_rate"] > 0, np.nan, columns["val_loss"])
            return state, {**columns, "val_loss": loss}

    monkeypatch.setattr(shard, "Variant", Diverging)
    url = f"sqlite:///{tmp_path}/study.db"
    optuna.create_study(study_name="mine", storage=url)
    space = SearchSpace(hyperparams={"log_rate": choice([-3.0, 60.0])})
    result = sweep(tmp_path / "a", generations=2, space=space).run()
    said, status = command("export", tmp_path / "a", "--optuna", url, "--study", "mine")
    assert "the study 'mine' in" in said
    assert status == 1
    command("export", tmp_path / "a", "--optuna", url)
    study = optuna.load_study(study_name="a", storage=url)
    failed = {t.user_attrs["trial"] for t in study.trials if t.state.name == "FAIL"}
    ends = dict(zip(result.table["trial"].tolist(), result.table["val_loss"], strict=True))
    assert failed == {n for n, score in ends.items() if not np.isfinite(score)} != set()
    kinds = {type(t.distributions["log_rate"]).__name__ for t in study.trials if t.params}
    assert kinds == {"CategoricalDistribution"}
