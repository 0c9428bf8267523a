"""What runs a sweep's shards, as the controller sees it."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import Any

from gradhpo.checkpoints import Saved
from gradhpo.cluster.orders import Order, Prepared, Result


class Executor(abc.ABC):
    """Executes orders, somewhere. The numbers do not depend on where."""

    @abc.abstractmethod
    def prepare(self, layouts: Mapping[int, Any], needed: Sequence[int]) -> list[Prepared]:
        """Compile the programs of the variants that are needed, each once.

        Others are compiled should an order come for them. `layouts` gives each one's `batching`.
        """

    @abc.abstractmethod
    def run(self, orders: list[Order]) -> list[Result]:
        """Execute a generation: every order once. Lost workers are replaced meanwhile.

        Raises:
          DamagedFile: if a checkpoint that an order starts from is damaged.
          StateGone: if the state that an order starts from was lost, and it names no checkpoint.
          SweepError: if it cannot be done, with a worker's own traceback.
        """

    @abc.abstractmethod
    def checkpoints(self, orders: list[Order]) -> list[Saved]:
        """Return the checkpoints after these orders, the last that were run, when all are durable.

        They are written now where an order did not say so.

        Raises:
          StateGone: if a worker was lost that held one.
          SweepError: if they cannot be written.
        """

    def moves(self) -> bool:
        """Whether shards would change workers if orders named the checkpoints they start from."""
        return False

    @abc.abstractmethod
    def close(self) -> None:
        """Leave no process behind."""
