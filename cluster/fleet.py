"""A sweep's fleet: which worker holds which shard, who is given up, and what is sent next.

Pure: events in, commands out, and `now` comes in with every call; no Ray, no JAX, no clock. An
executor carries the commands out, in their order, and reports the events.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from gradhpo.cluster.commands import (
    IDLE,
    START,
    Again,
    Answered,
    Command,
    Done,
    Event,
    Fail,
    Failed,
    Gone,
    Heard,
    Job,
    Kill,
    Own,
    Room,
    Send,
    Start,
)
from gradhpo.cluster.failures import Superseded, SweepError

EARLY = ("start", "trace", "begin", "prepare")
"""What a worker does before it has any shard."""
PATIENCE = 10.0
"""Seconds that a failed process of a worker waits for the others' word: one of them may be dead,
and the failure only what follows."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """How many workers a fleet has, and how long it waits for them; seconds."""

    workers: int
    processes: int = 1
    """Of a worker: a call is done when all of them have answered."""
    deadline: float | None = None
    """On work; None waits for as long as a worker is heard."""
    start_deadline: float = 600.0
    heartbeat: float = 60.0
    """A ready worker, one of whose processes was not heard for so long, is given up."""
    wait: float = 0.0
    """For room; 0 where nothing will grow."""
    most_losses: int = 5
    """How often in a row workers may be lost on the same job, or while they start."""


class NoWorker(SweepError):  # noqa: N818
    """There is no room for a worker, or none starts; what there is only the executor can say."""


_Answer = Answered | Failed | Again


@dataclasses.dataclass(eq=False)
class _Call:
    job: Job
    answers: dict[int, _Answer] = dataclasses.field(default_factory=dict[int, "_Answer"])
    wanted: bool = True
    """False when the generation that it belongs to was given up."""
    troubled: float | None = None
    """Since when one of its answers is no value."""


@dataclasses.dataclass(eq=False)
class _Worker:
    since: float
    """When it was started."""
    progress: float
    """When it last finished something, or was given something while idle."""
    heard: dict[int, float]
    """By process, when it last gave a sign of life."""
    ready: bool = False
    variants: set[int] = dataclasses.field(default_factory=set[int])
    """Those whose programs it has."""
    traced: set[int] = dataclasses.field(default_factory=set[int])
    """Those that it was told to trace, to begin or to prepare."""
    begun: set[int] = dataclasses.field(default_factory=set[int])
    """Those that it has traced, and compiles beside its calls; a "prepare" waits for one."""
    calls: dict[int, _Call] = dataclasses.field(default_factory=dict[int, _Call])
    """Under way, in the order in which they were sent, which is that in which they are done."""


class Fleet:
    """Decides for the workers of a sweep.

    Args:
      limits: how many, how long.
      shards: how many there are to hold.
      number: gives a new worker its number, one that no worker of the storage ever had.
    """

    def __init__(self, limits: Limits, shards: int, number: Callable[[], int]) -> None:
        self._limits, self._shards, self._number = limits, shards, number
        self._workers: dict[int, _Worker] = {}
        self._owner: dict[int, int] = {}
        self._asked: set[Job] = set()
        self._waiting: list[Job] = []
        self._losses: collections.Counter[Job] = collections.Counter()
        self._calls = itertools.count(1)
        self._unbalanced = False
        self._room: int | None = None
        self._no_room_since: float | None = None
        self._gather_until: float | None = None
        """Until when the first generation waits for more workers; set when the first is ready."""
        self._out: list[Command] = []
        self._fail: Fail | None = None
        self._now, self._looked = 0.0, float("nan")
        shortest = min(limits.heartbeat, limits.start_deadline, limits.deadline or float("inf"))
        self.longest_look = min(5.0, shortest / 4)
        """Look more often than every so many seconds: longer pauses do not count."""

    @property
    def complete(self) -> bool:
        """Whether all that was asked for is done."""
        return not self._asked

    @property
    def ready(self) -> list[int]:
        """The workers that are there."""
        return [number for number, worker in self._workers.items() if worker.ready]

    @property
    def uneven(self) -> bool:
        """Whether a shard would change workers if all were balanced now."""
        held = [shard for shard, number in self._owner.items() if number in self.ready]
        made = self._balanced(held, self.ready) if held else {}
        return any(made[shard] != self._owner[shard] for shard in held)

    def ask(
        self,
        now: float,
        jobs: Iterable[Job],
        *events: Event,
        balance: bool = True,
        ended: Collection[int] = (),
    ) -> list[Command]:
        """Take jobs on; what was asked for before and is not done is nobody's any more.

        Args:
          now: seconds, on any clock that only goes on.
          jobs: to be done once, each.
          events: what happened since.
          balance: whether a shard may leave a worker that is there.
          ended: variants whose programs workers let go of, before they do anything else.
        """
        self._look(now)
        for worker in self._workers.values():
            for call in worker.calls.values():
                call.wanted = call.job.kind in EARLY
        self._let_go(ended)
        self._waiting = list(jobs)
        self._asked = set(self._waiting)
        self._unbalanced = balance
        return self._after(events)

    def step(self, now: float, *events: Event) -> list[Command]:
        """Take note of what happened until now; return what to do, and what is done."""
        self._look(now)
        return self._after(events, judging=True)

    def _look(self, now: float) -> None:
        """Let time go on. While the driver did not look, nobody can have been heard."""
        if now > self._looked:  # the first time there is nothing before
            self._now += min(now - self._looked, self.longest_look)
        self._looked = now

    def _after(self, events: Sequence[Event], judging: bool = False) -> list[Command]:
        for event in events:
            self._take(event)
        if judging:  # at one instant, after all news is in
            self._judge()
        if self._fail is None:
            self._staff()
        if self._fail is None:
            self._place()
            self._get_ahead()
        made = [*self._out, *([self._fail] if self._fail else [])]
        self._out, self._fail = [], None
        return made

    # --- news -----------------------------------------------------------------------------------

    def _take(self, event: Event) -> None:
        if isinstance(event, Room):
            self._room = event.workers
            if event.workers != 0:
                self._no_room_since = None
            elif self._no_room_since is None:
                self._no_room_since = self._now
            return
        worker = self._workers.get(event.worker)
        if worker is None:
            return  # it was given up
        if isinstance(event, Gone):
            self._lose(event.worker, event.reason)
            return
        worker.heard[event.rank] = self._now
        if isinstance(event, Heard) or (call := worker.calls.get(event.call)) is None:
            return
        call.answers[event.rank] = event
        if call.troubled is None and not isinstance(event, Answered):
            call.troubled = self._now
        if len(call.answers) == self._limits.processes:
            self._settle(event.worker, event.call)

    def _settle(self, number: int, of: int) -> None:
        worker = self._workers[number]
        call = worker.calls.pop(of)
        worker.progress = self._now
        answers = [call.answers[rank] for rank in sorted(call.answers)]
        failed = [answer for answer in answers if isinstance(answer, Failed)]
        if not call.wanted:
            return
        if any(isinstance(answer.error, Superseded) for answer in failed):
            worker.calls = {of: call, **worker.calls}
            self._lose(number, "belongs to an earlier incarnation")
        elif failed:
            self._fail = self._fail or Fail(failed[0].error, number, call.job)
        elif any(isinstance(answer, Again) for answer in answers):
            self._waiting.append(call.job)
        else:
            values = [answer.value for answer in answers if isinstance(answer, Answered)]
            self._finish(number, call.job, tuple(values))

    def _finish(self, number: int, job: Job, values: tuple[Any, ...]) -> None:
        worker = self._workers[number]
        if job == START:
            worker.ready = True
            if self._gather_until is None:
                self._gather_until = self._now + max(10.0, 2 * (self._now - worker.since))
            worker.heard = dict.fromkeys(range(self._limits.processes), self._now)
        elif job.kind == "begin":
            worker.begun.add(job.variant)
        elif job.kind == "prepare":
            worker.begun.discard(job.variant)
            worker.variants.add(job.variant)
        for what in (job, IDLE):
            self._losses.pop(what, None)
        self._out.append(Done(number, job, values, job in self._asked))
        self._asked.discard(job)

    # --- losses ---------------------------------------------------------------------------------

    def _judge(self) -> None:
        by_age = sorted(self._workers, key=lambda number: not self._workers[number].ready)
        for index, number in enumerate(by_age):
            worker = self._workers[number]
            if not worker.ready and self._room is not None and index >= self._room:
                worker.since = worker.progress = self._now  # it waits for a node, and is not slow
            for of, call in list(worker.calls.items()):
                if call.troubled is not None and self._now - call.troubled > PATIENCE:
                    if any(isinstance(answer, Failed) for answer in call.answers.values()):
                        self._settle(number, of)
                    else:
                        self._lose(number, "is of several minds: its processes disagree")
                    break
            if number in self._workers and (reason := self._fault(worker)) is not None:
                self._lose(number, reason)

    def _fault(self, worker: _Worker) -> str | None:
        """Return why a worker must be given up, if it must."""
        limits, late = self._limits, self._now - worker.progress
        first = next(iter(worker.calls.values()), None)
        if first is not None:
            early = first.job.kind in EARLY
            # What is compiled side by side may take as long as one after the other.
            most = limits.start_deadline * max(1, len(worker.begun))
            limit = most if early else limits.deadline
            if limit is not None and late > limit:
                starts = first.job == START
                return f"did not {'start in' if starts else 'answer for'} {limit:g} s"
        silent = self._now - min(worker.heard.values(), default=self._now)
        if worker.ready and silent > limits.heartbeat:
            return f"was silent for {silent:.0f} s: a process of it is stopped, or hangs"
        return None

    def _lose(self, number: int, reason: str) -> None:
        """Give a worker up; its jobs and shards are for others."""
        worker = self._workers.pop(number)
        self._out.append(Kill(number, reason))
        calls = list(worker.calls.values())
        self._waiting += [c.job for c in calls if c.wanted and c.job in self._asked]
        # Calls are done in order: it was lost at the first of them.
        self._count(calls[0].job if calls else IDLE, number, reason)

    def _count(self, job: Job, number: int, reason: str) -> None:
        """Count a loss, and end if the same thing is lost again and again."""
        self._losses[job] += 1
        limits, count = self._limits, self._losses[job]
        if job == START and self._gather_until is None and reason.startswith("did not start"):
            error = NoWorker(f"no worker started in {limits.start_deadline:g} s")
            self._fail = self._fail or Fail(error, number, job)
        if count <= limits.most_losses or self._fail is not None:
            return
        self._fail = Fail(SweepError(_sentence(job, count, reason)), number, job)

    # --- workers --------------------------------------------------------------------------------

    def _staff(self) -> None:
        """Start the workers that are missing, as far as there is room."""
        wanted, room = self._limits.workers, self._room
        if room == 0 and not self.ready:
            since = self._now if self._no_room_since is None else self._no_room_since
            if self._now - since >= self._limits.wait:
                self._fail = Fail(NoWorker("there is no room for a worker"))
            return
        if self._limits.wait == 0 and room is not None:  # nothing will grow
            wanted = min(wanted, room)
        starting = [number for number, worker in self._workers.items() if not worker.ready]
        for number in starting[::-1][: max(0, len(self._workers) - wanted)]:
            del self._workers[number]
            self._out.append(Kill(number, "there is no room for it", lost=False))
        while len(self._workers) < wanted:
            number, call = self._number(), next(self._calls)
            self._workers[number] = _Worker(self._now, self._now, {}, calls={call: _Call(START)})
            self._out.append(Start(number, call))

    # --- jobs -----------------------------------------------------------------------------------

    def _place(self) -> None:
        """Send what can be sent."""
        ready = self.ready
        if not ready or not self._waiting:
            return
        holding = self._gathering(ready)
        if not holding:
            self._give([job.shard for job in self._waiting if job.kind != "prepare"], ready)
        self._compile(ready, holding)
        waiting, self._waiting = self._waiting, []
        for job in waiting:
            number = None if holding or job.kind == "prepare" else self._able(job)
            if number is None:
                self._waiting.append(job)
            else:
                self._send(number, job)

    def _compile(self, ready: list[int], holding: bool) -> None:
        """Have programs compiled: a variant a worker, or side by side where there are more."""
        waiting = [job for job in self._waiting if job.kind == "prepare"]
        begun = self._begun()
        fresh = [job for job in waiting if job.variant not in begun]
        idle = [number for number in ready if not self._workers[number].calls]
        for index, number in enumerate(idle):
            own = [job for job in waiting if job.variant in self._workers[number].begun]
            several = own or len(fresh) > len(idle) - index
            if fresh and several and self._limits.processes == 1 and not (own and holding):
                self._send(number, Job("begin", fresh.pop(0).variant))
            elif own or fresh:
                job = own[0] if own else fresh.pop(0)
                self._waiting.remove(job)
                self._send(number, job)

    def _let_go(self, ended: Collection[int]) -> None:
        """Have programs forgotten; should they be needed again, they are prepared again."""
        for number in self.ready:
            worker = self._workers[number]
            for variant in sorted((worker.variants | worker.traced) & set(ended)):
                for known in (worker.variants, worker.traced, worker.begun):
                    known.discard(variant)
                self._send(number, Job("forget", variant))

    def _begun(self) -> set[int]:
        """Return the variants that some worker compiles beside its calls, or is told to."""
        found = {variant for worker in self._workers.values() for variant in worker.begun}
        calls = [call for worker in self._workers.values() for call in worker.calls.values()]
        return found | {call.job.variant for call in calls if call.job.kind == "begin"}

    def _get_ahead(self) -> None:
        """Let idle workers trace what another compiles, and they will load."""
        calls = [call for worker in self._workers.values() for call in worker.calls.values()]
        compiled = self._begun() | {
            c.job.variant for c in calls if c.job.kind == "prepare" and c.job in self._asked
        }
        for number in self.ready:
            worker = self._workers[number]
            ahead = sorted(compiled - worker.traced)
            if ahead and not worker.calls:
                worker.traced.add(ahead[0])
                self._send(number, Job("trace", ahead[0]))

    def _gathering(self, ready: list[int]) -> bool:
        """Whether the first generation still waits for workers that are about to start."""
        assert self._gather_until is not None
        if len(ready) == len(self._workers):
            self._gather_until = -1.0  # later ones take shards over when a generation begins
        return self._now < self._gather_until

    def _able(self, job: Job) -> int | None:
        """Return the worker of a job's shard, if it has the programs; otherwise it gets them."""
        number = self._owner[job.shard]
        worker = self._workers[number]
        if job.variant in worker.variants:
            return number
        if not any(call.job.kind == "prepare" for call in worker.calls.values()):
            self._send(number, Job("prepare", job.variant))
        return None

    def _give(self, needed: list[int], ready: list[int]) -> None:
        """See that a ready worker owns each shard that a job needs, and say so before it is sent.

        When a generation begins, all shards are balanced: each stays where it was, if that is not
        too much for one worker. In between only those go elsewhere whose worker was lost.
        """
        if not needed:
            return
        shards = range(self._shards) if self._unbalanced else dict.fromkeys(needed)
        if self._unbalanced:
            owner = self._balanced(shards, ready)
        else:
            owner = balanced(self._owner, shards, ready, self._shards)
        changed = [(s, n) for s, n in owner.items() if self._owner.get(s) != n]
        self._unbalanced, self._owner = False, owner
        if changed:
            self._out.append(Own(tuple(changed)))

    def _balanced(self, shards: Iterable[int], ready: list[int]) -> dict[int, int]:
        return balanced(self._owner, shards, ready, -(-self._shards // len(ready)))

    def _send(self, number: int, job: Job) -> None:
        worker, call = self._workers[number], next(self._calls)
        if not worker.calls:
            worker.progress = self._now
        worker.calls[call] = _Call(job)
        if job.kind in ("begin", "prepare"):
            worker.traced.add(job.variant)
        self._out.append(Send(number, call, job))


def balanced(
    owner: Mapping[int, int], shards: Iterable[int], ready: Sequence[int], most: int
) -> dict[int, int]:
    """Return who owns what when these shards are given to workers that are there.

    A shard stays with a worker that has no more than `most`; others go where the fewest are.
    """
    made, load, moving = dict(owner), dict.fromkeys(ready, 0), list[int]()
    shards = list(shards)
    for shard in owner.keys() - set(shards):
        if owner[shard] in load:
            load[owner[shard]] += 1
    for shard in shards:
        mine = owner.get(shard, -1)
        if mine in load and load[mine] < most:
            load[mine] += 1
        else:
            moving.append(shard)
    for shard in moving:
        heir = made[shard] = min(ready, key=load.__getitem__)
        load[heir] += 1
    return made


def _sentence(job: Job, count: int, reason: str) -> str:
    """Say what was lost so often, and what may help."""
    where = {
        "start": "they started",
        "idle": "they were idle",
        "trace": "the step was traced",
        "begin": "the step was traced",
        "prepare": "the step was compiled or loaded",
        "forget": "programs were let go",
    }.get(job.kind, f"shard {job.shard} ran")
    hint = "A process that is killed for memory, or crashes, looks like this"
    if "did not" in reason:
        name = "start_deadline" if job.kind in EARLY else "deadline"
        hint = f"If it only needs longer, give {name}= more seconds"
    elif "silent" in reason:
        hint = "If its Python code keeps the interpreter for so long, give heartbeat= more seconds"
    return f"{count} workers in a row were lost while {where}; the last one {reason}. {hint}"
