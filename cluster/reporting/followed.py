"""A sweep's storage, followed: what is new in its journal, its tables and its events, read once."""

from __future__ import annotations

from typing import Any

import numpy as np

from gradhpo.checkpoints import DamagedFile, Saved
from gradhpo.cluster import event_log, front, journal, manifest
from gradhpo.cluster.front import Found
from gradhpo.cluster.journal import Entry
from gradhpo.cluster.lineage import first_changes
from gradhpo.cluster.plan import Layout, Rules
from gradhpo.cluster.reporting.costs import Costs
from gradhpo.cluster.reporting.generations import Generation, Reader, best_so_far
from gradhpo.cluster.reporting.tail import Tail
from gradhpo.cluster.schedulers import RandomSearch
from gradhpo.cluster.space import Changes
from gradhpo.cluster.storage import Storage
from gradhpo.files import Where


class Followed:
    """What a storage holds; `look` takes in what is new.

    Args:
      storage: the sweep's folder, or its address.

    Raises:
      SweepError: if there is no sweep, or its manifest is damaged.
    """

    def __init__(self, storage: Where) -> None:
        self.storage = Storage(storage)
        self.known = manifest.read(storage)
        self.space = manifest.space(self.known)
        self.objectives = manifest.compared(self.known)
        variants, population = len(self.space.variants()), self.known["population"]
        shards = self.known["shards"]
        races = self.space.race is not None
        self.layout = Layout(variants, shards, population // shards, races)
        self._journal, self._events = Tail(self.storage.journal), Tail(self.storage.events)
        self.epoch = 0
        """Goes up where generations that were shown are no longer there."""
        self.costs = Costs()
        self._forget()

    def _forget(self) -> None:
        self.epoch += 1
        self.last: Entry | None = None
        """The journal's last line."""
        self.seconds: list[float] = []
        """Of each generation; NaN where its line is damaged."""
        self.told: list[Entry] = []
        """The lines that say more: what changed, ended or stopped."""
        self.generations: list[Generation] = []
        self.best: list[float] = []
        """Of one metric, the best so far after each; NaN before there is one."""
        self.damaged: list[str] = []
        self._reader: Reader | None = None

    def look(self) -> None:
        """Take in what was added since the last look, and whether anybody runs the sweep."""
        self.known = manifest.read(self.storage.files.address)
        again, lines = self._journal.lines()
        entries = [entry for entry in map(journal.decode, lines) if entry is not None]
        done = len(self.generations)
        if again or any(entry["generation"] < done for entry in entries):
            entries = self._all(entries if again else None)
            self._forget()
        for entry in entries:
            self._add(entry)
        again, lines = self._events.lines()
        if again:
            self.costs = Costs()
        self.costs.add([facts for facts in map(event_log.decoded, lines) if facts is not None])

    def _all(self, entries: list[Entry] | None) -> list[Entry]:
        """Return the last entry of each generation, of those or all that the journal has."""
        if entries is None:
            self._journal = Tail(self.storage.journal)
            _, lines = self._journal.lines()
            entries = [entry for entry in map(journal.decode, lines) if entry is not None]
        last = {entry["generation"]: entry for entry in entries}
        return [last[generation] for generation in sorted(last)]

    def _add(self, entry: Entry) -> None:
        for missing in range(len(self.generations), entry["generation"]):  # its line is damaged
            self.seconds.append(float("nan"))
            self._read(missing, None)
        self.last = entry
        self.seconds.append(entry["seconds"])
        if entry.keys() & {"changes", "ended", "stopped"}:
            self.told.append(entry)
        self._read(entry["generation"], entry["table"])

    def _read(self, generation: int, saved: Saved | None) -> None:
        try:
            table = self.storage.load_table(generation, saved)
            if self._reader is None:
                beginning = self.layout.beginning()
                self._reader = Reader(self.space, beginning, self._first(table, generation))
            self.generations.append(self._reader.read(table))
        except DamagedFile as error:
            self.damaged.append(str(error))
            self._reader = None
            n = self.layout.population
            nothing = (np.full(n, -1), np.arange(n), self.layout.beginning(), np.zeros(n, int))
            self.generations.append(Generation(*nothing, {}, {}, {}))
        if not self.objectives.several:
            ((name, sign),) = self.objectives.signs.items()
            before = self.best[-1] if self.best else float("nan")
            self.best.append(best_so_far(self.column(name, generation), sign, before))

    def _first(self, table: Any, generation: int) -> Changes:
        """Return what the first trials drew; nothing where only the program can tell."""
        if generation > 0:
            return {}
        told = any(self.known[name] is not None for name in manifest.FIRST)
        rules = Rules(RandomSearch(), self.space, self.known["seed"], self.objectives)
        return first_changes(table if told else None, self.layout, rules)

    @property
    def found(self) -> tuple[Found, ...]:
        """The best trial, or the front, the best of the first objective first."""
        return tuple(sorted(front.found_in(self.last)))

    def column(self, name: str, generation: int) -> np.ndarray:
        """Return what was measured, or NaN where its table is damaged."""
        found = self.generations[generation].measured
        return found.get(name, np.full(self.layout.population, np.nan, np.float32))

    @property
    def metrics(self) -> list[str]:
        """The names of what is measured, those that are compared first."""
        there = [name for one in self.generations[-1:] for name in one.measured]
        return list(dict.fromkeys([*self.objectives.names, *there]))

    def setting(self, name: str, generation: int, *, begun: bool = False) -> np.ndarray:
        """Return a setting after a generation, or as it began; NaN where its table is damaged."""
        one = self.generations[generation]
        found = one.begun if begun else one.ended
        return found.get(name, np.full(self.layout.population, np.nan, np.float32))

    def arrays(self, found: Found) -> dict[str, np.ndarray]:
        """Return a kept trial's state by path.

        Raises:
          DamagedFile: if its checkpoint is damaged.
        """
        return self.storage.load_slot(found.checkpoint, found.slot % self.layout.slots)
