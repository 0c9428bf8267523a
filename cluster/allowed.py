"""What was allowed to be other than before (data, code, mesh), and from which generation on."""

from __future__ import annotations

from collections.abc import Sequence

from gradhpo.cluster import manifest
from gradhpo.cluster.programs import Entry
from gradhpo.cluster.storage import Storage
from gradhpo.files import Where


class AllowedChanges:
    """By generation, as a storage's programs say it.

    Args:
      storage: of the sweep, whose lock the caller holds.
      entries: of its programs.
    """

    def __init__(self, storage: Where, entries: Sequence[Entry]) -> None:
        self._storage, self._entries = storage, list(entries)

    def at(self, generation: int) -> list[str]:
        """Return what changed in a generation."""
        return sorted({name for g, name in self._all() if g == generation})

    def after(self, generation: int) -> bool:
        """Whether anything changed after a generation."""
        return any(g > generation for g, _ in self._all())

    def begin(self, generation: int) -> list[str]:
        """Return what changed in a generation that is done now, and is written down next.

        What was to change later begins here: the sweep has gone back across the change, and what it
        computes is computed with it.
        """
        if self.after(generation):
            self._entries = [_moved(entry, generation) for entry in self._entries]
            files = Storage(self._storage)
            manifest.write(files.programs, self._entries)
            about = manifest.read(self._storage)
            manifest.write(files.manifest, about | {"programs": self._entries})
        return self.at(generation)

    def _all(self) -> list[tuple[int, str]]:
        return [pair for entry in self._entries for pair in _changes(entry)]


def _changes(entry: Entry) -> list[tuple[int, str]]:
    return [(int(generation), str(name)) for generation, name in entry.get("changes", [])]


def _moved(entry: Entry, generation: int) -> Entry:
    moved = dict.fromkeys((min(g, generation), name) for g, name in _changes(entry))
    return {**entry, "changes": [list(pair) for pair in moved]}
