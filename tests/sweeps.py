"""What the tests of sweeps share: a small sweep, and comparing two results to the bit."""

import numpy as np

from gradhpo.cluster import PBT, SearchSpace, Sweep, loguniform

SPACE = SearchSpace(hyperparams={"log_rate": loguniform(1e-3, 3e-1, stored="log")})
GENERATIONS = 8
SETTINGS = {
    "problem": "tests.sweep_problems:problem",
    "optimizer": "tests.sweep_problems:optimizer",
    "space": SPACE,
    "population": 12,
    "generations": GENERATIONS,
    "steps_per_generation": 5,
    "scheduler": PBT(quantile=0.34),
    "batching": "map",
    "shards": 4,
    "progress": False,
    "executor": "local",
}


def sweep(storage, **changes):
    """Return the small sweep, with other settings where given."""
    return Sweep(**{**SETTINGS, "storage": storage, **changes})


def assert_same_tables(result, expected):
    """Compare whole tables to the bit."""
    assert list(result.table) == list(expected.table)
    for name, column in expected.table.items():
        assert result.table[name].dtype == column.dtype, name
        np.testing.assert_array_equal(result.table[name], column, err_msg=name)
        assert result.table[name].tobytes() == column.tobytes(), name
    assert result.best.lineage == expected.best.lineage
    for name, array in expected.best.arrays.items():
        assert result.best.arrays[name].tobytes() == array.tobytes(), name
