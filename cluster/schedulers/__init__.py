"""Schedulers: what happens between two generations, as pure functions of the gathered table.

A scheduler is called as `scheduler(table, space, rng) -> Decision`, for each population on its
own, with a generator seeded by (seed, generation, population). It sees one row for each slot.
"""

from gradhpo.cluster.schedulers.decision import NEW, Decision, Scheduler, check
from gradhpo.cluster.schedulers.halving import SuccessiveHalving
from gradhpo.cluster.schedulers.pbt import PBT
from gradhpo.cluster.schedulers.random_search import RandomSearch
from gradhpo.cluster.schedulers.table import Table
from gradhpo.cluster.schedulers.written import BUILT_IN, Named, describe, loaded, parse

__all__ = [
    "BUILT_IN",
    "NEW",
    "PBT",
    "Decision",
    "Named",
    "RandomSearch",
    "Scheduler",
    "SuccessiveHalving",
    "Table",
    "check",
    "describe",
    "loaded",
    "parse",
]
