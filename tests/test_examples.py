"""The examples run on a small budget."""

import difflib
import functools
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from typer.testing import CliRunner

import gradhpo

ROOT = Path(__file__).parent.parent


def load(name):
    """Import an example as the script that it is."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / f"examples/{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_tuned_training_loop_is_the_plain_one_with_few_changed_lines():
    plain, tuned = (
        (ROOT / f"examples/training_loop{kind}.py").read_text().splitlines()
        for kind in ("_plain", "")
    )
    changed = [line for line in difflib.ndiff(plain, tuned) if line[0] in "+-"]
    assert len(changed) < 40


@pytest.mark.slow
def test_the_tuned_training_loop_runs(monkeypatch, capsys):
    tuned, plain = load("training_loop"), load("training_loop_plain")
    tune, made = tuned.tune, []
    monkeypatch.setattr(tuned, "tune", lambda *given: made.append(tune(*given)) or made[-1])
    for module in (plain, tuned):
        monkeypatch.setattr(module, "STEPS", 20)
        module.main(seeds=1)
    found = re.findall(r"test accuracy (0\.\d+) ± 0\.0000, 1 seeds", capsys.readouterr().out)
    assert len(found) == 2
    assert all(float(accuracy) > 0.2 for accuracy in found)
    (settings,) = made
    assert all(settings[name] != tuned.USUAL[name] for name in settings)


@pytest.mark.slow
def test_the_area_under_the_curve_is_the_known_one():
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(0)
    positive, score = rng.random(50) < 0.3, rng.integers(0, 10, 50).astype(np.float32)
    area = load("hyperclean_digits").area_under_curve(np.asarray(positive), np.asarray(score))
    np.testing.assert_allclose(area, roc_auc_score(positive, score), rtol=1e-6)


def run_example(name, *arguments):
    import typer

    app = typer.Typer()
    app.command()(load(name).main)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.slow
def test_hyperclean_digits(tmp_path):
    """A method of the demo, a sweep on a Ray that it starts and stops; and resumed."""
    figure = tmp_path / "figure.png"
    some = ["--protocol", "tiny", "--trials", "2", "--workers", "1", "--method", "first-order"]
    some += ["--storage", str(tmp_path / "sweeps"), "--output", str(figure)]
    command = [sys.executable, "examples/hyperclean_digits.py", *some]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"│ +1 \+ 0 │", done.stdout)) == 1  # one compile, and no load
    assert figure.stat().st_size > 20_000
    figure.unlink()
    again = run_example("hyperclean_digits", *some, "--resume", "--executor", "local")
    assert again.count("2 generations are done") == 1
    assert figure.exists()
    for output in (done.stdout, again):
        assert re.search(r"weights\s+unmoved:\s+yes", output)
    numbers = [
        re.findall(r"PBT alone.*?│(.*?)│(.*?)│(.*?)│(.*?)│", text) for text in (done.stdout, again)
    ]
    assert numbers[0] == numbers[1] != []


@pytest.mark.slow
def test_every_method_of_the_demo_gives_its_weights_a_hypergradient():
    demo = load("hyperclean_digits")
    problem = demo.problem("tiny", 0.3)
    for method in {*demo.METHODS.values()} - {"first-order"}:
        found = jax.eval_shape(functools.partial(moved, demo.optimizer(method), problem))
        assert found["weights"].shape == (80,)


def moved(optimizer, problem):
    """λ after a step; a λ without a hypergradient would be told there."""
    key = jax.random.key(0)
    batches = problem.draw_at(key, 0, problem.start_data(key))
    task = gradhpo.Task(*batches, problem.train_loss, problem.val_loss)
    return optimizer.advance(optimizer.init(*problem.start(key)), task).hyperparams


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


@pytest.mark.slow
def test_search_digits(tmp_path):
    """Two searches of one program; begun again, they are not computed again."""
    figure, line = tmp_path / "figure.png", r"│ (.+?) +│ +(\d\.\d{4}) │.*│ +(\d+) │ +(\d+) │"
    sizes = ["--population", "6", "--generations", "3", "--steps", "1", "--seeds", "1"]
    places = ["--storage", str(tmp_path / "sweeps"), "--output", str(figure)]
    some = ["--search", "PB2 + Optuna", "--search", "random search"]
    output = run_example("search_digits", *sizes, *places, *some)
    assert re.search(r"compiled: 1, for 2\s+sweeps", output)
    assert figure.stat().st_size > 20_000
    found = re.findall(line, output)
    # One of six loses at a time: the first is followed by a new trial, the second by a copy.
    counts = {name.strip(): (new, copies) for name, _, new, copies in found}
    assert counts == {"PB2 + Optuna": ("7", "1"), "random search": ("6", "0")}
    again = run_example("search_digits", *sizes, *places, *some, "--resume")
    assert re.search(r"compiled: 0, for 0\s+sweeps", again)
    assert re.findall(line, again) == found


@pytest.mark.slow
def test_mixture(tmp_path):
    figure = tmp_path / "figure.png"
    tiny = "--seeds 1 --generations 2 --steps 2 --parts 2 --workers 1 --executor local"
    places = ["--storage", str(tmp_path), "--output", str(figure)]
    output = run_example("mixture", *tiny.split(), *places)
    assert [output.count(name) for name in ("uniform", "the swarm's best")] == [1, 1]
    # Two trials at 2.7 trainings each; the swarm is six models.
    assert re.search(r"the swarm's best .* 6\.0 ", output)
    assert float(re.search(r"tuned run costs (\d+\.\d)", output)[1]) < 3.5
    assert figure.stat().st_size > 10_000


def test_diagnose_names_the_solvers_that_it_compares():
    import optax

    made = load("diagnose").solvers("layers", optax.sgd(0.1), 4)
    for name, optimizer in made.items():
        if name != "one-step":
            solver, rank, ridge = name.split()
            assert solver == optimizer.solver
            assert (rank, ridge) == (f"K={optimizer.K}", f"ρ={optimizer.damping:g}")
            assert optimizer.unroll_steps == 4
    assert {name.split()[0] for name in made} == {"one-step", "cg", "nystrom", "kfac"}
