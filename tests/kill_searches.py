"""`file_operations` for two objectives, or a sampler of Optuna, in a race too: run by tests."""

import hashlib
import sys

from gradhpo.cluster import OptunaSampler, RandomSearch
from tests import file_operations, raced_operations
from tests.sweeps import sweep

KINDS = {
    "objectives": {"metric": {"val_loss": "min", "hyperparams.log_rate": "min"}},
    "sampler": {
        "sampler": OptunaSampler("TPESampler", n_startup_trials=4, multivariate=True),
        "scheduler": RandomSearch(trial_generations=1),
        "points": [{"log_rate": 0.2}],
    },
}
KINDS["race"] = {
    **KINDS["sampler"],
    **KINDS["objectives"],
    "space": raced_operations.SPACE,
    "shards": 6,
}


def run(folder, every, rows, kind):
    """Run the sweep to its end; return what it found, as a digest."""
    del rows
    about = {**file_operations.CHANGES, **KINDS[kind]}
    result = sweep(folder, **about, checkpoint_every=every).run()
    digest = hashlib.sha256()
    for name, column in result.table.items():
        digest.update(name.encode() + column.tobytes())
    for trial in result.front:
        digest.update(repr((trial.scores, trial.settings, trial.lineage)).encode())
        for name, array in trial.arrays.items():
            digest.update(name.encode() + array.tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    if (sampler := KINDS[sys.argv[5]].get("sampler")) is not None:
        sampler.make(0)  # imports Optuna, before the forks
    file_operations.run = run
    if sys.argv[5] == "race":
        file_operations.Variant = raced_operations.Variant
    file_operations.main(sys.argv[1], *map(int, sys.argv[2:5]), sys.argv[5])
