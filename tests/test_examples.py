"""The README's code runs, and the examples run on a small budget."""

import dataclasses
import importlib.util
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def load(name):
    """Import an example as the script that it is."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / f"examples/{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_readme_has_code():
    assert BLOCKS


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.splitlines()[0])
def test_code_in_the_readme_runs(block):
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


@pytest.mark.slow
def test_hyperclean_digits(tmp_path, monkeypatch):
    import typer

    example = load("hyperclean_digits")
    small = dataclasses.replace(example.SMALL, train=80, validation=40, outer_steps=4)
    monkeypatch.setattr(example, "SMALL", small)
    app = typer.Typer()
    app.command()(example.main)
    figure = tmp_path / "figure.png"
    result = CliRunner().invoke(app, ["--seeds", "2", "--noise", "0.5", "--output", str(figure)])
    assert result.exit_code == 0, result.output
    for method in ("without HPO", "First-Order", "One-Step", "T1-T2", "Greedy", "HyperDistill"):
        assert method in result.output
    assert re.search(r"equal to the\s+bit: yes", result.output)
    assert figure.stat().st_size > 20_000


def test_detection_is_perfect_where_weights_separate():
    example = load("hyperclean_digits")
    corrupted = np.asarray([[True, False, False], [False, True, True]])
    assert example.detection(1.0 - corrupted, corrupted).tolist() == [1.0, 1.0]


def run_example(name, *arguments):
    import typer

    app = typer.Typer()
    app.command()(load(name).main)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.slow
def test_population(tmp_path):
    figure = tmp_path / "figure.png"
    settings = ["--slots", "8", "--generations", "3", "--steps", "5", "--output", str(figure)]
    output = run_example("population", *settings)
    assert re.search(r"compiled\s+after\s+the\s+first\s+generation:\s+0", output)
    assert figure.stat().st_size > 10_000


@pytest.mark.slow
def test_data_parallel():
    output = run_example("data_parallel", "--steps", "100")
    assert re.search(r"auto, fully sharded.*128 of 1024", output)
    differences = [float(x) for x in re.findall(r"([\d.e+-]+), relative", output)]
    assert len(differences) == 3
    assert max(differences) < 0.05
    clean, wrong = re.search(r"clean rows ([\d.]+), of random ones\s+(\d\.\d+)", output).groups()
    assert float(clean) > float(wrong)
