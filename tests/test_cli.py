"""The command `gradhpo`, as a person types it."""

import contextlib
import io
import os
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest

from gradhpo.cluster import Sweep, cli
from tests.quick import slow_but
from tests.sweeps import assert_same_tables

ROOT = Path(__file__).parent.parent
TOML = """
problem = "{root}/tests/sweep_problems.py:problem"
optimizer = "{root}/tests/sweep_problems.py:optimizer"
population = 8
generations = {generations}
steps_per_generation = 5
scheduler = {{name = "PBT", quantile = 0.25, factors = [0.5, 2.0]}}
storage = "runs/a"
batching = "map"
shards = 2
seed = 3

[space.hyperparams]
log_rate = {{loguniform = [1e-3, 1.0], stored = "log"}}
"""


def gradhpo(*arguments, cwd):
    """Run the command in this process; return its status, and what it printed."""
    output, errors = io.StringIO(), io.StringIO()
    redirected = contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors)
    with contextlib.chdir(cwd), redirected[0], redirected[1], pytest.raises(SystemExit) as ended:
        cli.app(list(map(str, arguments)))
    status = ended.value.code
    if isinstance(status, str):  # as Python does where nobody catches it
        errors.write(status)
        status = 1
    texts = {"stdout": output.getvalue(), "stderr": errors.getvalue()}
    return types.SimpleNamespace(returncode=status or 0, **texts)


def started(*arguments, cwd):
    """Start the command in a process of its own."""
    command = [sys.executable, "-m", "gradhpo.cluster", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": cwd}
    return subprocess.Popen(command, **pipes)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "sweep.toml").write_text(TOML.format(root=ROOT, generations=4))
    return tmp_path


@pytest.mark.slow
def test_a_sweep_from_beginning_to_end(folder):
    track = ("--track", "csv=runs/a.csv")
    started = gradhpo("sweep", "sweep.toml", "--executor", "local", *track, cwd=folder)
    assert started.returncode == 0, started.stderr
    assert "generation 4/4: val_loss best" in started.stderr
    assert "the step was compiled 1 time and" in started.stdout
    assert "\x1b" not in started.stderr + started.stdout  # not a terminal
    more = gradhpo("resume", "runs/a", "--generations", 6, "--plot", "a.png", *track, cwd=folder)
    assert more.returncode == 0, more.stderr
    assert len((folder / "runs/a.csv").read_text().splitlines()) == 1 + 6 * 8
    assert "4 generations are done; going on" in more.stderr
    assert (folder / "a.png").stat().st_size > 10_000
    status = gradhpo("status", "runs/a", cwd=folder).stdout
    assert "runs/a: complete, 6 of 6 generations" in status
    best = gradhpo("best", "runs/a", "--output", "best.npz", cwd=folder)
    assert "lineage: " in best.stdout
    assert re.search(r"\['log_rate'\] = -?\d", best.stdout)
    with np.load(folder / "best.npz", allow_pickle=False) as arrays:
        assert arrays[".params"].shape == (4,)
    straight = Sweep.from_toml(
        folder / "sweep.toml", generations=6, storage=str(folder / "b"), executor="local"
    )
    resumed = Sweep.from_storage(folder / "runs/a").result()
    assert_same_tables(resumed, straight.run())
    (folder / "sweep.toml").write_text(TOML.format(root=ROOT, generations=4).replace("= 3", "= 4"))
    other = gradhpo("sweep", "sweep.toml", "--executor", "local", cwd=folder)
    assert other.returncode == 1
    assert "holds another run: its seed is 3, here 4" in other.stderr
    assert "Traceback" not in other.stderr


@pytest.mark.slow
def test_ctrl_c_saves_and_prints_the_command_that_goes_on(folder):
    (folder / "sweep.toml").write_text(TOML.format(root=ROOT, generations=2000))
    process = started("sweep", "sweep.toml", "--executor", "local", cwd=folder)
    journal = folder / "runs/a/journal.jsonl"
    end = time.monotonic() + 60
    while not journal.exists() or len(journal.read_bytes().splitlines()) < 3:
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.02)
    status = gradhpo("status", "runs/a", cwd=folder).stdout
    assert f"running (process {process.pid} on host" in status
    refused = gradhpo("resume", "runs/a", cwd=folder)
    assert refused.returncode == 1
    assert f"in use by another sweep: process {process.pid}" in refused.stderr
    os.kill(process.pid, signal.SIGINT)
    output, errors = process.communicate(timeout=30)
    assert process.returncode == 130, errors
    assert "SIGINT: finishing this generation" in errors
    assert f"gradhpo resume {folder}/runs/a" in errors
    assert "Best: trial" in output
    done = len(journal.read_bytes().splitlines())
    command = re.search(r"gradhpo (resume \S+)", errors).group(1).split()
    with open(folder / "runs/a/events.jsonl", "a") as events:
        events.write('{"time": 1, "ev')  # as a kill leaves it
    assert f"not running, {done} of 2000" in gradhpo("status", "runs/a", cwd=folder).stdout
    again = gradhpo(*command, "--generations", done + 1, cwd="/")
    assert again.returncode == 0, again.stderr
    assert f"{done} generations are done" in again.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ("population = 8", "populatoin = 8"),
            "unknown name 'populatoin' (did you mean 'population'?)",
        ),
        (("seed = 3", "seed = ["), "sweep.toml is not TOML: "),
        (("seed = 3", 'seed = "x"'), "seed must be an integer"),
        (("generations = 4", ""), "generations is missing"),
        (("loguniform", "lognormal"), "log_rate must be {uniform"),
        (('"PBT"', '"Hyperband"'), "PB2, SuccessiveHalving, ASHA, RandomSearch, got 'Hyperband'"),
    ],
)
def test_a_file_with_a_mistake(folder, change, message):
    path = folder / "sweep.toml"
    path.write_text(path.read_text().replace(*change))
    with pytest.raises((ValueError, TypeError)) as caught:
        Sweep.from_toml(path)
    assert message in str(caught.value)
    assert not (folder / "runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize("command", slow_but(["resume", "status", "best", "check"], "status"))
def test_no_such_sweep(tmp_path, command):
    done = gradhpo(command, tmp_path / "nothing", cwd=tmp_path)
    assert done.returncode == 1
    assert "there is no sweep in" in done.stderr
    assert "Traceback" not in done.stderr
