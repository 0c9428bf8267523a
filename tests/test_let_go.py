"""What a race has ended leaves the memory of its workers, and can come back."""

import gc
import itertools
import weakref

import jax.numpy as jnp
import numpy as np

from gradhpo.checkpoints import DamagedFile
from gradhpo.cluster import events, executors, shard
from gradhpo.cluster.commands import Answered, Job, Send, Start
from gradhpo.cluster.fleet import Fleet, Limits
from gradhpo.cluster.journal import Journal
from gradhpo.parallel import compiled
from tests import raced_operations
from tests.sweeps import assert_same_tables, sweep


def sent(commands):
    """What a worker is told, in its order."""
    return [
        (one.worker, one.job.kind, one.job.variant) for one in commands if isinstance(one, Send)
    ]


def test_a_fleet_lets_programs_go_and_has_them_prepared_again_when_the_sweep_goes_back():
    fleet = Fleet(Limits(1), 2, itertools.count(1).__next__)
    (start,) = [one for one in fleet.ask(0, [Job("prepare", 0)]) if isinstance(one, Start)]

    def answered(commands):
        return [Answered(one.worker, one.call) for one in commands if isinstance(one, Send)]

    def done(commands):
        while not fleet.complete:
            commands = fleet.step(0, *answered(commands))

    done(fleet.step(0, Answered(1, start.call)))
    done(fleet.ask(0, [Job("prepare", 1)]))
    runs = [Job("run", 0, 0), Job("run", 0, 1)]
    told = fleet.ask(0, runs, ended=[1])
    assert sent(told) == [(1, "forget", 1), (1, "run", 0), (1, "run", 0)]
    done(told)
    told = fleet.ask(0, runs, ended=[1])
    assert sent(told) == [(1, "run", 0), (1, "run", 0)], "once"
    done(told)
    told = fleet.ask(0, [Job("run", 0, 0), Job("run", 1, 1)])
    assert sent(told) == [(1, "run", 0), (1, "prepare", 1)]
    done(told)


def test_a_race_leaves_the_programs_of_one_combination(tmp_path, monkeypatch):
    held, run = [], shard.ShardHost.run

    def counted(host, order, *args):
        if order.shard == 0:  # of six, the first of a generation
            held.append((order.generation, sorted(host._variants)))
        return run(host, order, *args)

    monkeypatch.setattr(shard, "Variant", raced_operations.Variant)
    monkeypatch.setattr(shard.ShardHost, "run", counted)
    about = {"space": raced_operations.SPACE, "population": 6, "shards": 6, "generations": 5}
    result = sweep(tmp_path, **about).run()
    # Of those that end after the first and the second generation the last states are needed once.
    assert held == [(0, [0, 1, 2]), (1, [0, 1, 2]), (2, [0, 1]), (3, [0]), (4, [0])]
    assert [one.generation for one in result.ended] == [0, 1]


def test_a_sweep_that_goes_back_before_a_race_prepares_again_what_it_had_let_go(
    tmp_path, monkeypatch
):
    """After the third generation its checkpoints are gone, and there are none of before."""
    about = {"space": raced_operations.SPACE, "population": 6, "shards": 6, "generations": 5}
    monkeypatch.setattr(shard, "Variant", raced_operations.Variant)
    whole = sweep(tmp_path / "a", **about).run()
    run, struck = shard.ShardHost.run, []

    def strike(host, order, *args):
        if order.generation == 2:  # the journal names the second generation before the fourth
            host._writer.wait(order.shard)
        if order.generation == 3 and not struck:
            struck.append(sorted(host._variants))
            (first,) = Journal(tmp_path / "b").durable
            raise DamagedFile(first["checkpoints"][0].file, "was lost on purpose")
        return run(host, order, *args)

    monkeypatch.setattr(shard.ShardHost, "run", strike)
    made = sweep(tmp_path / "b", **about, checkpoint_every=2)
    result = made.run()
    assert struck == [[0]], "the race was over"
    prepared = [event.variant for event in made.events if isinstance(event, events.Prepared)]
    assert sorted(prepared) == [0, 1, 1, 2, 2]
    assert_same_tables(result, whole)
    assert result.ended == whole.ended


def test_a_state_of_an_ended_combination_goes_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr(shard, "Variant", raced_operations.Variant)
    spec = sweep(tmp_path, space=raced_operations.SPACE, population=6, shards=3)._spec()
    host = shard.ShardHost(spec)
    for variant in range(3):
        host.prepare(variant, "map")
        host._hold(variant, shard.Held(0, variant, None, host._variants[variant].zeros()))
        host.spec = host.spec.__class__(**{**vars(host.spec), "states": 3})
    host.forget(1)
    host.forget(1)
    assert sorted(host._variants) == sorted(host._states) == [0, 2]
    host.prepare(1, "map")
    assert sorted(host._variants) == [0, 1, 2]
    host.close()


def test_a_program_that_is_let_go_is_freed_and_compiled_anew():
    def step(x):
        return 3 * x + 7

    made = compiled.compile(step, np.arange(3.0))
    known = weakref.ref(made)
    assert compiled.compile(step, np.arange(3.0)) is made
    compiled.forget([made])
    before = compiled.counts()
    again = compiled.compile(step, np.arange(3.0))
    assert again is not made
    assert compiled.counts().since(before).hits == 0
    np.testing.assert_array_equal(again.run(step, jnp.arange(3.0)), [7, 10, 13])
    del made
    gc.collect()
    assert known() is None


def test_what_others_would_load_of_it_goes_too(tmp_path):
    made = sweep(tmp_path, space=raced_operations.SPACE, population=6, shards=3)
    about = (made._spec(), None, 3, made.place.for_processes(3), lambda event: None)
    executor = executors.open_executor("local", *about)
    executor._blobs = dict.fromkeys(range(3), b"program")

    class Order:
        def __init__(self, variant, before=None):
            self.variant, self.before = variant, before

    assert executor._ended([Order(0), Order(0, before=1)]) == {2}
    assert sorted(executor._blobs) == [0, 1]
    executor.close()
