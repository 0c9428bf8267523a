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
    file_operations.run, plain = run, file_operations.Variant
    for given in file_operations.told(sys.argv[1:]):
        if (sampler := KINDS[given[-1]].get("sampler")) is not None:
            sampler.make(0)  # imports Optuna, before the forks
        of_kind = raced_operations.Variant if given[-1] == "race" else plain
        file_operations.Variant = of_kind
        file_operations.main(*given)
