"""Many devices and many trials in one process: sharded steps and batched populations."""

from gradhpo.parallel import compiled
from gradhpo.parallel.data import DataParallel, data_parallel
from gradhpo.parallel.mesh import global_batch, initialize, make_mesh, pad_batch
from gradhpo.parallel.population import Population
from gradhpo.parallel.rules import by_path, fully_sharded

__all__ = [
    "DataParallel",
    "Population",
    "by_path",
    "compiled",
    "data_parallel",
    "fully_sharded",
    "global_batch",
    "initialize",
    "make_mesh",
    "pad_batch",
]
