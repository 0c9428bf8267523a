"""The algorithms, one file each: a file states its estimate of the hypergradient."""

from gradhpo.algorithms.first_order import FOOptimizer
from gradhpo.algorithms.greedy import GreedyOptimizer
from gradhpo.algorithms.hyperdistill import OnlineHypergradientOptimizer
from gradhpo.algorithms.one_step import OneStepOptimizer
from gradhpo.algorithms.t1t2 import T1T2Optimizer

__all__ = [
    "FOOptimizer",
    "GreedyOptimizer",
    "OneStepOptimizer",
    "OnlineHypergradientOptimizer",
    "T1T2Optimizer",
]
