"""What a sweep keeps inside a generation, and measures over a whole set at its end."""

import dataclasses
import itertools

import numpy as np
import pytest

from gradhpo.cluster import SearchSpace, SweepError, SweepResult, loguniform
from tests import sweep_problems
from tests.sweeps import assert_same_tables, sweep


def validation(data):
    """All rows of the validation set."""
    return data[32:]


def measures_it_too():
    """A problem with a metric of the name that `validation=` takes."""
    return dataclasses.replace(
        sweep_problems.problem(), metrics=lambda w, lam, data: {"validation_loss": w.sum()}
    )


def on_the_host():
    """The same problem on batches of the host, whose data are for validation alone."""
    rows = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32) + 1
    return dataclasses.replace(
        sweep_problems.problem(), batch=None, batches=lambda: itertools.repeat((rows, rows))
    )


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return sweep(tmp_path_factory.mktemp("plain"), generations=3, steps_per_generation=6).run()


@pytest.mark.slow
def test_every_nth_step_is_kept_without_another_compile_or_other_numbers(tmp_path, plain):
    about = {"steps_per_generation": 6, "record": 2}
    assert sweep(tmp_path, generations=1, **about).run().report.compiles == 1
    result = sweep(tmp_path, generations=3, **about).run()
    assert result.report.compiles == 0  # it is in this process already
    assert_same_tables(result, plain)
    curves = result.curves
    assert curves["val_loss"].shape == (3 * 3 * 12,)
    last = curves["step"] == 6
    for name in ("val_loss", "train_loss", "hypergrad_norm"):
        assert curves[name].dtype == plain.table[name].dtype
        np.testing.assert_array_equal(curves[name][last], plain.table[name])
    for name in ("generation", "slot", "trial"):
        np.testing.assert_array_equal(curves[name][last], plain.table[name])
    assert set(curves["step"].tolist()) == {2, 4, 6}
    # Steps in between are those of a sweep with shorter generations, before anybody is copied.
    short = sweep(tmp_path / "short", generations=1, steps_per_generation=2).run()
    first = (curves["generation"] == 0) & (curves["step"] == 2)
    np.testing.assert_array_equal(curves["val_loss"][first], short.table["val_loss"])
    read = SweepResult.from_storage(tmp_path)
    np.testing.assert_array_equal(read.curves["val_loss"], curves["val_loss"])


@pytest.mark.slow
def test_curves_end_where_a_trial_diverges(tmp_path):
    space = SearchSpace(hyperparams={"log_rate": loguniform(1e-3, 1e20, stored="log")})
    about = {"generations": 1, "steps_per_generation": 30, "space": space}
    result = sweep(tmp_path, record=1, **about).run()
    losses = result.curves["val_loss"].reshape(30, 12)
    diverged = result.final["diverged_at"]
    assert ((diverged > 1) & (diverged < 30)).any()
    for slot, step in enumerate(diverged.tolist()):
        finite = np.isfinite(losses[:, slot])
        assert finite[: step - 1 if step else None].all()
        assert not step or not finite[step - 1 :].any()


@pytest.mark.slow
def test_the_host_keeps_curves_too(tmp_path):
    about = {"problem": f"{__name__}:on_the_host", "generations": 2, "steps_per_generation": 4}
    result = sweep(tmp_path, record=2, validation=f"{__name__}:validation", **about).run()
    curves = result.curves
    last = curves["step"] == 4
    np.testing.assert_array_equal(curves["val_loss"][last], result.table["val_loss"])
    assert np.isfinite(result.table["validation_loss"]).all()


@pytest.mark.slow
def test_a_validation_over_the_whole_set_is_one_argument(tmp_path, plain):
    about = {"generations": 3, "steps_per_generation": 6, "metric": "validation_loss"}
    result = sweep(tmp_path, validation=f"{__name__}:validation", **about).run()
    assert result.report.compiles == 1
    # The problem's own validation batch is the whole set: this is the loss of the next step's λ.
    assert result.best.metrics["validation_loss"] == result.best.score
    data, best = np.asarray(result.data), result.best
    loss = sweep_problems.problem().val_loss(best.params, best.hyperparams, data[32:])
    np.testing.assert_allclose(best.score, loss, rtol=1e-5)
    with pytest.raises(SweepError, match="holds another run: its validation is"):
        sweep(tmp_path, **about).run()
    whole = sweep(tmp_path, validation=f"{__name__}:validation", **about).run()
    assert_same_tables(whole, result)
    np.testing.assert_array_equal(
        sweep_table(result, 0, "val_loss"), sweep_table(plain, 0, "val_loss")
    )


def sweep_table(result, generation, name):
    """A column of one generation."""
    return result.table[name][result.table["generation"] == generation]


def test_what_is_wrong_with_the_arguments(tmp_path, plain):
    with pytest.raises(ValueError, match="record must be at most steps_per_generation=5, got 6"):
        sweep(tmp_path, record=6)
    with pytest.raises(SweepError, match=r"keeps no steps: Sweep\(record=n\)"):
        _ = plain.curves
    made = sweep(
        tmp_path, problem=f"{__name__}:measures_it_too", validation=f"{__name__}:validation"
    )
    with pytest.raises(ValueError, match="'validation_loss', which validation= measures"):
        made.run()
