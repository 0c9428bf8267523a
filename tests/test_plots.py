"""Figures of a sweep show what its table says; what a result is made of has the names of before."""

import pickle

import numpy as np
import pytest

from gradhpo.cluster import lineage, plots, report, shard, uniform
from gradhpo.cluster.plots import curves_of
from gradhpo.cluster.result import SweepResult
from tests import file_operations
from tests.sweeps import sweep

ROWS = np.array([[3.0, 2.0, 4.0], [5.0, np.nan, 2.5], [np.nan, np.inf, np.nan], [1.0, 7.0, 3.0]])


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """A sweep of a few lines of NumPy."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard, "Variant", file_operations.Variant)
        return sweep(tmp_path_factory.mktemp("drawn"), generations=4).run()


@pytest.fixture
def axes():
    figure = pytest.importorskip("matplotlib.figure", reason="matplotlib: the extra report")
    return lambda n: np.ravel(figure.Figure().subplots(1, n, squeeze=False)).tolist()


@pytest.mark.parametrize(("sign", "best"), [(1, [2, 2, 2, 1]), (-1, [4, 5, 5, 7])])
def test_curves_leave_out_what_diverged(sign, best):
    made = curves_of(ROWS, sign)
    np.testing.assert_array_equal(made.best, best)
    np.testing.assert_array_equal(made.median, [3, 3.75, np.nan, 3])
    np.testing.assert_array_equal(made.low, [2.5, 3.125, np.nan, 2])
    np.testing.assert_array_equal(made.high, [3.5, 4.375, np.nan, 5])
    assert np.isnan(curves_of(ROWS[2:3], sign).best).all()


def lines_of(axes):
    return {line.get_label(): line.get_xydata() for line in axes.get_lines()}


def test_the_metric_is_drawn(result, axes):
    (panel,) = axes(1)
    assert result.plot(panel) is panel
    lines = lines_of(panel)
    rows = result.table["val_loss"].reshape(4, -1)
    best = np.minimum.accumulate(rows.min(axis=1))
    np.testing.assert_array_equal(lines["the best so far"][:, 1], best)
    np.testing.assert_allclose(lines["the median of all trials"][:, 1], np.median(rows, axis=1))
    assert lines["the winner"][-1].tolist() == [result.best.generation, result.best.score]
    assert len(panel.get_lines()) == rows.shape[1] + 3
    assert panel.get_yscale() == "log"


def test_settings_are_drawn_as_they_were_given(result, axes, tmp_path):
    (panel,) = result.plot_settings(axes(1))
    first = lines_of(panel)["the winner"]
    turn = result.schedule[0]
    stored = result.table["hyperparams.log_rate"].reshape(4, -1)
    np.testing.assert_allclose(
        first[0], [turn.generation, np.exp(stored[turn.generation, turn.slot])]
    )
    assert (panel.get_ylabel(), panel.get_yscale()) == ("log_rate", "log")
    result.plot_settings(tmp_path / "new/settings.png")
    assert (tmp_path / "new/settings.png").stat().st_size > 5_000


def test_many_settings_have_a_panel_each_and_what_cannot_be_drawn_is_refused(axes, tmp_path):
    columns = {name: np.ones((2, 3)) for name in "abcde"}
    kinds = {name: [uniform(0, 2)] for name in columns}
    plots.draw_settings(tmp_path / "five.png", columns, kinds, [])
    made = plots.draw_settings(axes(5), columns, kinds, [])
    assert [panel.get_ylabel() for panel in made] == list("abcde")
    with pytest.raises(ValueError, match=r"plot_settings needs 5 axes to draw on, got 2"):
        plots.draw_settings(axes(2), columns, kinds, [])
    with pytest.raises(ValueError, match="searches no setting"):
        plots.draw_settings(tmp_path / "none.png", {}, {}, [])


def test_matplotlib_is_named_where_it_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'gradhpo\[report\]'"):
        plots.draw_metric(tmp_path / "a.png", ROWS, [], "val_loss", 1)


def test_what_was_pickled_before_is_found():
    for name, there in [
        ("Turn", lineage.Turn),
        ("Copy", lineage.Copy),
        ("Report", report.Report),
        ("SweepResult", SweepResult),
    ]:
        assert pickle.loads(f"cgradhpo.cluster.result\n{name}\n.".encode()) is there


def test_a_life_goes_through_the_trials_that_it_came_from(result):
    assert [turn.trial for turn in result.schedule][-1] == result.best.number
    assert list(dict.fromkeys(turn.trial for turn in result.schedule)) == result.best.lineage
    for copy in result.copies:
        assert copy.source in result.table["trial"][result.table["generation"] < copy.generation]
