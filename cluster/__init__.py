"""Many processes and hosts: sweeps of populations driven by Ray, that survive anything.

Imported as `gradhpo.cluster`. Without the `cluster` extra, which brings Ray, sweeps run in one
process.
"""

from gradhpo.checkpoints import DamagedFile
from gradhpo.cluster import events
from gradhpo.cluster.conditional import when
from gradhpo.cluster.discrete import categorical, choice, integer
from gradhpo.cluster.distributions import loguniform, uniform
from gradhpo.cluster.events import Observer
from gradhpo.cluster.failures import SweepError
from gradhpo.cluster.local_ray import local_ray
from gradhpo.cluster.race import Race
from gradhpo.cluster.reporting import write_report
from gradhpo.cluster.result import SweepResult, Trial
from gradhpo.cluster.samplers import Drawn, OptunaSampler, Sampler
from gradhpo.cluster.schedulers import (
    ASHA,
    NEW,
    PB2,
    PBT,
    Decision,
    RandomSearch,
    Rows,
    Scheduler,
    SuccessiveHalving,
    Table,
)
from gradhpo.cluster.space import Change, SearchSpace
from gradhpo.cluster.sweep import Sweep
from gradhpo.cluster.variant import trial_key
from gradhpo.cluster.warm_start import points_from
from gradhpo.lock import StorageInUse

__all__ = [
    "ASHA",
    "NEW",
    "PB2",
    "PBT",
    "Change",
    "DamagedFile",
    "Decision",
    "Drawn",
    "Observer",
    "OptunaSampler",
    "Race",
    "RandomSearch",
    "Rows",
    "Sampler",
    "Scheduler",
    "SearchSpace",
    "StorageInUse",
    "SuccessiveHalving",
    "Sweep",
    "SweepError",
    "SweepResult",
    "Table",
    "Trial",
    "categorical",
    "choice",
    "events",
    "integer",
    "local_ray",
    "loguniform",
    "points_from",
    "trial_key",
    "uniform",
    "when",
    "write_report",
]
