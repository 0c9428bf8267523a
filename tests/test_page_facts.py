"""What pages say of tests, files and figures is so."""

import re
import sys

import pytest

import gradhpo
from tests.public import ROOT

BASE = "BilevelOptimizer"
DOCS, BENCHMARKS = ROOT / "docs", ROOT / "benchmarks"


def table(text, title):
    """Return the rows of the table below a heading."""
    below = re.split(rf"^#+ {re.escape(title)}$", text, flags=re.MULTILINE)[1]
    rows = [line for line in below.split("\n#")[0].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_every_test_that_the_page_on_recovery_names_is_there():
    named = re.findall(r"`(test_\w+\.py)::(\w+)`", (DOCS / "recovery.md").read_text())
    assert len(named) > 50
    for file, name in named:
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(), f"{file}::{name}"


def test_every_file_that_the_page_on_contributing_names_is_there():
    text = (DOCS / "contributing.md").read_text()
    named = re.findall(r"`((?:gradhpo|parallel|cluster|tests|\.ci)/[\w./]*)`", text)
    assert len(named) > 40
    for path in named:
        assert "NAME" in path or (ROOT / path).exists(), path


def test_the_page_on_choosing_has_a_row_for_every_method():
    rows = table((DOCS / "how-to-choose.md").read_text(), "All methods")[2:]
    made = [name for name in gradhpo.__all__ if name.endswith("Optimizer")]
    assert sorted(row[0] for row in rows) == sorted(f"`{n}`" for n in made if n != BASE)
    assert all(row[1] and row[2] for row in rows)


def test_the_page_on_scaling_has_the_tables_that_were_computed():
    page, computed = DOCS / "scaling.md", (BENCHMARKS / "scaling.md").read_text()
    rows = [line for line in page.read_text().splitlines() if re.match(r"\| [\d,]+ \| [≈\d]", line)]
    assert len(rows) > 8
    assert set(rows) <= set(computed.splitlines())


@pytest.fixture
def scaling(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import scaling

    yield scaling
    for name in ("scaling", "controller", "measure"):
        sys.modules.pop(name, None)


def test_the_formulas_of_reduced_bytes_are_those_of_the_compiled_steps(scaling):
    """An MLP of 26,122 weights and λ of 257 numbers; the two losses are 8 bytes more."""
    text = (BENCHMARKS / "data_parallel.md").read_text()
    rows = table(text, "A step on several devices against one")
    mlp = [row for row in rows if row[0] == "MLP" and row[2:4] == ["shard_map", "8"]]
    seen = {row[1]: int(row[5].replace(",", "")) for row in mlp}
    seen["Greedy"] = seen.pop("Greedy, 5 steps")
    w, lam = 4 * 26_122, 4 * 257
    for method, reduced in scaling.REDUCED.items():
        # XLA's text has the last of Greedy's steps, and once the body of the loop over the others.
        assert seen[method] == reduced(w, lam, 2) + 8, method


def test_what_is_computed_follows_from_what_was_measured(scaling):
    assert scaling.cell("storage.md", "1,000,000", "MB a generation") == 96
    small, large = (scaling.line_bytes(n) for n in (100, 200))
    assert large - small == pytest.approx(100 * 131, rel=0.05)
    one, two = (scaling.grown_row(1000, 8, weights, 60.0) for weights in (10**7, 2 * 10**7))
    assert (one[1], two[1]) == ("960", "1,920")
