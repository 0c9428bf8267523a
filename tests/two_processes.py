"""One of two processes of a job, each with two CPU devices: run by `test_data_parallel`."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.devices import flags

os.environ["XLA_FLAGS"] = flags(2)
os.environ["JAX_PLATFORMS"] = "cpu"

import jax

jax.config.update("jax_enable_x64", True)

import numpy as np

from gradhpo.parallel import Population, data_parallel, global_batch, initialize, make_mesh


def main(address, rank, folder):
    initialize(address, 2, rank)
    assert (jax.process_count(), jax.device_count(), jax.local_device_count()) == (2, 4, 2)
    # Its constants are NumPy, so importing it computes nothing.
    from tests import test_data_parallel as shared

    mesh = make_mesh()
    optimizer = data_parallel(shared.build("one-step"), mesh)
    part = slice(rank * shared.ROWS // 2, (rank + 1) * shared.ROWS // 2)

    def mine(batch):
        return global_batch(jax.tree.map(lambda x: x[part], batch), mesh)

    state = optimizer.init(*jax.tree.map(np.asarray, (shared.PARAMS, shared.LAM)))
    for i in range(5):
        batches = (mine(shared.rows(i)), mine(shared.VAL))
        state = optimizer.step(state, *batches, shared.train_loss, shared.val_loss)
    save(Path(folder) / f"{rank}.npz", state)

    mesh = make_mesh(trial=2)
    divided = data_parallel(shared.build("one-step"), mesh)
    trials = Population(shared.problem(), divided, 2, batching="shard")
    state = trials.init(shared.KEY)
    for _ in range(2):
        state, _ = trials.run(state, 3, jax.random.split(shared.KEY, 2))
    save(Path(folder) / f"slot{rank}.npz", state)


def save(path, state):
    np.savez(path, *[np.asarray(x.addressable_shards[0].data) for x in jax.tree.leaves(state)])


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
