"""Many devices and many trials in one process: sharded steps and batched populations."""

from gradhpo.parallel.data import DataParallel, data_parallel, fully_sharded
from gradhpo.parallel.mesh import global_batch, initialize, make_mesh, pad_batch

__all__ = [
    "DataParallel",
    "data_parallel",
    "fully_sharded",
    "global_batch",
    "initialize",
    "make_mesh",
    "pad_batch",
]
