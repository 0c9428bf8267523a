"""Trials that are larger than a device: populations and sweeps whose arrays are divided."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from gradhpo.checkpoints import Saved
from gradhpo.cluster import PBT, SearchSpace, SweepError, loguniform
from gradhpo.cluster.check import check_storage
from gradhpo.cluster.storage import Storage
from gradhpo.parallel import Population, by_path, data_parallel, fully_sharded, make_mesh
from gradhpo.parallel.held import held, restored
from gradhpo.parts import Divided
from tests import divided_gang
from tests import divided_problems as problems
from tests.pairs import run_both
from tests.sweeps import Killed, assert_same_tables, killing_after, sweep

SETTINGS = {
    "problem": "tests.divided_problems:small_problem",
    "optimizer": "tests.divided_problems:small_optimizer",
    "space": SearchSpace(hyperparams={"log_rate": loguniform(1e-3, 1e-1, stored="log")}),
    "population": 6,
    "shards": 2,
    "generations": 4,
    "steps_per_generation": 2,
    "scheduler": PBT(quantile=0.34),
    "mesh": {"data": 8},
    "rules": {"": "data"},
}


def divided_sweep(storage, **changes):
    """A sweep of small trials, each divided over the eight devices."""
    return sweep(storage, **{**SETTINGS, **changes})


def on_device(tree, device):
    """The bytes that a device has of arrays."""
    shards = [s for x in jax.tree.leaves(tree) for s in x.addressable_shards]
    return sum(shard.data.nbytes for shard in shards if shard.device == device)


# --- numbers --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("method", ["one-step", "greedy", "hyperdistill"])
def test_methods_of_each_kind_give_the_numbers_of_an_undivided_trial(x64, method):
    optimizer, keys = problems.small_optimizer(method), jax.random.split(jax.random.key(3), 2)
    mesh = make_mesh()
    made = data_parallel(optimizer, mesh, backend="auto", rules=fully_sharded(mesh))
    first, states, rows = None, [], []
    for kind in (optimizer, made):
        trials = Population(problems.small_problem(), kind, 2, batching="map")
        first = first or trials.init(jax.random.key(0))
        state, row = trials.run(first, 5, keys)
        states.append(jax.tree.map(np.asarray, state))
        rows.append(row)
    assert trials.batching == "map"
    assert state.params["in"].sharding.spec[-1] == "data"
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, rtol=1e-9, atol=1e-12), *states)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, rtol=1e-9, atol=1e-12), *rows)


@pytest.mark.slow
def test_slots_batches_and_arrays_are_divided_together(x64):
    optimizer, keys = problems.small_optimizer(), jax.random.split(jax.random.key(3), 4)
    mesh = make_mesh(trial=2, data=2, model=2)
    rules = by_path(mesh, {r"\['in'\]": (None, ("data", "model")), "": "model"})
    made = data_parallel(optimizer, mesh, backend="auto", rules=rules)
    first, states = None, []
    for kind, batching in ((optimizer, "map"), (made, "shard/map"), (made, "shard/2")):
        trials = Population(problems.small_problem(), kind, 4, batching=batching)
        first = first or trials.init(jax.random.key(0))
        states.append(trials.run(first, 3, keys)[0])
    assert states[1].params["in"].sharding.shard_shape((4, 4, 16)) == (2, 4, 4)
    assert states[1].params["out"].sharding.shard_shape((4, 16)) == (2, 8)
    one, *others = (jax.tree.map(np.asarray, state) for state in states)
    for other in others:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, atol=1e-12), one, other)
    copied = trials.select(states[-1], [3, 1, 1, 0]).params["in"]
    assert copied.sharding == states[-1].params["in"].sharding
    np.testing.assert_array_equal(copied, others[-1].params["in"][np.array([3, 1, 1, 0])])


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_transformer_of_eight_devices_shares_fits_in_eight():
    """State, gradients and moments: by the arrays themselves, and by XLA's own account."""
    mesh, problem = make_mesh(), problems.problem(width=64)
    rules = fully_sharded(mesh)
    divided = data_parallel(problems.optimizer(), mesh, backend="auto", rules=rules)
    state = Population(problem, divided, 1).init(jax.random.key(0))
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    for device in mesh.devices.ravel():
        assert on_device(state, device) < whole / 8 * 1.02
    there, needs = jax.device_get(state), []
    for kind in (problems.optimizer(), divided):
        program = Population(problem, kind, 1, batching="map").compile(jax.device_put(there), 2)
        needs.append(program.executable.memory_analysis())
    one, eight = needs
    assert eight.argument_size_in_bytes < one.argument_size_in_bytes / 8 * 1.02
    assert eight.temp_size_in_bytes < one.temp_size_in_bytes / 3


