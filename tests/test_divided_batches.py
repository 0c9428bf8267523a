"""Trials that are larger than a device, on batches of the host and in an object store."""

import jax
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from gradhpo.cluster import SweepResult, events
from gradhpo.cluster.check import check_storage
from tests.sweeps import assert_same_tables
from tests.test_divided import divided_sweep

pytestmark = pytest.mark.slow

HOST = {"problem": "tests.divided_problems:host_problem", "checkpoint_every": 2}


class _Killed(BaseException):
    pass


@pytest.mark.parametrize("method", ["one-step", "hyperdistill"])
def test_batches_of_the_host_go_on_to_the_same_bits_in_a_store_too(tmp_path, method):
    """HyperDistill is given a first pair, remembers it, and calibrates on pairs of its own."""
    about = {**HOST, "optimizer": "tests.divided_problems:small_optimizer"}
    about["space"] = one_method(method)
    whole = divided_sweep(tmp_path, **about).run()
    store = "memory://divided-batches/run"

    def strike(generation, table):
        del table
        if generation == 2:
            raise _Killed

    try:
        divided_sweep(store, **about, generations=1).run()
        with pytest.raises(_Killed):
            divided_sweep(store, **about).run(strike)
        made = divided_sweep(store, **about)
        result = made.run()
        assert_same_tables(result, whole)
        assert len(whole.copies) > 0
        assert any(isinstance(event, events.Resumed) for event in made.events)
        assert [finding.whole for finding in check_storage(store)] == [True]
        found = SweepResult.from_storage(store).best
        jax.tree.map(np.testing.assert_array_equal, result.replay(), found.state)
    finally:
        MemoryFileSystem.store.clear()


def one_method(method):
    """The space of the small divided sweep, with one method."""
    space = divided_sweep("unused").identity.space
    return type(space)(space.hyperparams, choices={"method": [method]})
