"""One of two processes that hold the shards of a divided sweep: run by `test_divided`."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

if __name__ == "__main__":
    from tests.devices import flags

    os.environ["XLA_FLAGS"] = flags(2)
    os.environ["JAX_PLATFORMS"] = "cpu"

import dataclasses
import json

import numpy as np
from jax.experimental import multihost_utils

from gradhpo.checkpoints import Saved
from gradhpo.cluster import SearchSpace, loguniform
from gradhpo.cluster.orders import Import, Order, Spec
from gradhpo.cluster.shard import ShardHost
from gradhpo.parallel import initialize

SHARDS, SLOTS, INCARNATION = 2, 2, 1
SPEC = Spec(
    problem="tests.divided_problems:small_problem",
    optimizer="tests.divided_problems:small_optimizer",
    space=SearchSpace(hyperparams={"log_rate": loguniform(1e-3, 1e-1, stored="log")}),
    slots=SLOTS,
    steps=2,
    seed=0,
    storage="",
    batching="map",
    mesh={"data": 4},
    states=SHARDS,
    rules={"": "data"},
)


def order(shard, generation, start=None, imports=()):
    """A generation in which every trial goes on, but for those that come from the other shard."""
    return Order(
        shard=shard,
        variant=0,
        generation=generation,
        trials=np.arange(SLOTS, dtype=np.uint32) + SLOTS * shard,
        parents=np.arange(SLOTS, dtype=np.int32),
        fresh=np.full(SLOTS, generation == 0),
        lr_hyper=None,
        changes={},
        start=start,
        imports=imports,
        winner=1 if generation == 1 and shard == 0 else None,
    )


def of_the_first(saved):
    """Return what the first process gives, as a sweep's driver hands it to all."""
    text = np.frombuffer(json.dumps(saved).ljust(256).encode(), np.uint8)
    return Saved(*json.loads(multihost_utils.broadcast_one_to_all(text).tobytes()))


def generations(storage):
    """Two generations of two shards, one of whose trials is copied; return what was written."""
    host = ShardHost(dataclasses.replace(SPEC, storage=str(storage)))
    host.prepare(0, "map")
    for shard in range(SHARDS):
        host.run(order(shard, 0), INCARNATION)
    exported = of_the_first(host.export(1, 0, 0, None, [0]))
    item = Import(slot=1, source_shard=1, source_slot=0, checkpoint=None)
    ran = host.run(order(0, 1, imports=(item,)), INCARNATION, {1: exported})
    host.run(order(1, 1), INCARNATION)
    saved = [host.checkpoint(shard, 1) for shard in range(SHARDS)]
    host.close()
    return {"saved": saved, "winner": ran.winner, "exported": exported}


def main(address, rank, storage):
    initialize(address, 2, rank)
    written = generations(storage)
    if rank == 0:
        (Path(storage) / "written.json").write_text(json.dumps(written))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
