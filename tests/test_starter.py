"""`gradhpo init` writes what runs as it is; `gradhpo doctor` says what there is."""

import jax
import optax
import pytest

import gradhpo
from gradhpo.cluster import Sweep, doctor
from tests.test_stopping import command


@pytest.mark.slow
def test_what_init_writes_runs_and_finds_something(tmp_path, monkeypatch):
    said, status = command("init", tmp_path / "first")
    assert status == 0
    assert "gradhpo sweep sweep.toml" in said
    monkeypatch.chdir(tmp_path / "first")
    made = Sweep.from_toml(
        "sweep.toml", executor="local", generations=3, batching="map", progress=False
    )
    result = made.run()
    assert result.final["test_loss"].min() < 1.0  # targets have a variance of 2.25
    said, status = command("init", tmp_path / "first")
    assert "problem.py is there already" in said
    assert status == 1


def test_the_doctor_names_devices_versions_and_what_is_missing(monkeypatch):
    found = "\n".join(doctor.findings())
    assert f"gradhpo {gradhpo.__version__}" in found
    assert f"optax {optax.__version__}" in found
    assert f"{len(jax.devices())} × " in found
    monkeypatch.setattr(doctor, "_there", lambda name: name not in ("wandb", "ray"))
    found = "\n".join(doctor.findings())
    assert "wandb not installed" in found
    assert "pip install 'gradhpo[cluster,trackers]'" in found


@pytest.mark.parametrize("ray", [True, False])
def test_the_doctor_says_what_a_sweep_would_use(monkeypatch, ray):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: object() if ray else None)
    said = [line for line in doctor.findings() if line.startswith("a sweep ")]
    (line,) = said
    assert ("joins the Ray at RAY_ADDRESS=10.0.0.1:6379" in line) is ray
    assert ("runs in this process" in line) is not ray
