"""One process of a worker: a `ShardHost` behind calls whose answers every process can read."""

from __future__ import annotations

import os
import socket
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gradhpo.checkpoints import DamagedFile, Saved
from gradhpo.cluster.failures import StateGone, StorageFailed, Superseded, WorkerFailed

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


class Answer(NamedTuple):
    """What a call gave, or the error that it raised."""

    value: Any = None
    error: Exception | None = None
    compiles: int = 0
    """Programs that XLA compiled in this process so far."""


class Worker:
    """One process of a worker. Every call may be repeated: it says all that it depends on."""

    def __init__(self) -> None:
        self._host: Any = None

    def do(self, what: str, *arguments: Any) -> Answer:
        """Call a method of this class; whatever it raises is in the answer, and in the log."""
        try:
            value = getattr(self, what)(*arguments)
        except Exception as error:
            traceback.print_exc()
            return Answer(None, readable(error), self.compiles())
        return Answer(value, None, self.compiles())

    def start(
        self, spec: Any, data: Any, gang: tuple[str, int, int] | None, log: str | None = None
    ) -> dict[str, Any]:
        """Start JAX, as one process of a gang where there is one; return who this is.

        Args:
          spec: the sweep.
          data: the driver's arrays.
          gang: the address at which the processes of a worker meet, how many, and which this is.
          log: a file into which all that is printed shall go from now on.
        """
        about: dict[str, Any] = {"pid": os.getpid(), "host": socket.gethostname()}
        if log is not None and _print_into(Path(log)):
            about["log"] = log
        if gang is not None:
            from gradhpo.parallel import initialize

            # The coordinator listens on the node's address in Ray, and on no other.
            initialize(*gang, bind_address=gang[0])
        from gradhpo.cluster.shard import ShardHost

        self._host = ShardHost(spec, data)
        return about

    def trace(self, variant: int, batching: Any) -> None:
        """See `ShardHost.trace`."""
        self._host.trace(variant, batching)

    def begin(self, variant: int, batching: Any) -> None:
        """See `ShardHost.begin`."""
        self._host.begin(variant, batching)

    def prepare(self, variant: int, batching: Any, blobs: Any) -> Any:
        """See `ShardHost.prepare`."""
        return self._host.prepare(variant, batching, blobs)

    def forget(self, variant: int) -> None:
        """See `ShardHost.forget`."""
        self._host.forget(variant)

    def run(self, order: Any, incarnation: int, sources: list[int], *exported: Any) -> Any:
        """See `ShardHost.run`; `exported` holds the rows from each of the shards `sources`."""
        return self._host.run(order, incarnation, dict(zip(sources, exported, strict=True)))

    def checkpoint(self, shard: int, generation: int) -> Saved:
        """See `ShardHost.checkpoint`."""
        return self._host.checkpoint(shard, generation)

    def export(self, *arguments: Any) -> Any:
        """See `ShardHost.export`."""
        return self._host.export(*arguments)

    def close(self) -> None:
        """Finish what is being written."""
        if self._host is not None:
            self._host.close()

    def compiles(self) -> int:
        """Return how many programs XLA compiled in this process since it was started."""
        return 0 if self._host is None else self._host.xla_compiles()


def readable(error: Exception) -> Exception:
    """Return an error that any process can read: a user's own type may be unknown to others."""
    if type(error) in (DamagedFile, StateGone, Superseded, StorageFailed):
        return error
    return WorkerFailed.of(error)


def _print_into(log: Path) -> bool:
    """Let this process, native code too, print into a file; whether that went well."""
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    except OSError:
        return False
    for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
        stream.flush()
        os.dup2(file, number)
    os.close(file)
    return True
