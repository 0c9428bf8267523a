"""The algorithms, one file each: a file states its estimate of the hypergradient."""

from gradhpo.algorithms.bome import BOMEOptimizer
from gradhpo.algorithms.drmad import DrMADOptimizer
from gradhpo.algorithms.es import ESOptimizer
from gradhpo.algorithms.f2sa import F2SAOptimizer
from gradhpo.algorithms.first_order import FOOptimizer
from gradhpo.algorithms.forward import ForwardOptimizer
from gradhpo.algorithms.forward_gradient import ForwardGradientOptimizer
from gradhpo.algorithms.greedy import GreedyOptimizer
from gradhpo.algorithms.hyperdistill import OnlineHypergradientOptimizer
from gradhpo.algorithms.implicit import ImplicitOptimizer
from gradhpo.algorithms.masoba import MASOBAOptimizer
from gradhpo.algorithms.nres import NRESOptimizer
from gradhpo.algorithms.one_step import OneStepOptimizer
from gradhpo.algorithms.pes import PESOptimizer
from gradhpo.algorithms.saba import SABAOptimizer
from gradhpo.algorithms.soba import SOBAOptimizer
from gradhpo.algorithms.t1t2 import T1T2Optimizer
from gradhpo.algorithms.unrolled import UnrolledOptimizer

__all__ = [
    "BOMEOptimizer",
    "DrMADOptimizer",
    "ESOptimizer",
    "F2SAOptimizer",
    "FOOptimizer",
    "ForwardGradientOptimizer",
    "ForwardOptimizer",
    "GreedyOptimizer",
    "ImplicitOptimizer",
    "MASOBAOptimizer",
    "NRESOptimizer",
    "OneStepOptimizer",
    "OnlineHypergradientOptimizer",
    "PESOptimizer",
    "SABAOptimizer",
    "SOBAOptimizer",
    "T1T2Optimizer",
    "UnrolledOptimizer",
]
