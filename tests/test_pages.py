"""The code of README and docs/ runs as it stands there, and what does not run says why."""

import functools
import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradhpo import mixture
from tests import pages
from tests.pages import PAGES, ROOT, blocks
from tests.quick import slow_but

WITH_CODE = [page for page in PAGES if any(b.language == "python" for b in blocks(page))]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where a page runs: its own folder, from which what it writes can be imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    pages.forget_modules(tmp_path)


@pytest.mark.parametrize("page", slow_but(WITH_CODE, "schedules"))
def test_the_code_of_a_page_runs(page, folder):
    made = pages.run(page, folder)
    if page in FOUND:
        FOUND[page](made, folder)


def test_whatever_is_not_run_says_why():
    silent = [
        f"{PAGES[page]}:{one.line}"
        for page in PAGES
        for one in blocks(page)
        if one.reason is None and one.language not in pages.TRIED
    ]
    assert not silent, "write <!-- not run: why --> in the line before"


def test_no_code_is_indented_instead_of_fenced():
    """Such a block has no language and no mark: nothing would know of it."""
    assert [page for page in PAGES if _indented(page)] == []


def test_a_mark_stands_before_a_block():
    for page in PAGES:
        marked = sum(one.reason is not None for one in blocks(page))
        assert pages.text(page).count("<!-- not run:") == marked, page


def test_no_link_is_broken_in_a_checkout():
    assert [link for page in PAGES for link in _broken(page)] == []


# --- what a page's code must have found ----------------------------------------------------------


def index(made, folder):
    assert _falls(made["solution"].metrics["val_loss"], 2)
    decays = jax.nn.sigmoid(made["solution"].state.hyperparams)
    assert decays[:2].max() < decays[2:].min() / 5
    _drawn("first", made, folder)


def readme(made, folder):
    lines = [line for line in blocks("README")[0].text.splitlines() if line.strip()]
    assert len(lines) < 10
    assert _falls(made["solution"].metrics["val_loss"], 2)


def recipes(made, folder):
    first, solution = made["first"], made["solution"]
    assert (first.steps, solution.steps) == (30, 60)
    assert _falls(solution.metrics["val_loss"], 1)
    x, y = made["x"], made["y"]
    for logits in (made["net"](x), jax.vmap(made["model"])(x)):
        assert (logits.argmax(-1) == y).mean() > 0.8


def retraining(made, folder):
    """A plain loop takes the steps of the run."""
    again = made["train"](made["moving"], (made["x"][:30], made["y"][:30]))
    np.testing.assert_allclose(again, made["solution"].state.params, rtol=1e-4, atol=1e-6)
    rates = made["solution"].record["log_rate"]
    assert rates[-1] - rates[0] > 0.5  # so a constant rate is something else
    constant = made["train"](made["constant"], (made["x"][:30], made["y"][:30]))
    assert np.abs(constant - again).max() > 1e-3
    untrained = made["loss"](jnp.zeros(20), (made["x"], made["y"]))
    for w in (made["from_best"], made["from_schedule"]):
        assert made["loss"](w, (made["x"], made["y"])) < untrained / 2


def long_runs(made, folder):
    assert made["whole"].steps == made["changed"].steps == 300
    assert {path.suffix for path in (folder / "runs/decay").iterdir()} == {".arrays", ".lock"}
    assert 10 < made["solution"].steps < 300


def implicit(made, folder):
    """The gradient is that of the closed form."""
    (x, there), (y, target) = (np.asarray(made[name], np.float64) for name in ("x", "y"))
    matrix = x.T @ x / len(y) + 0.1 * np.eye(x.shape[1])
    w = np.linalg.solve(matrix, x.T @ y / len(y))
    moves = -np.linalg.solve(matrix, w)
    expected = 2 * (there @ w - target) @ (there @ moves) / len(target)
    np.testing.assert_allclose(made["gradient"], expected, rtol=1e-3)


def training_loop(made, folder):
    assert made["tuned"]["peak"] > 3 * made["settings"]["peak"]
    assert made["after"] > made["before"] + 0.1


def schedule_and_decay(made, folder):
    found = made["found"]
    assert min(found["the last λ"], found["λ(t)"]) > found["as guessed"] + 0.05
    _drawn("schedule", made, folder)


def example_weights(made, folder):
    evals = made["solution"].evals
    assert evals["weight_of_clean"][-1] > evals["weight_of_wrong"][-1] + 0.2
    assert evals["test_accuracy"][-1] > made["plain"] + 0.03
    _drawn("weights", made, folder)


def meta_weight_net(made, folder):
    evals = made["solution"].evals
    assert evals["weight_of_clean"][-1] > evals["weight_of_wrong"][-1] + 0.1
    assert evals["test_accuracy"][-1] > made["plain"] + 0.02


def data_mixture(made, folder):
    upright, turned, worthless = made["found"]
    assert turned > upright > worthless + 0.1
    assert worthless < 0.05
    assert made["compared"].gain("One-Step") > 0.5
    mended = mixture.mean_weights(made["priced"])
    assert mended[2] > 0.15
    assert made["from_host"].record["weights"].shape == (50, 3)


def distillation(made, folder):
    assert made["distilled"] > made["plain"] + 0.1
    _drawn("distilled", made, folder)


def data_parallel(made, folder):
    np.testing.assert_allclose(made["together"], made["alone"], atol=1e-4)
    assert made["state"].step == 20


def population(made, folder):
    assert made["best"][-1] < made["best"][0]
    assert made["compiled"].counts().since(made["before"]).compiles == 0


def sweep(made, folder):
    assert made["best"].metrics["test_accuracy"] > 0.8
    assert made["longer"].generations == 7
    assert made["longer"].best.score <= made["best"].score


def cluster(made, folder):
    assert (folder / "mlp.png").stat().st_size > 10_000


FOUND = {
    "README": readme,
    "index": index,
    "recipes": recipes,
    "retraining": retraining,
    "long-runs": long_runs,
    "implicit": implicit,
    "training-loop": training_loop,
    "tutorials/schedule-and-decay": schedule_and_decay,
    "tutorials/example-weights": example_weights,
    "tutorials/meta-weight-net": meta_weight_net,
    "tutorials/data-mixture": data_mixture,
    "tutorials/distillation": distillation,
    "tutorials/data-parallel": data_parallel,
    "tutorials/population": population,
    "tutorials/sweep": sweep,
    "cluster": cluster,
}


def _falls(losses, factor):
    return losses[-1] * factor < losses[0]


def _drawn(name, made, folder):
    """The figure of a page can be drawn of what its code made."""
    spec = importlib.util.spec_from_file_location("draw", ROOT / "docs/pictures/draw.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.draw(name, made, folder).stat().st_size > 5_000


# --- reading pages --------------------------------------------------------------------------------


def _broken(page):
    """Yield the links of a page to files, or parts of them, that are not there."""
    for file, part in pages.links(page):
        path = PAGES[page].parent / file if file else PAGES[page]
        if not path.exists():
            yield f"{page}: {file}"
        elif part and path.suffix == ".md" and part not in _anchors(path):
            yield f"{page}: {file}#{part}"


@functools.cache
def _anchors(path):
    """The names that headings get: lower case, words joined by hyphens."""
    heads = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\s-]", "", head).strip().lower().replace(" ", "-") for head in heads}


def _indented(page):
    return re.search(r"(?:\A|\n)\n {4,}[^\s*-]", pages.without_code(page))
