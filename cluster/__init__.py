"""Many processes and hosts: sweeps of populations driven by Ray, that survive anything.

Imported as `gradhpo.cluster`. Without the `cluster` extra, which brings Ray, sweeps run in one
process.
"""

from gradhpo.checkpoints import DamagedFile
from gradhpo.cluster import events
from gradhpo.cluster.conditional import when
from gradhpo.cluster.distributions import choice, loguniform, uniform
from gradhpo.cluster.events import Observer
from gradhpo.cluster.failures import SweepError
from gradhpo.cluster.local_ray import local_ray
from gradhpo.cluster.race import Race
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
from gradhpo.cluster.space import Change, SearchSpace
from gradhpo.cluster.sweep import Sweep
from gradhpo.cluster.variant import trial_key
from gradhpo.lock import StorageInUse

__all__ = [
    "NEW",
    "PBT",
    "Change",
    "DamagedFile",
    "Decision",
    "Observer",
    "Race",
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
    "events",
    "local_ray",
    "loguniform",
    "trial_key",
    "uniform",
    "when",
]
