"""gradhpo: gradient-based hyperparameter optimization in JAX."""

from gradhpo import root
from gradhpo._version import __version__
from gradhpo.algorithms import (
    BOMEOptimizer,
    DrMADOptimizer,
    ESOptimizer,
    F2SAOptimizer,
    FOOptimizer,
    ForwardGradientOptimizer,
    ForwardOptimizer,
    GreedyOptimizer,
    ImplicitOptimizer,
    MASOBAOptimizer,
    NRESOptimizer,
    OneStepOptimizer,
    OnlineHypergradientOptimizer,
    PESOptimizer,
    SABAOptimizer,
    SOBAOptimizer,
    T1T2Optimizer,
    UnrolledOptimizer,
)
from gradhpo.checkpoints import DamagedFile
from gradhpo.compat import (
    LossFunctions,
    MetricDict,
    tree_dot,
    tree_l2_norm,
    tree_lerp,
    tree_normalize,
    tree_zeros_like,
    update_w_star,
    vjp_wrt_both,
    vjp_wrt_lambda,
)
from gradhpo.diagnose import diagnose
from gradhpo.diagnosis import Diagnosis
from gradhpo.errors import (
    DivergenceWarning,
    FrozenWarning,
    RecompileWarning,
    UnreachedWarning,
)
from gradhpo.lock import StorageInUse
from gradhpo.models import EquinoxModel, FlaxModel
from gradhpo.optimizer import BilevelOptimizer, Estimate
from gradhpo.problem import Problem
from gradhpo.solution import Best, Solution
from gradhpo.solver import solve
from gradhpo.state import BilevelState, DataBatch, LossFn, PyTree
from gradhpo.task import Aux, Task
from gradhpo.watch import Stop

__all__ = [
    "Aux",
    "BOMEOptimizer",
    "Best",
    "BilevelOptimizer",
    "BilevelState",
    "DamagedFile",
    "DataBatch",
    "Diagnosis",
    "DivergenceWarning",
    "DrMADOptimizer",
    "ESOptimizer",
    "EquinoxModel",
    "Estimate",
    "F2SAOptimizer",
    "FOOptimizer",
    "FlaxModel",
    "ForwardGradientOptimizer",
    "ForwardOptimizer",
    "FrozenWarning",
    "GreedyOptimizer",
    "ImplicitOptimizer",
    "LossFn",
    "LossFunctions",
    "MASOBAOptimizer",
    "MetricDict",
    "NRESOptimizer",
    "OneStepOptimizer",
    "OnlineHypergradientOptimizer",
    "PESOptimizer",
    "Problem",
    "PyTree",
    "RecompileWarning",
    "SABAOptimizer",
    "SOBAOptimizer",
    "Solution",
    "Stop",
    "StorageInUse",
    "T1T2Optimizer",
    "Task",
    "UnreachedWarning",
    "UnrolledOptimizer",
    "__version__",
    "diagnose",
    "root",
    "solve",
    "tree_dot",
    "tree_l2_norm",
    "tree_lerp",
    "tree_normalize",
    "tree_zeros_like",
    "update_w_star",
    "vjp_wrt_both",
    "vjp_wrt_lambda",
]
