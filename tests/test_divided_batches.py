"""Trials that are larger than a device, on batches of the host and in an object store."""

import jax
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from gradhpo.cluster import SearchSpace, SweepResult
from gradhpo.cluster.check import check_storage
from tests.sweeps import Killed, assert_same_tables, killing_after
from tests.test_divided import SETTINGS, divided_sweep

ABOUT = {
    "problem": "tests.divided_problems:host_problem",
    "space": SearchSpace(SETTINGS["space"].hyperparams, choices={"method": ["hyperdistill"]}),
    "checkpoint_every": 2,
}


@pytest.fixture
def store():
    """An address in this process's memory."""
    yield "memory://divided-batches/run"
    MemoryFileSystem.store.clear()


@pytest.mark.slow
def test_batches_of_the_host_go_on_to_the_same_bits_in_a_store_too(tmp_path, store):
    """HyperDistill remembers a first pair, and calibrates on pairs of each trial's own."""

    whole = divided_sweep(tmp_path, **ABOUT).run()
    with pytest.raises(Killed):
        divided_sweep(store, **ABOUT).run(killing_after(2))
    result = divided_sweep(store, **ABOUT).run()
    assert_same_tables(result, whole)
    assert len(whole.copies) > 0
    assert [finding.whole for finding in check_storage(store)] == [True]
    found = SweepResult.from_storage(store).best
    jax.tree.map(np.testing.assert_array_equal, result.replay(), found.state)
