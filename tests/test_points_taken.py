"""Points that were found in another sweep stay what they were, whatever becomes of that one."""

import json
import shutil

import pytest

from gradhpo.cluster import Sweep, SweepError, manifest, points, points_from, shard
from tests import file_operations
from tests.sweeps import sweep

TOML = """
problem = "tests.sweep_problems:problem"
optimizer = "tests.sweep_problems:optimizer"
population = 12
shards = 4
generations = {generations}
steps_per_generation = 5
batching = "map"
storage = "{storage}"
executor = "local"
progress = false
points = {{storage = "{source}", best = {best}}}
[space.hyperparams]
log_rate = {{loguniform = [1e-3, 0.3], stored = "log"}}
"""


@pytest.fixture(autouse=True)
def numpy_alone(monkeypatch):
    monkeypatch.setattr(shard, "Variant", file_operations.Variant)


def described(folder, **changes):
    """The sweep of a TOML file that takes its points from another one."""
    about = {"storage": folder / "run", "source": folder / "a", "best": 3, "generations": 2}
    path = folder / "sweep.toml"
    path.write_text(TOML.format(**{**about, **changes}))
    return Sweep.from_toml(path)


def test_a_source_that_goes_on_or_is_gone_refuses_nobody(tmp_path):
    sweep(tmp_path / "a", generations=1).run()
    taken = points_from(tmp_path / "a", 3)
    first = described(tmp_path)
    first.run()
    sweep(tmp_path / "a", generations=6).run()
    later = points_from(tmp_path / "a", 3)
    assert list(later) != list(taken), "the source has better ones by now"
    again = described(tmp_path, generations=3)
    assert list(again.identity.points) == list(taken)
    assert again.run().generations == 3
    # A program, and the command that goes on without a file, know it too.
    about = {"shards": 4, "scheduler": None, "generations": 4}
    assert sweep(tmp_path / "run", points=later, **about).run().generations == 4
    assert Sweep.from_storage(tmp_path / "run", generations=5).run().generations == 5
    shutil.rmtree(tmp_path / "a")
    assert described(tmp_path, generations=6).run().generations == 6
    known = json.loads((tmp_path / "run/manifest.json").read_text())
    assert known["points"] == list(taken)
    assert known["points_from"] == {"storage": str(tmp_path / "a"), "best": 3}


def test_other_points_than_the_sweep_began_with_are_refused(tmp_path):
    sweep(tmp_path / "a", generations=2).run()
    described(tmp_path).run()
    with pytest.raises(SweepError, match="holds another run: its points is"):
        described(tmp_path, best=2).run()
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    sweep(tmp_path / "b", generations=6).run()
    with pytest.raises(SweepError, match="holds another run: its points is"):
        described(tmp_path, source=tmp_path / "b").run()
    more = points_from(tmp_path / "a", 3)
    more.append({"log_rate": 0.1})
    assert points.source_of(more) is None, "it is not what was found any more"
    with pytest.raises(SweepError, match="holds another run: its points is"):
        sweep(tmp_path / "run", points=more, scheduler=None, generations=2).run()
    with pytest.raises(SweepError, match="there is no sweep in"):
        described(tmp_path, storage=tmp_path / "new", source=tmp_path / "none")


def test_a_storage_of_before_compares_the_points_themselves(tmp_path):
    sweep(tmp_path / "a", generations=2).run()
    described(tmp_path).run()
    path = tmp_path / "run/manifest.json"
    known = json.loads(path.read_text())
    assert manifest.digest(known) == manifest.digest({**known, "points_from": None})
    del known["points_from"]
    path.write_text(json.dumps(known))
    assert described(tmp_path, generations=3).run().generations == 3
    assert json.loads(path.read_text())["points_from"]["best"] == 3
