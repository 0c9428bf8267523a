"""The tables of a sweep's generations, each read from its storage when it is asked for."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence

from gradhpo.checkpoints import DamagedFile
from gradhpo.cluster.columns import Columns
from gradhpo.cluster.journal import Entry
from gradhpo.cluster.storage import Storage


class Tables:
    """By generation, of those that a journal had.

    Args:
      storage: of the sweep.
      entries: of the journal.
    """

    def __init__(self, storage: Storage, entries: Sequence[Entry]) -> None:
        self._storage = storage
        self._saved = {entry["generation"]: entry["table"] for entry in entries}

    def at(self, generation: int) -> Columns:
        """Return a generation's table; where its line is damaged, by what its name proves.

        Raises:
          DamagedFile: if it is missing, cut short or changed.
        """
        with named(self._storage):
            return self._storage.load_table(generation, self._saved.get(generation))


@contextlib.contextmanager
def named(storage: Storage) -> Generator[None]:
    """Let an error about a file say in which storage."""
    try:
        yield
    except DamagedFile as error:
        raise DamagedFile(f"{storage}/{error.file}", error.reason) from None
