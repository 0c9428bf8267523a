"""One of two processes that hold an array in parts: run by `test_divided`."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

if __name__ == "__main__":
    from tests.devices import flags

    os.environ["XLA_FLAGS"] = flags(2)
    os.environ["JAX_PLATFORMS"] = "cpu"

import json

import jax
import numpy as np

from gradhpo.checkpoints import Saved
from gradhpo.cluster.storage import Storage
from gradhpo.parallel import initialize, make_mesh
from gradhpo.parallel.held import held, restored
from gradhpo.parts import Divided
from tests.sweeps import wait_until

ARRAYS = {
    ".w": np.random.default_rng(0).normal(size=(2, 8, 4096)).astype(np.float32),
    ".n": np.arange(2, dtype=np.int32),
}


def main(address, rank, storage):
    initialize(address, 2, rank)
    mesh = make_mesh()
    whole = jax.NamedSharding(mesh, jax.P())
    columns, rows = (jax.NamedSharding(mesh, jax.P(None, *s)) for s in ((None, "data"), ("data",)))
    parts = {
        name: held(jax.make_array_from_callback(x.shape, lie, lambda index, x=x: x[index]))
        for (name, x), lie in zip(ARRAYS.items(), (columns, whole), strict=True)
    }
    made = Divided(parts, rank, jax.process_count(), turn=1)
    saved = Storage(storage).save_checkpoint(0, 0, 1, made, {"variant": 0})
    written = Path(storage) / "written.json"
    if rank == 0:
        written.with_suffix(".tmp").write_text(json.dumps(saved))
        written.with_suffix(".tmp").rename(written)
    wait_until(written.exists, 60, "the first process wrote nothing")
    saved = Saved(*json.loads(written.read_text()))
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in ARRAYS.items()}
    back, _ = restored(Storage(storage).files, saved, shapes, {".w": rows, ".n": whole})
    for name, array in back.items():
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(shard.data, ARRAYS[name][shard.index])


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
