"""Checkpoints that threads write while the worker computes the next generation.

Of each shard at most one state is being written: the memory that it takes is that of a worker's
states once more (on a CPU the state before the present one, which is written as it lies).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from gradhpo.checkpoints import Saved
from gradhpo.cluster.failures import StorageFailed
from gradhpo.cluster.incarnations import check_owner
from gradhpo.cluster.orders import Checkpoint
from gradhpo.cluster.storage import Storage
from gradhpo.parts import Divided

THREADS = 4
"""Files that are written at a time, each of another shard."""


class Writer:
    """Writes the checkpoints of a worker's shards.

    Args:
      storage: of the sweep.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._pool: ThreadPoolExecutor | None = None
        self._flying: dict[int, tuple[int, Future[Saved]]] = {}
        """By shard, the generation that is being written."""
        self._durable: dict[int, tuple[Checkpoint, ...]] = {}
        """By shard, the newest ones that are: two at most, the newest last."""

    def start(
        self,
        shard: int,
        generation: int,
        incarnation: int,
        arrays: Mapping[str, np.ndarray] | Divided,
        about: Mapping[str, Any],
    ) -> None:
        """Begin to write a shard's state, when the one before is written.

        Args:
          shard: the shard.
          generation: after which the state is.
          incarnation: of this worker.
          arrays: the state; they must not change until they are written.
          about: what else to remember.

        Raises:
          Superseded: if the shard belongs to another incarnation.
          StorageFailed: if it cannot be written, or the one before could not.
        """
        self.wait(shard)
        _on_storage(str(self._storage), check_owner, self._storage, shard, incarnation)
        save = self._storage.save_checkpoint
        args = (generation, shard, incarnation, arrays, about)
        self._flying[shard] = generation, self._submit(save, *args)

    def start_winner(
        self,
        shard: int,
        generation: int,
        incarnation: int,
        rows: Mapping[str, np.ndarray] | Divided,
        slots: Sequence[int],
    ) -> Future[Saved]:
        """Begin to write some slots' arrays apart; what is returned gives `StorageFailed` too."""
        _on_storage(str(self._storage), check_owner, self._storage, shard, incarnation)
        return self._submit(self._storage.save_winner, generation, shard, incarnation, rows, slots)

    def newest(self, shard: int) -> tuple[Checkpoint, ...]:
        """Return the newest checkpoints of a shard that are durable; waits for none.

        Raises:
          StorageFailed: if one could not be written.
        """
        if shard in self._flying and self._flying[shard][1].done():
            self.wait(shard)
        return self._durable.get(shard, ())

    def wait(self, shard: int) -> tuple[Checkpoint, ...]:
        """Return the same when what is being written is durable."""
        if shard in self._flying:
            generation, future = self._flying.pop(shard)
            made = Checkpoint(generation, future.result())
            self._durable[shard] = (*self._durable.get(shard, ()), made)[-2:]
        return self._durable.get(shard, ())

    def forget(self, shard: int, generation: int) -> None:
        """Forget the checkpoints from this generation on, which is computed again."""
        kept = [made for made in self.wait(shard) if made.generation < generation]
        self._durable[shard] = tuple(kept)

    def close(self) -> None:
        """Finish what is being written, and begin nothing more."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _submit(self, save: Callable[..., Saved], *args: Any) -> Future[Saved]:
        self._pool = self._pool or ThreadPoolExecutor(THREADS, "gradhpo-checkpoint")
        return self._pool.submit(_on_storage, str(self._storage), save, *args)


def _on_storage(storage: str, function: Callable[..., Any], *args: Any) -> Any:
    try:
        return function(*args)
    except OSError as error:
        raise StorageFailed(error.errno, error.strerror, error.filename or storage) from error
