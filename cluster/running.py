"""One run of a sweep: workers start and compile, the controller goes through the generations."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import numpy as np

from gradhpo.checkpoints import DamagedFile
from gradhpo.cluster import columns, executors, front, manifest, programs
from gradhpo.cluster.allowed import AllowedChanges
from gradhpo.cluster.controller import Controller
from gradhpo.cluster.events import (
    Begun,
    Changed,
    Damaged,
    Event,
    Finished,
    GenerationDone,
    GoneBack,
    Resumed,
    Running,
    Starting,
    Stopped,
    Telling,
)
from gradhpo.cluster.events import Stopping as StopAsked
from gradhpo.cluster.executors import Executor
from gradhpo.cluster.journal import Journal
from gradhpo.cluster.orders import Spec
from gradhpo.cluster.plan import Layout, Rules
from gradhpo.cluster.report import Report
from gradhpo.cluster.settings import Identity, Place
from gradhpo.cluster.stopping import Stopping
from gradhpo.cluster.storage import Storage
from gradhpo.cluster.timings import Timings
from gradhpo.errors import UnreachedWarning, warn_user
from gradhpo.interrupts import deferred


class Run:
    """A run on a storage that is this sweep's, whose lock the caller holds."""

    def __init__(
        self,
        identity: Identity,
        place: Place,
        layout: Layout,
        spec: Spec,
        telling: Telling,
        began: float,
    ) -> None:
        self._identity, self._place, self._layout = identity, place, layout
        self._spec, self._telling, self._began = spec, telling, began
        self._storage = place.storage
        self._journal = Journal(place.storage)
        self._timings = Timings()
        self._clock = time.monotonic()

    def go(
        self,
        data: Any,
        allowed: Collection[str],
        renamed: Collection[str],
        about: Mapping[str, Any],
        how_to_resume: Callable[[], str],
    ) -> Report | None:
        """Run to the end, or until a signal; return what was done, None where nothing was left.

        Args:
          data: what the problem's function gets as `data`.
          allowed: what may be other than when the sweep began.
          renamed: what of it is, by its name.
          about: the manifest.
          how_to_resume: returns the sentence that says how to go on.
        """
        tell, total = self._telling.tell, self._place.generations
        done = self._journal.generation + 1
        tell(Begun("generation", done, total, _told(about), self._name(about), self._past))
        if done:
            tell(Resumed(done, total))
        for what in self._journal.damaged:
            tell(Damaged(what, None))
        storage, identity = Storage(self._storage), self._identity
        asked = (storage, self._place.stop, identity.objectives, self._clock, tell)
        stopping = Stopping(*asked)
        if done >= total:
            return None
        if stopping.already(done, front.of_journal(self._journal.last)):
            tell(self._stopped(total, stopping, how_to_resume))
            return None
        tell(Starting())
        with self._timings("executor"):
            executor = executors.open_executor(
                self._place.executor,
                self._spec,
                data,
                self._layout.shards,
                self._place.for_processes(self._layout.shards),
                tell,
            )
        try:
            with self._timings("workers"):
                changes = self._prepare(executor, allowed, renamed, about)
            controller = self._controller(executor, changes, stopping)
            tell(Running(done))
            started = time.perf_counter()

            def stop(name: str) -> None:
                stopping.signal(name)
                tell(StopAsked(name))

            with deferred(stop):
                controller.run(total)
            seconds = time.perf_counter() - started
            compiles = executor.xla_compiles()
        finally:
            executor.close()
        stopping.forget()
        done = self._journal.generation + 1
        early = done < total
        tell(self._stopped(total, stopping, how_to_resume) if early else Finished(done))
        return Report.of(
            self._telling.kept,
            timings=self._timings.seconds,
            worker_compiles=compiles,
            startup_seconds=started - self._began,
            seconds=seconds,
            generations=self._telling.progress,
        )

    def _name(self, about: Mapping[str, Any]) -> str:
        """Return what tells this sweep from all others, in a few letters and digits."""
        what = f"{self._storage} {manifest.digest(about)}"
        return hashlib.sha256(what.encode()).hexdigest()[:16]

    def _past(self, after: int) -> Iterator[GenerationDone]:
        """Yield the generations after a number that are done; without those that are damaged."""
        for entry in self._journal.entries():
            if entry["generation"] >= after:
                with contextlib.suppress(DamagedFile):
                    table = Storage(self._storage).load(entry["table"])[0]
                    told = front.told(front.found_in(entry), self._identity.objectives)
                    done, seconds = entry["generation"] + 1, entry["seconds"]
                    yield GenerationDone(done, columns.shown(table), seconds=seconds, **told)

    def _prepare(
        self,
        executor: Executor,
        allowed: Collection[str],
        renamed: Collection[str],
        about: Mapping[str, Any],
    ) -> AllowedChanges:
        """Compile, and see that it is what an earlier run compiled, or was allowed to change."""
        tell = self._telling.tell
        known = programs.recovered(self._storage, tell)
        layouts = [self._identity.batching] * self._layout.variants
        layouts = layouts if known is None else [entry["batching"] for entry in known]
        prepared = executor.prepare(dict(enumerate(layouts)), self._going_on())
        for text in dict.fromkeys(text for made in prepared for text in made.unreached):
            warn_user(text, UnreachedWarning)
        durable = self._journal.durable
        first = durable[-1]["generation"] + 1 if durable else 0
        args = (prepared, first, allowed, renamed, about, tell)
        changes = AllowedChanges(self._storage, programs.keep(self._storage, known, *args))
        if self._before_change(first, changes.at(first)):
            tell(GoneBack(first))  # first, since what a kill leaves of a journal is told again
            self._journal.drop_after(first - 1)
        return changes

    def _going_on(self) -> list[int]:
        """Return the combinations of choices that have not ended before the next generation."""
        durable = self._journal.durable
        if self._layout.races and durable:
            with contextlib.suppress(DamagedFile):
                table = Storage(self._storage).load(durable[-1]["table"])[0]
                return np.unique(table[columns.NEXT_VARIANT]).tolist()
        return list(range(self._layout.variants))

    def _before_change(self, first: int, changes: list[str]) -> bool:
        """Whether generations from the first that has no states on came before a change.

        One that an earlier run allowed counts too, if it was killed before it dropped them.
        """
        changed = any(isinstance(event, Changed) for event in self._telling.kept)
        entries = [entry for entry in self._journal.last if entry["generation"] == first]
        return any(changed or (changes and changes != entry.get("changes")) for entry in entries)

    def _stopped(self, total: int, stopping: Stopping, how_to_resume: Callable[[], str]) -> Stopped:
        done = self._journal.generation + 1
        about = ("generation", done, total - done, how_to_resume())
        return Stopped(*about, stopping.reason or "", stopping.expected)

    def _controller(
        self, executor: Executor, changes: AllowedChanges, stopping: Stopping
    ) -> Controller:
        identity = self._identity
        about = (identity.scheduler, identity.space, identity.seed)
        rules = Rules(*about, identity.objectives, identity.drawing)
        what = (Storage(self._storage), self._journal, executor, self._layout, rules)
        every = self._place.checkpoint_every

        def tell(event: Event) -> None:
            self._telling.tell(event)
            back = event.generation if isinstance(event, Damaged) else None
            if back is not None and changes.after(back):
                self._telling.tell(GoneBack(back))  # computed again, but not as it was

        return Controller(*what, tell, stopping, every, changes.begin)


def _told(about: Mapping[str, Any]) -> dict[str, Any]:
    """Return a manifest for observers: of the workers' environment, secrets maybe, names alone."""
    how = dict(about["how"])
    how |= {name: list(how[name]) for name in ("env", "runtime_env") if how.get(name)}
    return {**about, "how": how}
