"""The Ray actor that owns a worker's populations: a `ShardHost` behind actor calls."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from typing import Any

from gradhpo.checkpoints import Saved

PASSED_ON = ("XLA_FLAGS", "JAX_ENABLE_X64", "JAX_DEFAULT_MATMUL_PRECISION")
"""Settings of JAX that change numbers, handed from the driver to workers."""


def environment(resources: Mapping[str, float], given: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a worker's process, which JAX reads when its backend starts."""
    passed = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    accelerators = set(resources) - {"num_cpus", "memory"}
    if not accelerators:
        passed["JAX_PLATFORMS"] = "cpu"  # or every worker would take memory on every GPU
    # XLA's CPU backend starts a thread for each core of the machine otherwise.
    passed["PJRT_NPROC"] = str(max(1, int(resources.get("num_cpus", 1))))
    return {**passed, **given}


class Worker:
    """One process of a worker. Every call may be repeated: it says all that it depends on."""

    def __init__(self) -> None:
        self._host: Any = None

    def address(self) -> str:
        """Return where the first process of a gang can coordinate the others."""
        import ray

        host = ray.util.get_node_ip_address()
        with socket.socket() as free:
            free.bind((host, 0))
            return f"{host}:{free.getsockname()[1]}"

    def start(self, spec: Any, data: Any, gang: tuple[str, int, int] | None) -> dict[str, Any]:
        """Start JAX, as one process of a gang where there is one; return who this is."""
        if gang is not None:
            from gradhpo.parallel import initialize

            # The coordinator listens on the node's address in Ray, and on no other.
            initialize(*gang, bind_address=gang[0])
        from gradhpo.cluster.shard import ShardHost

        self._host = ShardHost(spec, data)
        return {"pid": os.getpid(), "host": socket.gethostname()}

    def prepare(self, variant: int, batching: Any, blobs: Any) -> Any:
        """See `ShardHost.prepare`."""
        return self._host.prepare(variant, batching, blobs)

    def run(self, order: Any, incarnation: int, sources: list[int], *exported: Any) -> Any:
        """See `ShardHost.run`; `exported` holds the rows from each of the shards `sources`."""
        return self._host.run(order, incarnation, dict(zip(sources, exported, strict=True)))

    def checkpoint(self, shard: int, generation: int) -> Saved:
        """See `ShardHost.checkpoint`."""
        return self._host.checkpoint(shard, generation)

    def export(
        self, shard: int, variant: int, generation: int, checkpoint: Saved | None, slots: list[int]
    ) -> Any:
        """See `ShardHost.export`; the first of the two results only says that it went well."""
        return None, self._host.export(shard, variant, generation, checkpoint, slots)

    def xla_compiles(self) -> int:
        """See `ShardHost.xla_compiles`."""
        return self._host.xla_compiles()
