"""Arrays that are written in parts by several processes, and read in others."""

import re

import numpy as np
import pytest

from gradhpo import checkpoints, parts
from gradhpo.checkpoints import DamagedFile
from gradhpo.cluster.storage import Storage
from gradhpo.files import files_of
from gradhpo.parts import Divided, Parts, gather, whole

RNG = np.random.default_rng(0)
ARRAYS = {
    "w": RNG.normal(size=(2, 12, 6)).astype(np.float32),
    "step": np.arange(2, dtype=np.int32),
    "empty": np.zeros((2, 0)),
}
COLUMNS = [((0, 2), (0, 12), (start, start + 2)) for start in (0, 2, 4)]


def divided(process, processes=2):
    """A state whose `w` two processes hold in columns, the first one two; the rest is the first's.

    As one of three, a process holds one of the columns.
    """
    mine = COLUMNS[process::processes] if processes == 3 else [COLUMNS[:2], COLUMNS[2:]][process]

    def held(name, boxes):
        array = ARRAYS[name]
        found = {box: array[tuple(slice(*span) for span in box)] for box in boxes}
        return Parts(array.shape, array.dtype, found)

    rest = {
        name: held(name, [] if process else whole(name, ARRAYS[name].shape, None))
        for name in ("step", "empty")
    }
    return Divided({"w": held("w", mine), **rest}, process, processes, turn=7)


def save(storage, process, processes=2):
    """Write one process's part."""
    about = {"variant": 0}
    return Storage(storage).save_checkpoint(3, 0, 5, divided(process, processes), about)


@pytest.fixture
def saved(tmp_path):
    """A storage with a checkpoint of two processes; the second's part came first."""
    save(tmp_path, 1)
    return save(tmp_path, 0)


def test_parts_of_several_processes_are_whole_again_to_the_bit(tmp_path, saved):
    arrays, about = Storage(tmp_path).load(saved)
    assert list(arrays) == list(ARRAYS)
    for name, array in ARRAYS.items():
        assert (arrays[name].dtype, arrays[name].shape) == (array.dtype, array.shape)
        assert arrays[name].tobytes() == array.tobytes()
    assert about == {"shard": 0, "generation": 3, "variant": 0}


@pytest.mark.parametrize("pieces", [1, 2, 3, 4, 6])
def test_any_other_division_reads_its_boxes(tmp_path, saved, pieces):
    def rows(name, shape, dtype, about):
        assert dtype == ARRAYS[name].dtype
        if name != "w":
            return whole(name, shape, dtype)
        assert about["variant"] == 0
        size = shape[1] // pieces
        return [((0, 2), (i * size, (i + 1) * size), (0, 6)) for i in range(pieces)]

    made, _ = gather(files_of(tmp_path), saved, rows)
    joined = np.concatenate(list(made["w"].values()), 1)
    assert joined.tobytes() == ARRAYS["w"].tobytes()


def test_whole_arrays_of_an_undivided_checkpoint_are_read_in_boxes(tmp_path):
    stored = checkpoints.save(tmp_path, "old", ARRAYS, {"shard": 0})
    some = {"w": [COLUMNS[1]], "step": [((1, 2),)], "empty": []}
    made, about = gather(files_of(tmp_path), stored, lambda name, *_: some[name])
    assert about == {"shard": 0}
    np.testing.assert_array_equal(made["w"][COLUMNS[1]], ARRAYS["w"][:, :, 2:4])
    np.testing.assert_array_equal(made["step"][((1, 2),)], [1])


def test_one_process_writes_one_file_under_the_name_that_it_always_had(tmp_path):
    box = tuple((0, size) for size in ARRAYS["w"].shape)
    one = Divided({"w": Parts(ARRAYS["w"].shape, ARRAYS["w"].dtype, {box: ARRAYS["w"]})})
    stored = Storage(tmp_path).save_checkpoint(3, 1, 5, one, {})
    assert re.fullmatch(r"checkpoints/000003/shard-0001-i5-[0-9a-f]{16}\.arrays", stored.file)
    assert Storage(tmp_path).parts_of(stored) == []
    np.testing.assert_array_equal(Storage(tmp_path).load(stored)[0]["w"], ARRAYS["w"])


def test_the_first_process_does_not_say_that_it_is_written_before_all_are(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "PATIENCE", 0.0)
    with pytest.raises(OSError, match="the part of another process of the worker did not come"):
        save(tmp_path, 0)
    assert Storage(tmp_path).files.names("checkpoints/000003") == []
    monkeypatch.undo()
    save(tmp_path, 1, processes=3)
    save(tmp_path, 2, processes=3)
    assert len(Storage(tmp_path).parts_of(save(tmp_path, 0, processes=3))) == 2


@pytest.mark.parametrize("how", ["missing", "changed", "cut"])
def test_a_damaged_part_is_damage_of_the_checkpoint(tmp_path, saved, how):
    (name,) = Storage(tmp_path).parts_of(saved)
    path = tmp_path / name
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(content[:-1] if how == "cut" else content[:-1] + b"?")
    with pytest.raises(DamagedFile, match="its part") as caught:
        Storage(tmp_path).load(saved)
    assert caught.value.file == saved.file


def test_an_array_without_one_of_its_parts_is_damage(tmp_path):
    lacking = divided(0)
    stored = Storage(tmp_path).save_checkpoint(0, 0, 1, Divided(lacking.arrays), {})
    with pytest.raises(DamagedFile, match="lacks a part of w"):
        Storage(tmp_path).load(stored)


def test_parts_are_kept_and_removed_with_the_file_that_stands_for_them(tmp_path, saved):
    storage = Storage(tmp_path)
    folder = "checkpoints/000003"
    other = storage.save_checkpoint(3, 1, 5, ARRAYS, {})
    assert len(storage.files.names(folder)) == 3
    storage.prune(9, {saved.file})
    kept = [f"{folder}/{name}" for name in storage.files.names(folder)]
    assert sorted(kept) == sorted([saved.file, *storage.parts_of(saved)])
    assert other.file not in kept
    storage.prune(9, set())
    assert storage.files.names(folder) == []
