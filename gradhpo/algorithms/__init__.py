"""The algorithms, one file each: a file states its estimate of the hypergradient."""

from gradhpo.algorithms.drmad import DrMADOptimizer
from gradhpo.algorithms.es import ESOptimizer
from gradhpo.algorithms.first_order import FOOptimizer
from gradhpo.algorithms.forward import ForwardOptimizer
from gradhpo.algorithms.forward_gradient import ForwardGradientOptimizer
from gradhpo.algorithms.greedy import GreedyOptimizer
from gradhpo.algorithms.hyperdistill import OnlineHypergradientOptimizer
from gradhpo.algorithms.implicit import ImplicitOptimizer
from gradhpo.algorithms.nres import NRESOptimizer
from gradhpo.algorithms.one_step import OneStepOptimizer
from gradhpo.algorithms.pes import PESOptimizer
from gradhpo.algorithms.t1t2 import T1T2Optimizer
from gradhpo.algorithms.unrolled import UnrolledOptimizer

__all__ = [
    "DrMADOptimizer",
    "ESOptimizer",
    "FOOptimizer",
    "ForwardGradientOptimizer",
    "ForwardOptimizer",
    "GreedyOptimizer",
    "ImplicitOptimizer",
    "NRESOptimizer",
    "OneStepOptimizer",
    "OnlineHypergradientOptimizer",
    "PESOptimizer",
    "T1T2Optimizer",
    "UnrolledOptimizer",
]
