"""Trials whose states are kept apart from their shard's others: written whole or in parts."""

import numpy as np
import pytest

from gradhpo import checkpoints
from gradhpo.checkpoints import DamagedFile
from gradhpo.cluster.check import _damaged
from gradhpo.cluster.storage import Storage
from gradhpo.parts import Divided, Parts, stacked

RNG = np.random.default_rng(0)
ARRAYS = {
    ".w": RNG.normal(size=(6, 4, 8)).astype(np.float32),
    ".n": np.arange(6, dtype=np.int32),
}


def held(name, slot, process, processes):
    """What a process has of a slot's row: its columns of `.w`; `.n` is the first one's."""
    row = ARRAYS[name][slot : slot + 1]
    if row.ndim == 1:
        return Parts(row.shape, row.dtype, {} if process else {((0, 1),): row})
    size = row.shape[2] // processes
    low, high = process * size, (process + 1) * size
    return Parts(row.shape, row.dtype, {((0, 1), (0, 4), (low, high)): row[..., low:high]})


def save(storage, slots, processes):
    """Write some slots apart: whole (0 processes), or by each process its parts, the first last."""
    if not processes:
        rows = {name: array[list(slots)] for name, array in ARRAYS.items()}
        return Storage(storage).save_winner(2, 0, 1, rows, slots)
    for process in reversed(range(processes)):
        rows = {n: stacked([held(n, slot, process, processes) for slot in slots]) for n in ARRAYS}
        made = Divided(rows, process, processes, turn=3)
        saved = Storage(storage).save_winner(2, 0, 1, made, slots)
    return saved


@pytest.mark.parametrize("processes", [0, 1, 2])
@pytest.mark.parametrize("slots", [(4,), (5, 1, 3), (1, 0)])
def test_each_of_them_is_read_by_its_slot(tmp_path, slots, processes):
    saved = save(tmp_path, slots, processes)
    for slot in slots:
        found = Storage(tmp_path).load_slot(saved, slot)
        assert list(found) == list(ARRAYS)
        for name, array in ARRAYS.items():
            assert found[name].tobytes() == array[slot].tobytes()
            assert (found[name].dtype, found[name].shape) == (array.dtype, array[slot].shape)
    whole, about = Storage(tmp_path).load(saved)
    assert about == {"alone": True} | ({"slots": list(slots)} if len(slots) > 1 else {})
    np.testing.assert_array_equal(whole[".w"], ARRAYS[".w"][list(slots)])


def test_a_slot_of_a_whole_checkpoint_is_a_copy(tmp_path):
    saved = Storage(tmp_path).save_checkpoint(2, 0, 1, ARRAYS, {})
    found = Storage(tmp_path).load_slot(saved, 4)
    np.testing.assert_array_equal(found[".w"], ARRAYS[".w"][4])
    assert found[".w"].base is None or found[".w"].base.nbytes < ARRAYS[".w"].nbytes


def test_several_in_parts_are_kept_checked_and_removed_together(tmp_path):
    saved = save(tmp_path, (5, 1, 3), 2)
    storage = Storage(tmp_path)
    (other,) = storage.parts_of(saved)
    storage.prune(9, {saved.file})
    assert {f"checkpoints/000002/{n}" for n in storage.files.names("checkpoints/000002")} == {
        saved.file,
        other,
    }
    assert _damaged(tmp_path, [saved]) == []
    (tmp_path / other).unlink()
    assert "lacks its part" in _damaged(tmp_path, [saved])[0]
    with pytest.raises(DamagedFile, match="its part"):
        storage.load_slot(saved, 1)
    storage.prune(9, set())
    assert checkpoints.find(tmp_path, "checkpoints/000002/winner-0000-i1") is None
