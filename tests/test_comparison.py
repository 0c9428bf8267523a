"""The page that compares with peers: what its script counts, checks and writes."""

import json
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
import measuring  # noqa: E402
import memory  # noqa: E402
import numpy as np  # noqa: E402
import processes  # noqa: E402

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


def ranges(text):
    """Return a text whose ranges are not broken between lines."""
    return text.replace("–", "\u2060–\u2060")


def test_a_row_has_quartiles_and_what_was_measured():
    row = comparison_page.row("One-Step", "TorchOpt", MEASURED, 14)
    assert row[:4] == [
        "One-Step",
        "TorchOpt",
        ranges("2.00 (1.00–3.50)"),
        ranges("1.75 (1.50–2.00)"),
    ]
    assert row[4:] == ["4.2", "401", "14", "4e-05"]
    assert len(row) == len(comparison_page.COLUMNS)


def test_a_row_of_a_failure_has_no_figures_but_its_distance():
    row = comparison_page.row("CG", "Betty", {"failed": "it is off", "distance": 0.5}, 14)
    assert row == ["CG", "Betty", "–", "–", "–", "–", "14", "5e-01"]


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


def cell(case):
    return {"on": "a machine", "peers": {peer: dict(MEASURED) for peer in case.peers}}


def test_all_that_is_measured_is_written():
    cells = {
        f"{model}/{name}": cell(case)
        for name, case in contenders.CASES.items()
        for model in case.models
    }
    cells["cnn/neumann-10"]["peers"]["betty"] = {"failed": "ended with 1: no memory"}
    rate = {"rate": 7000.0, "startup": 20.0, "mebibytes": 900.0}
    stages = dict.fromkeys(memory.STAGES, 99.6)
    found = {
        "cells": cells,
        "population": {"gradhpo": rate, "tune": {"failed": "not done within 900 s"}},
        "memory": {"mlp/one-step": {"gradhpo": stages, "func": {"failed": "ended with 1"}}},
    }
    page = comparison_page.filled(PAGE.read_text(), compare.measured(found))
    expected = sum(len(case.peers) * len(case.models) for case in contenders.CASES.values())
    assert len(rows_of(page)) == expected
    assert "\nMeasured on a machine.\n" in page
    assert "\n- implicit, Neumann by Betty: ended with 1: no memory.\n" in page
    assert page.count("- T1–T2 by gradhpo 0.1.3: another hypergradient; every coordinate") == 3
    assert page.count("- implicit, CG by jaxopt: another hypergradient; the Hessian") == 1
    assert "| **gradhpo** | 7,000 | 20.0 | 900 |" in page
    assert "| Ray Tune: not done within 900 s | – | – | – |" in page
    assert f"| mlp, one-step | **gradhpo** |{' 100 |' * len(memory.STAGES)}" in page
    assert "| mlp, one-step | torch.func |" not in page


def test_the_page_is_what_the_script_writes():
    page = PAGE.read_text()
    assert len(rows_of(page)) > 20
    found = json.loads(compare.RESULTS.read_text())
    assert comparison_page.filled(page, compare.measured(found)) == page


def test_renewing_a_cell_leaves_the_others_and_its_whole_processes(tmp_path, monkeypatch):
    results, page = tmp_path / "results.json", tmp_path / "page.md"
    other, old = cell(contenders.CASES["greedy-5"]), cell(contenders.CASES["darts"])
    results.write_text(json.dumps({"cells": {"mlp/greedy-5": other, "mlp/darts": old}}))
    page.write_text(f"{comparison_page.BEGIN}{comparison_page.END}")
    new = {key: MEASURED[key] for key in ("distance", "ms")} | {"ratio": [7.0, 8.12345, 9.0]}
    measured = {"gradhpo": dict(new), "hand": dict(new), "betty": {"failed": "no answer"}}
    monkeypatch.setattr(measuring, "measure", lambda *args: measured)
    options = {"models": "mlp", "cases": "darts", "rounds": 3, "wholes": 0, "steps": 1, "ways": ""}
    options |= {"population": False, "memory_stages": False, "only_page": False, "cells": True}
    compare.main(tmp_path / "peers", **options, page=page, results=results)
    cells = json.loads(results.read_text())["cells"]
    assert cells["mlp/greedy-5"] == other
    assert cells["mlp/darts"]["peers"] == {
        **dict.fromkeys(["gradhpo", "hand"], MEASURED | {"ratio": [7.0, 8.123, 9.0]}),
        "betty": {"failed": "no answer"},
    }
    assert len(rows_of(page.read_text())) == 6


