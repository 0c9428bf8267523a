"""The files that run sweeps on clusters: valid as far as this machine can tell, one command."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

import pytest

from gradhpo.cluster import Sweep
from tests.devices import flags
from tests.test_cli import gradhpo

jsonschema = pytest.importorskip("jsonschema")
yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "cluster" / "deploy"
ENTRY = "gradhpo sweep sweep.toml"
PYTHON = f'#!/bin/sh\nexec "{sys.executable}" -m '

POD = {
    "type": "object",
    "required": ["spec"],
    "properties": {
        "spec": {
            "type": "object",
            "required": ["containers"],
            "properties": {
                "containers": {
                    "type": "array",
                    "minItems": 1,
                    "items": {"type": "object", "required": ["name", "image", "resources"]},
                }
            },
        }
    },
}
PARAMETERS = {"type": "object", "additionalProperties": {"type": "string"}}
# The fields of ray.io/v1 that the manifest uses, so that a misspelt one is found.
RAYJOB = {
    "type": "object",
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "additionalProperties": False,
    "properties": {
        "apiVersion": {"const": "ray.io/v1"},
        "kind": {"const": "RayJob"},
        "metadata": {"type": "object", "required": ["name"]},
        "spec": {
            "type": "object",
            "required": ["entrypoint", "rayClusterSpec"],
            "additionalProperties": False,
            "properties": {
                "entrypoint": {"type": "string"},
                "submissionMode": {"enum": ["K8sJobMode", "HTTPMode", "SidecarMode"]},
                "backoffLimit": {"type": "integer", "minimum": 1},
                "shutdownAfterJobFinishes": {"type": "boolean"},
                "ttlSecondsAfterFinished": {"type": "integer"},
                "rayClusterSpec": {
                    "type": "object",
                    "required": ["rayVersion", "headGroupSpec", "workerGroupSpecs"],
                    "additionalProperties": False,
                    "properties": {
                        "rayVersion": {"type": "string"},
                        "enableInTreeAutoscaling": {"type": "boolean"},
                        "authOptions": {"const": {"mode": "token"}},
                        "headGroupSpec": {
                            "type": "object",
                            "required": ["rayStartParams", "template"],
                            "additionalProperties": False,
                            "properties": {"rayStartParams": PARAMETERS, "template": POD},
                        },
                        "workerGroupSpecs": {
                            "type": "array",
                            "items": {
                                "type": "object",
                                "required": ["groupName", "minReplicas", "maxReplicas", "template"],
                                "additionalProperties": False,
                                "properties": {
                                    "groupName": {"type": "string"},
                                    "replicas": {"type": "integer"},
                                    "minReplicas": {"type": "integer"},
                                    "maxReplicas": {"type": "integer"},
                                    "rayStartParams": PARAMETERS,
                                    "template": POD,
                                },
                            },
                        },
                    },
                },
            },
        },
    },
}


def read(name):
    return (DEPLOY / name).read_text()


def tiny(folder, **changes):
    """Write the example's sweep.toml with small numbers; everything else stays."""
    text = read("sweep.toml")
    small = {"population": 8, "generations": 2, "steps_per_generation": 2, "shards": 2}
    for name, value in {**small, "workers": 2, "resources": "{}", **changes}.items():
        text, found = re.subn(rf"^{name} = .*$", f"{name} = {value}", text, flags=re.MULTILINE)
        assert found == 1, name
    (folder / "sweep.toml").write_text(f'batching = "map"\n{text}')
    return folder / "sweep.toml"


def sweep_settings():
    return tomllib.loads(read("sweep.toml"))


def test_the_sweep_is_one():
    made = Sweep.from_toml(DEPLOY / "sweep.toml", storage="unused", executor="local")
    assert made.layout.shards == made.place.workers == 8


def test_all_run_the_same_command():
    job = yaml.safe_load(read("rayjob.yaml"))
    assert job["spec"]["entrypoint"] == ENTRY
    assert f'ray exec cluster.yaml "cd /shared && {ENTRY}"' in read("cluster.yaml")
    assert f'\n{ENTRY} "$@" &\n' in read("slurm.sh")
    assert f"#     {ENTRY}\n" in read("sweep.toml")


