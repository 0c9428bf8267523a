"""Ray Tune runs whole populations, and finds what the same sweeps find."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gradhpo.cluster import PBT, SearchSpace, Sweep, loguniform
from tests.numpy_workers import on_ray

ROOT = Path(__file__).parent.parent

SPACE = SearchSpace({"log_rate": loguniform(1e-3, 1e-1, stored="log")})
SETTINGS = {
    "problem": "tests.sweep_problems:problem",
    "optimizer": "tests.sweep_problems:optimizer",
    "space": SPACE,
    "population": 8,
    "generations": 3,
    "steps_per_generation": 4,
    "shards": 2,
    "batching": "map",
}


@dataclasses.dataclass(frozen=True)
class FailsOnce:
    """PBT that fails after the second generation, the first time."""

    marker: str
    generation: int = 1

    def __call__(self, table, space, rng):
        if table.generation == self.generation and not Path(self.marker).exists():
            Path(self.marker).touch()
            raise RuntimeError("once")
        return PBT()(table, space, rng)


@pytest.fixture
def ray():
    ray = pytest.importorskip("ray")
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, log_to_driver=False,
        logging_level="error", runtime_env=on_ray(str(ROOT), NUMPY_STEPS="Plain"),
    )  # fmt: skip
    yield ray
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # Ray's own
def test_a_tune_trial_is_a_sweep(ray, tmp_path, numpy_steps):
    from ray import tune

    from gradhpo.cluster.tune import population_trainable

    marker = tmp_path / "failed"
    scheduler = FailsOnce(str(marker))
    methods = ["one-step", "first-order"]
    tuner = tune.Tuner(
        population_trainable(tmp_path / "sweeps", **SETTINGS),
        param_space={"method": tune.grid_search(methods), "seed": 3, "scheduler": scheduler},
        tune_config=tune.TuneConfig(metric="best", mode="min"),
        run_config=tune.RunConfig(
            name="test",
            storage_path=str(tmp_path / "tune"),
            failure_config=tune.FailureConfig(max_failures=1),
            verbose=0,
        ),
    )
    results = tuner.fit()
    assert not results.errors
    assert marker.exists()  # one of the two trials was started again, and went on
    assert {result.config["method"] for result in results} == set(methods)
    for result in results:
        space = dataclasses.replace(SPACE, choices={"method": [result.config["method"]]})
        storage = tmp_path / result.config["method"]
        changes = {"space": space, "seed": 3, "scheduler": scheduler, "storage": storage}
        direct = Sweep(**{**SETTINGS, **changes}, executor="local", progress=False).run()
        settings = {**SETTINGS, **changes, "storage": result.metrics["storage"]}
        found = Sweep(**settings, executor="local").result()
        for name, column in direct.table.items():
            np.testing.assert_array_equal(found.table[name], column, err_msg=name)
        val_loss = direct.final["val_loss"]
        assert result.metrics["generation"] == 3
        assert result.metrics["best"] == direct.table["val_loss"].min()
        assert result.metrics["median"] == np.median(val_loss)
        assert result.metrics["diverged"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["workers", "executor"])
def test_where_it_runs_is_not_a_setting(name, tmp_path):
    pytest.importorskip("ray.tune")
    from gradhpo.cluster.tune import population_trainable

    with pytest.raises(ValueError, match=f"{name} is not for a population in Ray Tune"):
        population_trainable(tmp_path, **SETTINGS, **{name: 1})


@pytest.mark.slow
def test_without_tune_the_error_says_what_to_install():
    """And libraries that a program may do without are imported where they are used."""
    code = (
        "import sys, gradhpo.cluster\n"
        "assert not {'gradhpo.cluster.tune', 'ray', 'flax', 'equinox'} & set(sys.modules)\n"
        "sys.modules['ray.tune'] = None\n"
        "try:\n    import gradhpo.cluster.tune\n"
        "except ImportError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'gradhpo[tune]'" in done.stdout
