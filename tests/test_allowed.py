"""A sweep that goes back across a change that was allowed says from where on it holds."""

import json

import pytest

from gradhpo.cluster import SweepError, events, shard
from gradhpo.cluster.check import check_storage
from gradhpo.cluster.journal import Journal
from tests import file_operations
from tests.sweeps import sweep
from tests.test_events import Kept


class Other(file_operations.Variant):
    """A step that computes something else."""

    def prepare(self, blobs):
        return super().prepare(blobs)._replace(key={"computation": "another"})


@pytest.fixture
def begun(tmp_path, monkeypatch):
    """A storage with three generations of a step, of which the last one's checkpoints are damaged.

    From here on the step is another one.
    """
    monkeypatch.setattr(shard, "Variant", file_operations.Variant)
    sweep(tmp_path, generations=3).run()
    monkeypatch.setattr(shard, "Variant", Other)
    (tmp_path / Journal(tmp_path).last[-1]["checkpoints"][0].file).write_bytes(b"damaged")
    return tmp_path


def test_it_begins_where_states_are_whole(begun):
    kept = Kept()
    result = sweep(begun, generations=5).run(observers=[kept], allow_changed=("code",))
    back = [event.done for event in kept.told if isinstance(event, events.GoneBack)]
    assert (result.changes, back) == ([(2, "code")], [2])
    entries = json.loads((begun / "programs.json").read_text())
    assert [entry["changes"] for entry in entries] == [[[2, "code"]]]
    assert json.loads((begun / "manifest.json").read_text())["programs"] == entries
    assert sweep(begun, generations=6).run().changes == [(2, "code")]


def test_so_it_does_after_a_kill_on_the_way_and_a_check(begun):
    def killed(generation, table):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(begun, generations=5).run(killed, allow_changed=("code",))
    assert Journal(begun).generation == 2
    last = Journal(begun).last[-1]
    (begun / last["checkpoints"][0].file).write_bytes(b"damaged")
    assert any("generation 3 is dropped" in finding.text for finding in check_storage(begun))
    assert sweep(begun, generations=5).run().changes == [(2, "code")]


def test_whether_a_result_is_complete_is_read_once(begun):
    result = sweep(begun, generations=3).result()
    assert result.complete
    (begun / "manifest.json").unlink()
    assert result.complete


def on_devices(devices, computation):
    """A step of a mesh that takes all devices that there are."""

    class OnDevices(file_operations.Variant):
        def prepare(self, blobs):
            key = {"computation": computation, "devices": devices}
            return super().prepare(blobs)._replace(key=key)

    return OnDevices


def test_another_number_of_devices_is_another_mesh_and_not_other_code(tmp_path, monkeypatch):
    monkeypatch.setattr(shard, "Variant", on_devices(8, "of eight"))
    sweep(tmp_path, generations=1).run()
    monkeypatch.setattr(shard, "Variant", on_devices(4, "of four"))
    said = r'the mesh has another number of devices .* allow_changed=\("mesh",\)'
    with pytest.raises(SweepError, match=said):
        sweep(tmp_path, generations=2).run()
    result = sweep(tmp_path, generations=2).run(allow_changed=("mesh",))
    assert result.changes == [(1, "mesh")]