def test_agreement_is_checked():
    ours = {"hypergradient": [3.0, 4.0], "losses": [1.0, 1.0, 1.0, 1.0, 1.0]}
    near = {"hypergradient": [3.0, 4.001], "losses": ours["losses"]}
    assert 1e-4 < agreement.check("betty", "mlp", "neumann-10", near, ours) < 1e-3
    off = {"hypergradient": [3.0, 4.02], "losses": ours["losses"]}
    assert 1e-3 < agreement.check("betty", "mlp", "darts", off, ours) < 1e-2
    Disagreement = agreement.DisagreementError
    with pytest.raises(Disagreement, match=r"its hypergradient is 4\.0e-03 from ours") as raised:
        agreement.check("betty", "mlp", "neumann-10", off, ours)
    assert raised.value.distance == pytest.approx(4e-3)
    with pytest.raises(Disagreement, match="losses do not agree"):
        agreement.check("betty", "mlp", "darts", near | {"losses": [1.0, 1.1, 1, 1, 1]}, ours)
    with pytest.raises(Disagreement, match="its hypergradient is not finite"):
        agreement.check("betty", "mlp", "darts", ours | {"hypergradient": [np.nan, 1]}, ours)
    for peer, case, model in contenders.ANOTHER:
        far = ours | {"hypergradient": [3.0, 4.1]}
        assert agreement.check(peer, model or "mlp", case, far, ours) > 1e-3
    with pytest.raises(Disagreement, match="agrees, and was said not to: every coordinate"):
        agreement.check("0.1.3", "mlp", "t1-t2", ours, ours)


ANSWER = """
import json, sys
answer = {"hypergradient": [1.0, %s], "losses": [1, 1, 1, 1, 1]}
if "--steps" in sys.argv:
    sys.exit(%s)
print(json.dumps(answer), flush=True)
for line in sys.stdin:
    print(int(line) * 0.01, flush=True)
"""


def test_a_peer_that_fails_or_disagrees_leaves_the_others(tmp_path, monkeypatch):
    texts = {
        "gradhpo": ANSWER % (1, 0),
        "hand": "raise ValueError('no such thing')",
        "torchopt": ANSWER % (2, 0),
        "func": ANSWER % (1, "'too much memory'"),
    }
    for name, text in texts.items():
        (tmp_path / f"{name}.py").write_text(text)
    commands = {contenders.PEERS[name]: [sys.executable, f"{tmp_path}/{name}.py"] for name in texts}
    monkeypatch.setattr(measuring, "command", lambda folder, peer, *rest: commands[peer])
    rows = measuring.measure(tmp_path, tmp_path, "mlp", "unrolled-5", 3, 1, 10)
    assert rows["gradhpo"]["ms"] == pytest.approx([10, 10, 10])
    assert rows["gradhpo"]["ratio"] == [1, 1, 1]
    assert rows["gradhpo"]["mebibytes"] > 1
    assert rows["hand"] == {"failed": "ended with 1: ValueError: no such thing"}
    assert rows["torchopt"]["failed"] == "its hypergradient is 7.1e-01 from ours"
    assert rows["torchopt"].keys() == {"failed", "distance"}
    assert rows["func"]["failed"] == "ended with 1: too much memory"
    (tmp_path / "gradhpo.py").write_text("import sys; sys.exit(3)")
    rows = measuring.measure(tmp_path, tmp_path, "mlp", "unrolled-5", 3, 0, 10)
    assert rows["gradhpo"] == {"failed": "ended with 3: it told nothing"}
    assert rows["func"] == {"failed": "gradhpo failed, which it is held against"}


def test_a_peer_that_does_not_answer_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "LIMIT", 0.1)
    line = [sys.executable, "-c", "import time; time.sleep(100)"]
    turns = processes.Turns(line, {})
    with pytest.raises(processes.EndedError, match="no answer within"):
        turns.answer()
    turns.end()


def test_all_peers_read_the_same_inputs(tmp_path):
    for name in ("a", "b"):
        inputs.write(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with np.load(tmp_path / "a") as file:
        assert file["mlp.index"].shape == (inputs.STEPS, inputs.UNROLL, 256)
        assert file["mlp/w1"].dtype == np.float32
        assert sum(file[f"mlp/{name}"].size for name in ("w0", "w1", "w2")) == 64 * 256 + 256 * 266
