"""The report in headless Chromium: it opens, is clicked and read back, and asks for nothing."""

import contextlib
import importlib.util

import jax
import numpy as np
import pytest

import gradhpo
from gradhpo.cluster import shard, write_report
from gradhpo.cluster.reporting import report_server
from gradhpo.cluster.result import SweepResult
from tests import file_operations, small
from tests.browser import BROWSER, browser
from tests.sweeps import sweep

PLOTLY = importlib.util.find_spec("plotly")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PLOTLY is None, reason="plotly is not installed (the extra report)"),
    pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed (Debian's: chromium)"),
]
ROW = "document.querySelectorAll('#coordinates tbody tr')[{}].children[{}].textContent"


@pytest.fixture(scope="module")
def page():
    with browser() as found:
        yield found


@contextlib.contextmanager
def numpy_steps():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard, "Variant", file_operations.Variant)
        yield


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """A sweep of a few lines of NumPy, whose folder has a name that would be HTML."""
    with numpy_steps():
        folder = tmp_path_factory.mktemp("page") / "a <b onmouseover=alert(1)>sweep&lt;"
        return sweep(folder, generations=8).run()


def shown(page, selector):
    return page.value(f"document.querySelector({selector!r}).textContent")


def drawn(section):
    return f"document.getElementById('chart-{section}').data"


def near(page, name):
    """Go to a section until it is drawn: those above grow as they are."""
    go = f"document.getElementById({name!r}).scrollIntoView({{behavior: 'instant'}})"
    parts = ", ".join(f"#{name} {part}" for part in (".main-svg", "canvas", "table"))
    page.until(f"({go}, document.querySelector('{parts}'))")


def test_it_fits_a_small_screen_and_is_dark_where_others_are(page, result, tmp_path):
    page.open(write_report(result.where, tmp_path / "report.html").as_uri(), width=412, dark=True)
    assert float(shown(page, "#best")) == pytest.approx(result.best.score, rel=1e-3)
    near(page, "curves")
    assert page.value("document.documentElement.scrollWidth") <= 412
    turns_the_theme(page, "dark")
    assert page.errors == []


def turns_the_theme(page, before):
    """Click for the other theme, and see another color."""
    assert page.value("document.documentElement.dataset.theme") == before
    paper = "getComputedStyle(document.body).backgroundColor"
    color = page.value(paper)
    page.click("#theme")
    assert page.value("document.documentElement.dataset.theme") != before
    assert page.value(paper) != color


def test_it_opens_is_clicked_and_read_back(page, result, tmp_path):
    path = write_report(result.where, tmp_path / "report.html")
    page.requests.clear()
    page.open(path.as_uri(), width=1280, dark=False)
    assert shown(page, "h1") == "a <b onmouseover=alert(1)>sweep&lt;"
    assert float(shown(page, "#best")) == pytest.approx(result.best.score, rel=1e-3)
    assert shown(page, "#done") == "8 / 8"
    assert shown(page, "#lineage") == " → ".join(map(str, result.best.lineage))
    assert page.value("document.documentElement.scrollWidth") <= 1280

    near(page, "curves")
    best = page.value(f"{drawn('curves')}.find(t => t.name === 'best so far').y")
    loss = result.table["val_loss"].reshape(8, -1)
    np.testing.assert_allclose(best, np.minimum.accumulate(loss.min(axis=1)), rtol=1e-6)
    near(page, "settings-over-time")
    jumps = page.value("document.getElementById('chart-settings-over-time').dataset.jumps")
    assert int(jumps) == sum(bool(turn.changes) for turn in result.schedule[1:])
    near(page, "descent")

    # The best trial of the table is chosen: it is drawn, and told; once more, and it is not.
    near(page, "coordinates")
    number = int(page.value(ROW.format(1, 0)))
    page.click("#coordinates tbody tr:nth-child(2)")
    assert f"Trial {number}, after generation" in shown(page, "#chosen")
    near(page, "curves")
    page.until(f"{drawn('curves')}.some(t => t.name === 'trial {number}')")
    page.click("#chosen button")
    assert page.value("document.getElementById('chosen').style.display") == "none"

    turns_the_theme(page, "light")
    asked = [url for url in page.requests if not url.startswith(("data:", "blob:"))]
    assert asked == [path.as_uri()]
    assert page.errors == []


def test_an_axis_keeps_a_part_of_the_trials(page, result, tmp_path):
    path = write_report(result.where, tmp_path / "report.html")
    page.open(path.as_uri())
    near(page, "coordinates")
    every = len(set(result.table["trial"].tolist()))
    assert shown(page, "#kept-trials") == f"{every} of {every} trials"
    where = "{block: 'center', behavior: 'instant'}"
    page.value(f"document.getElementById('axes').scrollIntoView({where})")
    left, top, wide, tall = page.value(
        "(({x, y, width, height}) => [x, y, width, height])"
        "(document.querySelector('#axes canvas').getBoundingClientRect())"
    )
    at = left + wide - 52  # the last axis: the score
    for kind, y in (("mousePressed", 0.97), ("mouseMoved", 0.7), ("mouseReleased", 0.6)):
        page.mouse(kind, at, top + y * tall)
    kept = int(shown(page, "#kept-trials").split()[0])
    assert 0 < kept < every
    assert page.value(ROW.format(0, 0)) == str(result.best.number)
    page.click("#coordinates .tools button")
    assert shown(page, "#kept-trials") == f"{every} of {every} trials"
    assert page.errors == []


def test_it_grows_while_a_sweep_does(page, tmp_path):
    with numpy_steps():
        sweep(tmp_path / "grows", generations=3).run()
        with report_server(tmp_path / "grows") as server:
            page.requests.clear()
            page.open(server.address)
            near(page, "curves")
            assert shown(page, "#done") == "3 / 3"
            sweep(tmp_path / "grows", generations=6).run()
            page.until("document.getElementById('done').textContent === '6 / 6'")
            page.until(f"{drawn('curves')}.find(t => t.name === 'median').y.length === 6")
    best = SweepResult.from_storage(tmp_path / "grows").best.score
    assert float(shown(page, "#best")) == pytest.approx(best, rel=1e-3)
    asked = [url for url in page.requests if not url.startswith(("data:", "blob:"))]
    assert {url.split("?")[0] for url in asked} == {server.address, f"{server.address}data"}
    assert page.errors == []


def test_a_single_run(page, tmp_path):
    problem = gradhpo.Problem(
        small.start, small.train_loss, small.val_loss, batch=lambda key: (small.BATCH, small.BATCH),
        metrics=lambda w, lam: {"size": w @ w},
    )  # fmt: skip
    optimizer = gradhpo.OneStepOptimizer(small.INNER, small.OUTER)
    run = tmp_path / "run"
    found = gradhpo.solve(
        problem, optimizer, 30, jax.random.key(0), checkpoint=run, every=10, progress=False,
        eval_every=10, record=["decay"],
    )  # fmt: skip
    path = write_report(run, tmp_path / "run.html")
    page.requests.clear()
    page.open(path.as_uri())
    assert shown(page, "#done") == "30"
    near(page, "losses")
    y = page.value(f"{drawn('losses')}[0].y")
    np.testing.assert_allclose(y, found.metrics["val_loss"], rtol=1e-5)
    near(page, "lambda")
    y = page.value(f"{drawn('lambda')}[0].y")
    np.testing.assert_allclose(y, found.trajectory()["decay"], rtol=1e-5)
    near(page, "found")
    assert [url for url in page.requests if url.startswith("file")] == [path.as_uri()]
    assert page.errors == []