# --- on disk --------------------------------------------------------------------------------------


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_what_eight_devices_wrote_any_number_reads_to_the_bit(tmp_path, devices):
    rng = np.random.default_rng(0)
    arrays = {
        ".w": rng.normal(size=(2, 16, 24)).astype(np.float32),
        ".n": np.arange(2, dtype=np.int32),
    }
    mesh = make_mesh()
    rules = fully_sharded(mesh)

    def shardings(mesh, rules):
        return {
            name: jax.NamedSharding(mesh, jax.P(None, *rules(name, x[0])))
            for name, x in arrays.items()
        }

    lie = shardings(mesh, rules)
    parts = {name: held(jax.device_put(x, lie[name])) for name, x in arrays.items()}
    assert [part.shape for part in parts[".w"].held.values()] == [(2, 16, 3)] * 8
    saved = Storage(tmp_path).save_checkpoint(0, 0, 1, Divided(parts), {"variant": 0})
    other = make_mesh(data=devices)
    lie = shardings(other, by_path(other, {"w": ["data"]}))
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in arrays.items()}
    files = Storage(tmp_path).files
    back, about = restored(files, saved, shapes, lie)
    assert about == {"shard": 0, "generation": 0, "variant": 0}
    assert {name: x.sharding for name, x in back.items()} == lie
    for name, array in arrays.items():
        assert np.asarray(back[name]).tobytes() == array.tobytes()
    rows = {n: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype) for n, x in arrays.items()}
    row, _ = restored(files, saved, rows, lie, 1)
    np.testing.assert_array_equal(row[".w"], arrays[".w"][1:])
    wrong = {**shapes, ".w": jax.ShapeDtypeStruct((2, 16, 25), np.float32)}
    with pytest.raises(ValueError, match=r"\.w should be float32\[2, 16, 25\], found float32"):
        restored(files, saved, wrong, lie)
    more = {**shapes, ".more": jax.ShapeDtypeStruct((2,), np.int32)}
    with pytest.raises(ValueError, match=r"\.more should be int32\[2\], found nothing"):
        restored(files, saved, more, {**lie, ".more": lie[".n"]})


def test_parts_that_are_being_written_outlive_the_buffers_that_a_program_takes_over():
    mesh = make_mesh()
    lie = jax.NamedSharding(mesh, jax.P("data"))
    array = jax.device_put(np.arange(1024, dtype=np.float32), lie)
    parts = held(array)
    step = jax.jit(lambda x: x * 0 - 1, donate_argnums=0, out_shardings=lie)
    jax.block_until_ready(step(array))
    joined = np.concatenate([parts.held[box] for box in sorted(parts.held)])
    np.testing.assert_array_equal(joined, np.arange(1024))


# --- sweeps ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The sweep, undisturbed, and its storage."""
    storage = tmp_path_factory.mktemp("divided")
    return divided_sweep(storage).run(), storage


@pytest.mark.slow
def test_a_divided_sweep_goes_on_to_the_same_bits(tmp_path, reference):
    for generations in (2, 4):
        result = divided_sweep(tmp_path, generations=generations).run()
    assert_same_tables(result, reference[0])
    assert len(reference[0].copies) > 0
    found = reference[0].best
    assert found.params["in"].shape == (4, 16)
    assert found.state.inner_opt_state[0].trace["in"].shape == (4, 16)
    assert [finding.whole for finding in check_storage(reference[1])] == [True]


@pytest.mark.slow
def test_states_that_are_not_all_written_go_on_to_the_same_bits(tmp_path, reference):
    for generations in (3, 4):
        result = divided_sweep(tmp_path, generations=generations, checkpoint_every=3).run()
    assert_same_tables(result, reference[0])
    jax.tree.map(np.testing.assert_array_equal, result.replay(), result.best.state)


@pytest.mark.slow
def test_a_sweep_of_eight_devices_goes_on_with_four_of_them(tmp_path, reference):
    with pytest.raises(Killed):
        divided_sweep(tmp_path).run(killing_after(2))
    half = divided_sweep(tmp_path, mesh={"data": 4})
    with pytest.raises(SweepError, match="holds another run: its mesh is"):
        half.run()
    result = half.run(allow_changed=("mesh",))
    (change,) = result.changes
    assert (change.what, change.generation) == ("mesh", 2)
    assert any("the mesh is another one" in str(event.line()) for event in half.events)
    same = slice(0, 2 * 6)
    for name, column in reference[0].table.items():
        assert result.table[name][same].tobytes() == column[same].tobytes()
        np.testing.assert_allclose(result.table[name], column, rtol=1e-4)
    again = divided_sweep(tmp_path, mesh={"data": 4}, generations=5).run()
    assert again.generations == 5


# --- several processes ----------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_write_what_each_holds_and_read_what_each_needs(tmp_path):
    _run_both(tmp_path)
    saved = Saved(*json.loads((tmp_path / "written.json").read_text()))
    assert re.search(r"shard-0000-i1-w1-[0-9a-f]+\.arrays", saved.file)
    (second,) = Storage(tmp_path).parts_of(saved)
    sizes = [(tmp_path / name).stat().st_size for name in (saved.file, second)]
    half = divided_gang.ARRAYS[".w"].nbytes / 2
    assert all(half < size < 1.05 * half for size in sizes)
    for name, array in Storage(tmp_path).load(saved)[0].items():
        assert array.tobytes() == divided_gang.ARRAYS[name].tobytes()


def _run_both(storage):
    """Run the two processes to their end."""
    script = Path(__file__).parent / "divided_gang.py"
    run_both(script, storage, flags=("-W", "ignore"))
