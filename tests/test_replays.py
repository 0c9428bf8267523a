"""Schedulers on recorded tables of real sweeps, replayed: none of this trains anything."""

import itertools

import numpy as np
import pytest

from gradhpo.cluster import Table
from tests.record_sweeps import SCHEDULERS, SPACE
from tests.replays import recorded, replay

SEEDS = range(5)


def final(scheduler, seeds=SEEDS, **settings):
    """Return the mean of the logarithm of the best score over seeds."""
    return np.mean([np.log(replay(scheduler, seed, **settings)[-1]) for seed in seeds])


@pytest.mark.parametrize("sweep", SCHEDULERS)
def test_a_recorded_sweep_decides_as_it_did(sweep):
    columns, scheduler, tables = recorded(sweep), SCHEDULERS[sweep], []
    slots = np.arange(columns["trial"].shape[1])
    for generation, score in enumerate(columns["val_loss"]):
        about = {name: column[generation] for name, column in columns.items()}
        values = {name: about[f"hyperparams.{name}"] for name in SPACE.settings()}
        age = generation - about["born"] + 1
        table = Table(generation, score, about["trial"], age, values, {}, about["parent"])
        tables.append(table)
    for table, after in itertools.pairwise(tables):
        rng = np.random.default_rng([0, table.generation + 1, 0])
        np.testing.assert_array_equal(scheduler(table, SPACE, rng).parents, after.parent)
    assert any((table.parent != slots).any() for table in tables[1:]) == (sweep == "pbt")
