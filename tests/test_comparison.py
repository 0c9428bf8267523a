"""The page that compares with peers: what its script counts, checks and writes."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PEERS = ROOT / "benchmarks" / "peers"
sys.path.append(str(PEERS))

import agreement  # noqa: E402
import compare  # noqa: E402
import comparison_page  # noqa: E402
import contenders  # noqa: E402
import counted_lines  # noqa: E402
import inputs  # noqa: E402
import numpy as np  # noqa: E402
import populations  # noqa: E402

PAGE = ROOT / "docs" / "comparison.md"
MEASURED = {
    "distance": 4.2e-5,
    "ms": [1.0, 2.0, 3.5],
    "ratio": [1.5, 1.75, 2.0],
    "whole": 4.25,
    "mebibytes": 401.4,
}


def test_counts_the_marked_lines_of_a_case(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import x\n# peer: all\na = 1\n\n    # why\n# end\nb = 2\n"
        "    # peer: one two\n    c = 3\n    d = 4\n    # end\n# peer: three\ne = 5\n# end\n"
    )
    assert [counted_lines.count(script, case) for case in ("one", "three", "four")] == [3, 2, 1]


@pytest.mark.parametrize("text", ["# peer: a\nb\n", "# peer: a\n# peer: b\n# end\n", "a\n# end\n"])
def test_marks_that_do_not_pair_are_refused(tmp_path, text):
    script = tmp_path / "script.py"
    script.write_text(text)
    with pytest.raises(ValueError, match="mark"):
        counted_lines.count(script, "a")


def test_every_peer_of_a_case_has_marked_lines():
    for name, case in contenders.CASES.items():
        for peer in case.peers:
            script = PEERS / "scripts" / f"{contenders.PEERS[peer].script}.py"
            assert counted_lines.count(script, name) > 2, (name, peer)
            assert f'"{name}"' in script.read_text() or peer in ("torchopt", "func"), (name, peer)


def test_every_environment_is_pinned():
    for peer in contenders.PEERS.values():
        for line in (PEERS / "requirements" / f"{peer.environment}.txt").read_text().splitlines():
            assert line.startswith("#") or "==" in line or line == "numpy>=2,<3", line


def test_a_row_has_quartiles_and_what_was_measured():
    row = comparison_page.row("One-Step", "TorchOpt", MEASURED, 14)
    assert row[:4] == ["One-Step", "TorchOpt", "2.00 (1.00–3.50)", "1.75 (1.50–2.00)"]
    assert row[4:] == ["4.2", "401", "14", "4e-05"]
    assert len(row) == len(comparison_page.COLUMNS)


def test_filling_keeps_the_prose():
    page = f"before\n{comparison_page.BEGIN}\nold\n{comparison_page.END}\nafter\n"
    once = comparison_page.filled(page, "new")
    assert once.startswith("before\n")
    assert once.endswith("\nafter\n")
    assert "old" not in once
    assert comparison_page.filled(once, "new") == once
    with pytest.raises(ValueError, match="once each"):
        comparison_page.filled(page + page, "new")


def rows_of(page):
    """Return the rows of a page's tables of peers, each found to be one that the script writes."""
    lines = page.partition(comparison_page.BEGIN)[2].partition(comparison_page.END)[0].splitlines()
    tables = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    heads = [row for row in tables if row == comparison_page.COLUMNS]
    assert len(heads) == sum(f"### {title}" in lines for title in compare.TITLES.values())
    titles = {case.title: name for name, case in contenders.CASES.items()}
    peers = {peer.title: name for name, peer in contenders.PEERS.items()}
    rows = [row for row in tables if row[0] in titles]
    for row in rows:
        peer, case = peers[row[1]], titles[row[0]]
        assert peer in contenders.CASES[case].peers
        assert row[6] == str(compare.lines(peer, case)), row
        assert len(row) == len(comparison_page.COLUMNS)
    return rows


def test_all_that_is_measured_is_written():
    found = {
        f"{model}/{name}": dict.fromkeys(case.peers, MEASURED)
        for name, case in contenders.CASES.items()
        for model in case.models
    }
    found["machine"] = compare.machine()
    rate = {"rate": 7000.0, "startup": 20.0, "mebibytes": 900.0}
    found["population"] = dict.fromkeys(populations.WAYS, rate)
    page = comparison_page.filled(PAGE.read_text(), compare.measured(found))
    expected = sum(len(case.peers) * len(case.models) for case in contenders.CASES.values())
    assert len(rows_of(page)) == expected
    assert "| Ray Tune | 7,000 | 20.0 | 900 |" in page


def test_the_page_is_what_the_script_writes():
    """The tables of the page are those of the script: its columns, its cases, its counted lines."""
    page = PAGE.read_text()
    rows_of(page)
    assert comparison_page.filled(page, "x").count(comparison_page.END) == 1


def test_agreement_is_checked_by_name():
    ours = {"hypergradient": [3.0, 4.0], "losses": [1.0, 1.0, 1.0, 1.0, 1.0]}
    near = {"hypergradient": [3.0, 4.001], "losses": ours["losses"]}
    assert 1e-4 < agreement.check("betty", "mlp", "darts", near, ours) < 1e-3
    far = ours | {"hypergradient": [3.0, 4.1]}
    with pytest.raises(SystemExit, match="betty's hypergradient of darts on mlp does not agree"):
        agreement.check("betty", "mlp", "darts", far, ours)
    with pytest.raises(SystemExit, match=r"betty's losses .* do not agree"):
        agreement.check("betty", "mlp", "darts", near | {"losses": [1.0, 1.1, 1, 1, 1]}, ours)
    with pytest.raises(SystemExit, match="does not agree"):
        agreement.check("betty", "mlp", "darts", ours | {"hypergradient": [np.nan, 1]}, ours)
    for peer, case in contenders.ANOTHER:
        assert agreement.check(peer, "mlp", case, far, ours) > 1e-3
    with pytest.raises(SystemExit, match=r"0\.1\.3's hypergradient of t1-t2 on mlp agrees"):
        agreement.check("0.1.3", "mlp", "t1-t2", ours, ours)


def test_all_peers_read_the_same_inputs(tmp_path):
    for name in ("a", "b"):
        inputs.write(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with np.load(tmp_path / "a") as file:
        assert file["mlp.index"].shape == (inputs.STEPS, inputs.UNROLL, 256)
        assert file["mlp/w1"].dtype == np.float32
        assert sum(file[f"mlp/{name}"].size for name in ("w0", "w1", "w2")) == 64 * 256 + 256 * 266
