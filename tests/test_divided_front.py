"""Several objectives of trials that are divided over devices: their front, written in parts."""

import jax
import numpy as np
import pytest

from gradhpo.cluster import SweepResult
from gradhpo.cluster.check import check_storage
from gradhpo.cluster.journal import Journal
from tests.test_divided import divided_sweep

pytestmark = pytest.mark.slow

METRIC = {"val_loss": "min", "param_norm": "max"}


def front_of(result):
    """What identifies a front, to the bit."""
    return [
        (
            trial.number,
            trial.generation,
            trial.scores,
            *(x.tobytes() for x in trial.arrays.values()),
        )
        for trial in result.front
    ]


def test_a_front_of_divided_trials_goes_on_to_the_same_bits(tmp_path):
    about = {"metric": METRIC, "checkpoint_every": 2}
    whole = divided_sweep(tmp_path / "whole", **about).run()
    for generations in (3, 4):
        result = divided_sweep(tmp_path / "parts", generations=generations, **about).run()
    assert front_of(result) == front_of(whole)
    for name, column in whole.table.items():
        assert result.table[name].tobytes() == column.tobytes()
    front = Journal(tmp_path / "whole").last[-1]["front"]
    apart = [one["checkpoint"].file for one in front if "/winner-" in one["checkpoint"].file]
    assert len(set(apart)) < len(apart)  # of one shard and generation there are several
    assert all(finding.whole for finding in check_storage(tmp_path / "whole"))
    for trial in SweepResult.from_storage(tmp_path / "whole").front:
        norm = sum(np.sum(trial.params[name].astype(float) ** 2) for name in ("in", "out")) ** 0.5
        assert norm == pytest.approx(trial.scores["param_norm"], rel=1e-5)
    last = result.front[-1]
    jax.tree.map(np.testing.assert_array_equal, result.replay(last), last.state)
    walked = result.trajectory(last)["log_decay"]
    np.testing.assert_array_equal(walked[-1], last.hyperparams["log_decay"])