def test_rayjob():
    job = yaml.safe_load(read("rayjob.yaml"))
    jsonschema.validate(job, RAYJOB)
    cluster = job["spec"]["rayClusterSpec"]
    (group,) = cluster["workerGroupSpecs"]
    for part in (cluster["headGroupSpec"], group):
        spec = part["template"]["spec"]
        (container,) = spec["containers"]
        assert container["workingDir"] == "/shared"
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounts == {"shared": "/shared"}
        assert [volume["name"] for volume in spec["volumes"]] == ["shared"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    settings = sweep_settings()
    needed = settings["workers"] * settings["resources"]["num_gpus"]
    assert limits["nvidia.com/gpu"] * group["maxReplicas"] >= needed


def test_cluster_launcher():
    spec = importlib.util.find_spec("ray")
    if spec is None:
        pytest.skip("needs Ray's schema")
    schema = json.loads((Path(spec.origin).parent / "autoscaler/ray-schema.json").read_text())
    config = yaml.safe_load(read("cluster.yaml"))
    jsonschema.validate(config, schema)
    types = config["available_node_types"]
    assert config["head_node_type"] in types
    assert all(kind.get("max_workers", 0) <= config["max_workers"] for kind in types.values())
    settings = sweep_settings()
    needed = settings["workers"] * settings["resources"]["num_gpus"]
    assert types["gpu"]["resources"]["GPU"] * types["gpu"]["max_workers"] >= needed
    starts = config["head_start_ray_commands"] + config["worker_start_ray_commands"]
    assert all("RAY_AUTH_MODE=token" in line for line in starts if "ray start" in line)


def test_slurm_script_parses():
    subprocess.run(["bash", "-n", DEPLOY / "slurm.sh"], check=True)
    assert "#SBATCH --requeue" in read("slurm.sh")


def environment(folder):
    """Return an environment that finds this gradhpo, and `folder`'s programs first."""
    path = os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "XLA_FLAGS": flags(1)}


def write_programs(folder, **texts):
    for name, text in texts.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)


@pytest.mark.slow
def test_the_command_runs_here_and_again(tmp_path):
    tiny(tmp_path)
    write_programs(tmp_path, gradhpo=PYTHON + 'gradhpo.cluster "$@"\n')
    command = [*ENTRY.split(), "--executor", "local"]
    options = {"cwd": tmp_path, "env": environment(tmp_path), "capture_output": True, "text": True}
    done = subprocess.run(command, check=False, **options)
    again = gradhpo(*command[1:], cwd=tmp_path)  # a retry finds that all is done
    for one in (done, again):
        assert one.returncode == 0, one.stderr
        assert "Best: trial" in one.stdout
    assert len((tmp_path / "runs/example/journal.jsonl").read_text().splitlines()) == 2


SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""
SCONTROL = """#!/bin/sh
if [ "$1" = show ]; then echo here; else echo "$@" >> scontrol.log; fi
"""


@pytest.mark.slow
def test_slurm_script_stops_and_goes_on(tmp_path):
    """The script runs for real on one node; SLURM's two programs are replaced."""
    pytest.importorskip("ray")
    with tempfile.TemporaryDirectory(prefix="gradhpo-slurm-") as short:  # paths of sockets are
        folder = Path(short)
        tiny(folder, generations=100_000, workers=1)
        programs = {"srun": SRUN, "scontrol": SCONTROL}
        write_programs(folder, gradhpo=PYTHON + 'gradhpo.cluster "$@"\n', **programs)
        job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "here"}
        env = {**environment(folder), **job, "SLURM_CPUS_PER_TASK": "1"}
        log = tmp_path / "log"
        journal = folder / "runs/example/journal.jsonl"
        with open(log, "w") as output:
            process = subprocess.Popen(
                ["bash", DEPLOY / "slurm.sh"],
                cwd=folder, env=env, stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip
            try:
                deadline = time.monotonic() + 90
                while not journal.exists() and process.poll() is None:
                    assert time.monotonic() < deadline, log.read_text()
                    time.sleep(0.1)
                process.send_signal(signal.SIGUSR1)
                assert process.wait(60) == 130, log.read_text()
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
        assert (folder / "scontrol.log").read_text() == f"requeue {job['SLURM_JOB_ID']}\n"
        text = log.read_text()
        assert "Stopped" in text
        assert not Path(f"/tmp/gradhpo-{job['SLURM_JOB_ID']}").exists()
        lines = len(journal.read_text().splitlines())
        assert 0 < lines < 100_000
