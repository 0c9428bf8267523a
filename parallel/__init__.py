"""Many devices and many trials in one process: sharded steps and batched populations."""

from gradhpo.parallel import compiled
from gradhpo.parallel.data import DataParallel, data_parallel, fully_sharded
from gradhpo.parallel.mesh import global_batch, initialize, make_mesh, pad_batch
from gradhpo.parallel.population import Population

__all__ = [
    "DataParallel",
    "Population",
    "compiled",
    "data_parallel",
    "fully_sharded",
    "global_batch",
    "initialize",
    "make_mesh",
    "pad_batch",
]
