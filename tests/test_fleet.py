"""The fleet alone: all that can happen to workers, without any; time is a number."""

import collections
import heapq
import itertools
import random

import pytest

from gradhpo.cluster.commands import (
    START,
    Again,
    Answered,
    Done,
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
from gradhpo.cluster.failures import Superseded
from gradhpo.cluster.fleet import Fleet, Limits, NoWorker
from tests.quick import slow_but

BEAT = 3.0
"""Seconds between two signs of life, of a heartbeat of 12."""


class World:
    """Workers of whom some die, stop, hang or are slow, by chance; and what must never happen."""

    def __init__(self, seed, **settings):
        self.rng = rng = random.Random(seed)
        self.processes = rng.choice([1, 1, 2, 3])
        self.deadline = rng.choice([None, 40.0])
        given = {"workers": rng.randint(1, 4), "start_deadline": 60.0, "most_losses": 10**6}
        limits = Limits(
            **{**given, "processes": self.processes, "deadline": self.deadline, "heartbeat": 12.0}
            | settings
        )
        self.shards, self.variants = rng.randint(1, 8), rng.randint(1, 4)
        self.fleet = Fleet(limits, self.shards, itertools.count(1).__next__)
        self.now, self.news, self.tie = 0.0, [], itertools.count()
        self.sick, self.mute = set(), set()  # workers in which something is wrong; silent processes
        self.there, self.owner, self.has = {}, {}, collections.defaultdict(set)
        self.free = collections.defaultdict(float)
        self.asked, self.got, self.failed = set(), {}, False
        self.sends = self.kills = self.forgets = 0
        self.ended = set()
        self.trouble = rng.choice([0.0, 0.05, 0.15])

    # --- what the fleet commands ----------------------------------------------------------------

    def carry_out(self, commands):
        for command in commands:
            getattr(self, type(command).__name__.lower())(command)

    def start(self, command):
        assert command.worker not in self.there
        self.there[command.worker] = command.call
        slow = self.rng.uniform(0, 20)
        self.perform(command.worker, command.call, START, slow)

    def own(self, command):
        for shard, worker in command.owners:
            assert worker in self.there
            self.owner[shard] = worker

    def send(self, command):
        worker, job = command.worker, command.job
        self.sends += 1
        assert worker in self.has, "told before it was there"
        if job.kind in ("trace", "begin"):
            assert job.variant not in self.has[worker], "told to get ahead with what it has"
        elif job.kind == "forget":
            assert job.variant in self.ended, "told to let go of what is needed"
            self.has[worker].discard(job.variant)
            self.forgets += 1
        elif job.kind != "prepare":
            assert self.owner[job.shard] == worker, "told before it owned the shard"
            assert job.variant in self.has[worker], "told before it had the programs"
            assert job in self.asked
        longest = 30.0 if self.deadline else 45.0  # slow is not dead
        slow = self.rng.choice([0.1, 1.0, self.rng.uniform(1, longest)])
        self.perform(worker, command.call, job, min(slow, 50.0) if job.kind == "prepare" else slow)

    def kill(self, command):
        assert command.worker in self.sick, f"a healthy worker was killed: {command}"
        del self.there[command.worker]
        self.kills += 1

    def done(self, command):
        assert len(command.values) == self.processes
        if command.job == START:
            self.has[command.worker] = set()
        elif command.job.kind == "prepare":
            self.has[command.worker].add(command.job.variant)
        if command.asked:
            assert command.job not in self.got
            self.got[command.job] = command.values[0]

    def fail(self, command):
        assert str(command.error) == "on purpose"
        self.failed = True

    # --- what happens ---------------------------------------------------------------------------

    def later(self, when, event):
        heapq.heappush(self.news, (when, next(self.tie), event))

    def perform(self, worker, call, job, seconds):
        """Each process does a job when it has done all before, if nothing happens to it."""
        chance = self.rng.random
        failing = job.kind == "run" and chance() < 0.02 * bool(self.trouble)
        gone = job.kind == "run" and not failing and chance() < self.trouble
        for rank in range(self.processes):
            key = worker, rank
            if key in self.mute or self.free[key] == float("inf"):
                continue
            self.free[key] = at = max(self.free[key], self.now) + seconds * (not gone)
            if chance() < self.trouble and self.has:  # that none starts at all is an error
                self.suffer(worker, rank, at - self.rng.uniform(0, seconds))
            elif failing:
                self.later(at, Failed(worker, call, rank, ValueError("on purpose")))
            elif gone:
                self.later(at, Again(worker, call, rank))
            else:
                self.later(at, Answered(worker, call, rank, (worker, job.shard)))

    def suffer(self, worker, rank, when):
        self.sick.add(worker)
        self.free[worker, rank] = float("inf")
        kinds = ["dies", "stops", *(["hangs"] if self.deadline else [])]
        if (kind := self.rng.choice(kinds)) == "dies":
            self.later(when + self.rng.uniform(0, 3), Gone(worker, "died"))
        elif kind == "stops" or worker not in self.has:
            self.mute.add((worker, rank))  # not before it began this: that is sooner than it was

    def beats(self):
        ranks = itertools.product(list(self.has), range(self.processes))
        return [Heard(*key) for key in ranks if key not in self.mute and key[0] in self.there]

    def wait(self):
        """Let time go on, and tell the fleet; now and then the driver is elsewhere for long."""
        away = self.rng.random() < 0.01
        self.now += self.rng.uniform(20, 300) if away else BEAT
        events = self.beats()
        while self.news and self.news[0][0] <= self.now:
            events.append(heapq.heappop(self.news)[2])
        self.carry_out(self.fleet.step(self.now, *events))

    def generation(self, kind):
        variants = {shard: shard % self.variants for shard in range(self.shards)}
        jobs = [Job("run", v, shard) for shard, v in variants.items()]
        if kind == "prepare":
            jobs = [Job("prepare", variant) for variant in range(self.variants)]
        elif kind == "export":
            pairs = [self.rng.choices(range(self.shards), k=2) for _ in range(self.shards)]
            jobs = list({Job("export", variants[a], a, b) for a, b in pairs})
        while True:
            self.asked, self.got, self.failed = set(jobs), {}, False
            self.ended = set() if kind == "prepare" else set(range(self.variants))
            self.ended -= set(variants.values())
            self.carry_out(self.fleet.ask(self.now, jobs, ended=self.ended))
            for _ in range(20_000):
                if self.fleet.complete or self.failed:
                    break
                self.wait()
            if not self.failed:
                break
        assert set(self.got) == self.asked, "a job was lost"
        for job, (worker, shard) in self.got.items():
            assert shard == job.shard
            assert job.kind == "prepare" or worker in self.has


@pytest.mark.parametrize("seeds", slow_but([range(200), range(200, 1200)], range(200)), ids=len)
def test_no_history_loses_a_job_or_a_healthy_worker(seeds):
    sends = kills = forgets = 0
    for seed in seeds:
        world = World(seed)
        for kind in ("prepare", "run", "export", "run"):
            world.generation(kind)
        sends += world.sends
        kills += world.kills
        forgets += world.forgets
    assert sends > 15 * len(seeds)
    assert kills > 1.5 * len(seeds)
    assert forgets > len(seeds) / 10


# --- one thing at a time ------------------------------------------------------------------------


class Small:
    """A fleet whose workers are there and have the programs; each step is a second."""

    def __init__(self, workers=2, shards=None, **limits):
        self.now = 0
        self.shards = shards or workers
        self.fleet = Fleet(Limits(workers, **limits), self.shards, itertools.count(1).__next__)
        self.processes = limits.get("processes", 1)
        begun = self.ask(Job("prepare", 0))
        starts = [c for c in begun if isinstance(c, Start)]
        out = self.step(*(Answered(c.worker, c.call, r) for c in starts for r in self.ranks))
        self.answer(*out)
        assert self.fleet.complete

    @property
    def ranks(self):
        return range(self.processes)

    def ask(self, *jobs):
        return self.fleet.ask(self.now, jobs)

    def step(self, *events, seconds=1):
        """Tell what happened, and let seconds pass in which everybody is heard but the silent."""
        self.now += 1
        out = self.fleet.step(self.now, *events)
        for _ in range(seconds - 1):
            self.now += 1
            out += self.fleet.step(self.now, *events)
        return out

    def answer(self, *commands, ranks=None):
        sent = [c for c in commands if isinstance(c, Send)]
        ranks = self.ranks if ranks is None else ranks
        return self.step(*(Answered(c.worker, c.call, r, c.job.shard) for c in sent for r in ranks))

    def run(self):
        """Ask for a generation; return what is sent for it, all programs loaded."""
        out = self.ask(*(Job("run", 0, shard) for shard in range(self.shards)))
        loads = [c for c in out if isinstance(c, Send) and c.job.kind == "prepare"]
        out += self.answer(*loads)
        return [c for c in out if isinstance(c, Send) and c.job.kind == "run"]


def only(kind, commands):
    return [command for command in commands if isinstance(command, kind)]


def heard(*keys):
    return [Heard(worker, rank) for worker, rank in keys]


def test_a_gang_that_half_answers_costs_itself_alone():
    """The others had finished, and were killed as late with it."""
    small = Small(3, processes=2, deadline=60.0)
    runs = small.run()
    everybody = heard(*itertools.product((1, 2, 3), (0, 1)))
    small.answer(runs[0], ranks=[0])  # its second process hangs
    small.answer(*runs[1:])
    out = small.step(*everybody, seconds=70)
    (kill,) = only(Kill, out)
    assert (kill.worker, kill.reason) == (runs[0].worker, "did not answer for 60 s")
    again = only(Send, out)
    assert [c.job for c in again] == [runs[0].job]
    small.answer(*again)
    assert small.fleet.complete


def test_without_a_deadline_a_worker_may_be_as_slow_as_it_likes():
    small = Small(2)
    runs = small.run()
    assert not small.step(*heard((1, 0), (2, 0)), seconds=20_000)
    small.answer(*runs)
    assert small.fleet.complete


def test_one_silent_process_of_a_gang_is_enough():
    small = Small(2, processes=2, heartbeat=30.0)
    small.run()
    out = small.step(*heard((1, 0), (2, 0), (2, 1)), seconds=40)
    (kill,) = only(Kill, out)
    assert kill.worker == 1
    assert "silent for 3" in kill.reason


def test_a_driver_that_did_not_look_blames_nobody():
    """A callback of an hour, or a laptop that slept."""
    small = Small(2, heartbeat=30.0, deadline=100.0)
    runs = small.run()
    small.now += 3600
    assert not small.step()
    assert only(Done, small.answer(*runs))


def test_owned_before_it_is_sent():
    small = Small(1, shards=3)
    out = small.ask(*(Job("run", 0, shard) for shard in range(3)))
    kinds = [type(command) for command in out]
    assert kinds == [Own, Send, Send, Send]


def test_shards_stay_where_they_are_and_new_workers_get_their_part():
    small = Small(2, shards=4)
    runs = small.run()
    first = {c.job.shard: c.worker for c in runs}
    small.answer(*runs)
    out = small.step(Gone(1, "died"))
    assert not only(Own, out)  # it had nothing to do
    second = small.run()
    assert {c.worker for c in second} == {2}
    small.answer(*second)
    (start,) = only(Start, out)
    small.step(Answered(start.worker, start.call))
    third = {c.job.shard: c.worker for c in small.run()}
    assert sorted(collections.Counter(third.values()).values()) == [2, 2]
    stayed = [shard for shard in first if first[shard] == 2]
    assert sum(third[shard] == 2 for shard in stayed) >= 1


def test_a_failure_that_follows_from_a_death_is_a_death():
    small = Small(1, processes=2)
    (run,) = small.run()
    assert not small.step(Failed(1, run.call, 0, ValueError("a collective failed")))
    out = small.step(Gone(1, "died"))
    assert only(Kill, out)
    assert not only(Fail, out)


def test_a_failure_is_told_though_another_process_says_nothing():
    small = Small(1, processes=2)
    (run,) = small.run()
    small.step(Failed(1, run.call, 1, ValueError("on purpose")))
    (fail,) = only(Fail, small.step(*heard((1, 0), (1, 1)), seconds=15))
    assert (str(fail.error), fail.job) == ("on purpose", run.job)


def test_processes_that_disagree_on_lost_rows_are_replaced_together():
    small = Small(1, processes=2)
    (run,) = small.run()
    small.step(Again(1, run.call, 1))
    (kill,) = only(Kill, small.step(*heard((1, 0), (1, 1)), seconds=15))
    assert "disagree" in kill.reason


def test_lost_rows_cost_no_worker():
    small = Small(1)
    (run,) = small.run()
    (again,) = small.step(Again(1, run.call))
    assert (again.worker, again.job) == (1, run.job)
    assert again.call != run.call


def test_a_superseded_worker_is_replaced_unless_nobody_waits_for_it():
    small = Small(2)
    runs = small.run()
    small.step(Failed(1, runs[0].call, 0, ValueError("damaged")))
    second = small.run()  # the generation before, say; the other worker still does the first
    assert not small.step(Failed(2, runs[1].call, 0, Superseded("by nobody's call")))
    out = small.step(Failed(2, second[1].call, 0, Superseded("it is")))
    assert [(k.worker, k.reason) for k in only(Kill, out)] == [
        (2, "belongs to an earlier incarnation")
    ]


def test_a_failure_hides_no_other_news():
    """A death in the same instant: its worker is killed and replaced all the same."""
    small = Small(2)
    runs = small.run()
    out = small.step(Failed(1, runs[0].call, 0, ValueError("damaged")), Gone(2, "died"))
    assert [type(command) for command in out] == [Kill, Fail]
    assert len(only(Start, small.ask(Job("run", 0, 0)))) == 1


@pytest.mark.parametrize("kind", ["run", "start", "prepare"])
def test_what_is_lost_again_and_again_ends_the_sweep(kind):
    fleet = Fleet(Limits(1, most_losses=3), 1, itertools.count(1).__next__)
    job = Job("prepare", 0) if kind == "prepare" else Job("run", 0, 0)
    out, now, fails = fleet.ask(0, [job]), 0, []
    for lost in range(1, 5):
        while not fails:
            now += 1
            (command,) = [c for c in out if isinstance(c, Start | Send)] or [None]
            what = command.job.kind if isinstance(command, Send) else "start"
            if what == kind:
                break
            out = fleet.step(now, Answered(command.worker, command.call))
        out = fleet.step(now, Gone(lost, "died"))
        fails = only(Fail, out)
        assert bool(fails) == (lost == 4)
    assert "4 workers in a row were lost" in str(fails[0].error)


def test_losses_in_a_row_are_forgiven_by_a_success():
    small = Small(1, most_losses=1)
    for _ in range(5):
        (run,) = small.run()
        (start,) = only(Start, small.step(Gone(run.worker, "died")))
        (load,) = only(Send, small.step(Answered(start.worker, start.call)))
        (again,) = only(Send, small.answer(load))
        small.answer(again)
        assert small.fleet.complete


# --- room ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("wait", [0, 30])
def test_the_loss_of_all_nodes_ends_within_wait(wait):
    small = Small(2, wait=wait)
    small.run()
    out = small.step(Gone(1, "died"), Gone(2, "died"), Room(0))
    if wait:
        assert not only(Fail, out)
        assert not only(Start, out)
        out = small.step(Room(0), seconds=31)
    (fail, *_) = only(Fail, out)
    assert isinstance(fail.error, NoWorker)
    assert "no room" in str(fail.error)


def test_nodes_that_come_back_within_wait_go_on():
    small = Small(1, wait=30)
    small.run()
    small.step(Gone(1, "died"), Room(0), seconds=20)
    (start,) = only(Start, small.step(Room(1)))
    assert start.worker == 2


def test_no_more_are_started_than_there_is_room_for():
    fleet = Fleet(Limits(8), 8, itertools.count(1).__next__)
    assert len(only(Start, fleet.ask(0, [Job("prepare", 0)], Room(3)))) == 3
    # A node went: what waits for it is not lost, it is not wanted.
    kills = only(Kill, fleet.step(1, Room(2)))
    assert [(kill.worker, kill.lost) for kill in kills] == [(3, False)]


def test_who_waits_for_a_node_is_not_late():
    """With an autoscaler that gives one node of two: the other worker is no loss."""
    fleet = Fleet(Limits(2, wait=10_000, start_deadline=60.0), 2, itertools.count(1).__next__)
    starts = only(Start, fleet.ask(0, [Job("prepare", 0)], Room(1)))
    assert len(starts) == 2
    (send,) = only(Send, fleet.step(1, Answered(1, starts[0].call)))
    fleet.step(1, Answered(1, send.call))
    for second in range(2, 2000):
        out = fleet.step(second, Heard(1))
        assert not only(Kill, out)


def test_a_fleet_that_never_starts_says_so():
    fleet = Fleet(Limits(2, start_deadline=60.0), 2, itertools.count(1).__next__)
    fleet.ask(0, [Job("prepare", 0)])
    out = [command for second in range(1, 70) for command in fleet.step(second)]
    (fail, *_) = only(Fail, out)
    assert "no worker started in 60 s" in str(fail.error)


def test_the_first_generation_waits_a_little_for_all_workers():
    fleet = Fleet(Limits(2), 2, itertools.count(1).__next__)
    starts = only(Start, fleet.ask(0, [Job("prepare", 0)]))
    out = fleet.step(3, Answered(1, starts[0].call))  # it compiles meanwhile
    (send,) = only(Send, out)
    fleet.step(4, Answered(1, send.call))
    assert not only(Send, fleet.ask(4, [Job("run", 0, 0), Job("run", 0, 1)]))
    out = fleet.step(5, Answered(2, starts[1].call))
    assert {c.worker for c in only(Send, out)} == {1, 2}


def test_idle_workers_trace_what_another_one_compiles():
    fleet = Fleet(Limits(3), 3, itertools.count(1).__next__)
    starts = only(Start, fleet.ask(0, [Job("prepare", 0)]))
    out = fleet.step(1, *(Answered(c.worker, c.call) for c in starts[:2]))
    assert {c.worker: c.job.kind for c in only(Send, out)} == {1: "prepare", 2: "trace"}
    compiling, tracing = only(Send, out)
    assert not fleet.step(2)  # once
    out = fleet.step(3, Answered(2, tracing.call), Answered(3, starts[2].call))
    assert [(c.worker, c.job.kind) for c in only(Send, out)] == [(3, "trace")]
    fleet.step(4, Answered(1, compiling.call))
    out = fleet.ask(5, [Job("run", 0, shard) for shard in range(3)])
    assert {(c.worker, c.job.kind) for c in only(Send, out)} == {
        (1, "run"), (2, "prepare"), (3, "prepare"),
    }  # fmt: skip


# --- several programs -----------------------------------------------------------------------------


def compiling(fleet, events, variants, now=1):
    """Return what one worker or several are sent, in order, when each answers at once."""
    out, sent = fleet.step(now, *events), []
    while jobs := only(Send, out):
        sent += [(c.worker, c.job.kind, c.job.variant) for c in jobs]
        now += 1
        out = fleet.step(now, *(Answered(c.worker, c.call) for c in jobs))
    assert fleet.complete
    assert {v for _, kind, v in sent if kind == "prepare"} == set(range(variants))
    return sent


def test_one_worker_begins_all_programs_before_it_waits_for_any():
    fleet = Fleet(Limits(1), 3, itertools.count(1).__next__)
    (start,) = only(Start, fleet.ask(0, [Job("prepare", variant) for variant in range(3)]))
    sent = compiling(fleet, [Answered(start.worker, start.call)], 3)
    expected = [(kind, variant) for kind in ("begin", "prepare") for variant in range(3)]
    assert [(kind, variant) for _, kind, variant in sent] == expected


def test_a_program_is_compiled_by_one_worker_and_traced_by_the_others():
    fleet = Fleet(Limits(2), 4, itertools.count(1).__next__)
    starts = only(Start, fleet.ask(0, [Job("prepare", variant) for variant in range(4)]))
    sent = compiling(fleet, [Answered(c.worker, c.call) for c in starts], 4)
    made = {variant: worker for worker, kind, variant in sent if kind == "prepare"}
    begun = {variant: worker for worker, kind, variant in sent if kind == "begin"}
    assert sorted(collections.Counter(made.values()).values()) == [2, 2]
    assert begun.items() <= made.items(), "who began waits"
    assert len([kind for _, kind, _ in sent if kind != "trace"]) == 4 + len(begun)


def test_as_many_workers_as_programs_compile_one_each():
    fleet = Fleet(Limits(2), 2, itertools.count(1).__next__)
    starts = only(Start, fleet.ask(0, [Job("prepare", variant) for variant in range(2)]))
    sent = compiling(fleet, [Answered(c.worker, c.call) for c in starts], 2)
    assert [kind for _, kind, _ in sent][:2] == ["prepare", "prepare"]


def test_a_gang_compiles_one_after_the_other():
    fleet = Fleet(Limits(1, processes=2), 2, itertools.count(1).__next__)
    (start,) = only(Start, fleet.ask(0, [Job("prepare", variant) for variant in range(2)]))
    out = fleet.step(1, *(Answered(1, start.call, rank) for rank in range(2)))
    assert [c.job for c in only(Send, out)] == [Job("prepare", 0)]


def test_what_a_lost_worker_had_begun_is_begun_again():
    fleet = Fleet(Limits(1), 2, itertools.count(1).__next__)
    (start,) = only(Start, fleet.ask(0, [Job("prepare", variant) for variant in range(2)]))
    (first,) = only(Send, fleet.step(1, Answered(1, start.call)))
    (second,) = only(Send, fleet.step(2, Answered(1, first.call)))
    assert (first.job, second.job) == (Job("begin", 0), Job("begin", 1))
    (start,) = only(Start, fleet.step(3, Gone(1, "died")))
    compiling(fleet, [Answered(start.worker, start.call)], 2, now=4)


def test_what_compiles_side_by_side_has_the_time_of_all():
    fleet = Fleet(Limits(1, start_deadline=60.0), 2, itertools.count(1).__next__)
    (start,) = only(Start, fleet.ask(0, [Job("prepare", variant) for variant in range(2)]))
    out = fleet.step(1, Answered(1, start.call))
    for now in (2, 3):
        out = fleet.step(now, *(Answered(1, c.call) for c in only(Send, out)))
    assert [c.job.kind for c in only(Send, out)] == ["prepare"]
    later = [c for now in range(4, 110) for c in fleet.step(now, Heard(1))]
    assert not only(Kill, later)
    later = [c for now in range(110, 140) for c in fleet.step(now, Heard(1))]
    assert [c.reason for c in only(Kill, later)] == ["did not answer for 120 s"]
