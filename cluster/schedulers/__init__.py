"""Schedulers: what happens between two generations, as pure functions of the gathered table.

A scheduler is called as `scheduler(table, space, rng) -> Decision`, for each population on its
own, with a generator seeded by (seed, generation, population). It sees one row for each slot,
and the tables of all generations before.
"""

from gradhpo.cluster.schedulers.asha import ASHA
from gradhpo.cluster.schedulers.decision import Decision, Scheduler
from gradhpo.cluster.schedulers.halving import SuccessiveHalving
from gradhpo.cluster.schedulers.pb2 import PB2
from gradhpo.cluster.schedulers.pbt import PBT
from gradhpo.cluster.schedulers.random_search import RandomSearch
from gradhpo.cluster.schedulers.rows import Rows
from gradhpo.cluster.schedulers.table import NEW, Table

__all__ = [
    "ASHA",
    "NEW",
    "PB2",
    "PBT",
    "Decision",
    "RandomSearch",
    "Rows",
    "Scheduler",
    "SuccessiveHalving",
    "Table",
]
