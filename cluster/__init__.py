"""Many processes and hosts: sweeps of populations driven by Ray, that survive anything.

Imported as `gradhpo.cluster`. Without the `cluster` extra, which brings Ray, sweeps run in one
process.
"""

from gradhpo.checkpoints import DamagedFile
from gradhpo.cluster.executors import SweepError, local_ray
from gradhpo.cluster.result import SweepResult, Trial
from gradhpo.cluster.schedulers import (
    NEW,
    PBT,
    Decision,
    RandomSearch,
    Scheduler,
    SuccessiveHalving,
    Table,
)
from gradhpo.cluster.shard import trial_key
from gradhpo.cluster.space import Change, SearchSpace, choice, loguniform, uniform
from gradhpo.cluster.sweep import Sweep
from gradhpo.lock import StorageInUse

__all__ = [
    "NEW",
    "PBT",
    "Change",
    "DamagedFile",
    "Decision",
    "RandomSearch",
    "Scheduler",
    "SearchSpace",
    "StorageInUse",
    "SuccessiveHalving",
    "Sweep",
    "SweepError",
    "SweepResult",
    "Table",
    "Trial",
    "choice",
    "local_ray",
    "loguniform",
    "trial_key",
    "uniform",
]
