"""Which incarnation of a worker owns a shard: a worker that was given up cannot commit anything.

Every worker process gets a number that was never used in this storage. Before the driver gives it
a shard, the file says so; before a worker commits, it looks whether the shard is still its own.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

from gradhpo.cluster.failures import Superseded
from gradhpo.cluster.storage import Storage
from gradhpo.files import Where

RESERVE = 1000
"""Numbers that a driver reserves at a time; what it does not use is never used."""


class Incarnations:
    """The driver's side: hands out numbers, and says whose a shard is."""

    def __init__(self, storage: Where) -> None:
        self._text = Storage(storage).incarnations
        content: dict[str, Any] = {"reserved": 0, "owners": {}}
        try:
            content = json.loads(self._text.read_text())
        except FileNotFoundError:
            pass
        except ValueError:  # damaged: the time is above all numbers that were given out
            content["reserved"] = int(time.time())
        self._next = self._reserved = int(content["reserved"])
        self._owners: dict[str, int] = content["owners"]

    def new(self) -> int:
        """Return a number that no worker of this storage ever had."""
        self._next += 1
        if self._next > self._reserved:
            self._reserved = self._next + RESERVE
            self._write()
        return self._next

    def own(self, owners: Mapping[int, int]) -> None:
        """Give shards to workers: by shard, the incarnation that owns it from now on."""
        given = self._owners | {str(shard): owner for shard, owner in owners.items()}
        if given != self._owners:
            self._owners = given
            self._write()

    def _write(self) -> None:
        self._text.write_json({"reserved": self._reserved, "owners": self._owners})


def check_owner(storage: Storage, shard: int, incarnation: int) -> None:
    """Raise unless this incarnation owns the shard: the worker's side, before it commits.

    Raises:
      Superseded: if another one owns it.
    """
    owners = json.loads(storage.incarnations.read_text())["owners"]
    if owners.get(str(shard)) != incarnation:
        raise Superseded(
            f"shard {shard} belongs to incarnation {owners.get(str(shard))}, not {incarnation}"
        )
