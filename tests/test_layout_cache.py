"""What `batching="auto"` chooses from, how it finds out, and that it remembers."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
import pytest

import gradhpo
from gradhpo.cluster import SearchSpace, loguniform
from gradhpo.cluster.shard import ShardHost
from gradhpo.parallel import Population, batching, compiled, layout_cache, population, working_set
from tests import wide_problems
from tests.sweeps import sweep

SLOTS = 8


def loss(w, lam, batch):
    return jnp.sum((w - lam) ** 2)


PROBLEM = gradhpo.Problem(
    lambda key: (jnp.zeros(3), jnp.zeros(3)), loss, loss, batch=lambda key: (None, None)
)
OPTIMIZER = gradhpo.FOOptimizer(optax.sgd(0.1), optax.sgd(0.1))


def resolved():
    """The layout of a population in what is, to it, another process; and what that compiled."""
    population._FASTEST.clear()
    compiled.clear()
    before = compiled.counts()
    trials = Population(PROBLEM, OPTIMIZER, SLOTS)
    return trials.resolve(), compiled.counts().since(before).compiles


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A folder for the cache, for this test."""
    monkeypatch.setenv("GRADHPO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def measured(monkeypatch):
    """Measure, as on a GPU, and no longer than it takes to call each program once a round."""
    monkeypatch.setattr(batching, "MODELLED", ())
    monkeypatch.setattr(batching, "ROUND_SECONDS", 0)


@pytest.mark.slow
def test_a_layout_is_remembered_and_a_damaged_entry_ignored(cache, measured):
    first, compiles = resolved()
    assert compiles > 2  # two layouts, and the first state to measure on
    assert resolved() == (first, 0)
    (entry,) = cache.rglob("*.json")
    entry.write_bytes(b'{"batching": "no such"}')
    assert resolved()[1] > 2
    entry.write_text('{"batching": "4"}')  # whatever it says is taken, where it is a candidate
    assert resolved() == (4, 0)


@pytest.mark.parametrize("damage", [b"", b"{", b'{"batching": 3}', b"[]", b"\xff"])
def test_what_is_no_entry_says_nothing(cache, damage):
    key = compiled.lower(lambda x: x, jnp.zeros(2)).key
    layout_cache.remember(key, "shard/16")
    assert layout_cache.recall(key) == "shard/16"
    (entry,) = cache.rglob("*.json")
    entry.write_bytes(damage)
    assert layout_cache.recall(key) is None


def test_where_the_cache_lies(monkeypatch, tmp_path):
    monkeypatch.setenv("GRADHPO_CACHE", "off")
    assert layout_cache.folder() is None
    monkeypatch.delenv("GRADHPO_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert layout_cache.folder() == tmp_path / "gradhpo"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert layout_cache.folder() == tmp_path / ".cache/gradhpo"


def test_a_cache_that_cannot_be_written_costs_nothing(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GRADHPO_CACHE", str(tmp_path / "file"))
    key = compiled.lower(lambda x: x, jnp.zeros(2)).key
    layout_cache.remember(key, "map")
    assert layout_cache.recall(key) is None


@pytest.mark.parametrize(
    ("slots", "slot_bytes", "expected"),
    [
        (8, 5e3, "vmap"),
        (64, 1.2e5, "vmap"),
        (512, 1.2e5, 64),
        (64, 1.1e6, 4),
        (512, 2.2e4, "vmap"),
        (8, 1e9, "map"),
    ],
)
def test_a_cpu_takes_as_many_slots_at_once_as_are_at_hand(slots, slot_bytes, expected):
    found = batching.candidates(slots, None)
    assert batching.likeliest(found, slots, slot_bytes).within == expected


def test_where_a_model_chooses_nothing_is_compiled():
    trials = Population(wide_problems.problem(), wide_problems.optimizer(), SLOTS)
    before = compiled.counts()
    assert trials.resolve() in ("map", 4, "vmap")
    assert compiled.counts() == before


def test_what_would_have_to_be_measured_stays_open(measured):
    trials = Population(wide_problems.problem(), wide_problems.optimizer(), SLOTS)
    before = compiled.counts()
    assert trials.resolve(measure=False) == "auto"
    assert compiled.counts() == before


def test_a_step_works_on_its_state_and_its_largest_array():
    state = jnp.zeros((3, 10))
    program = jax.make_jaxpr(jax.vmap(lambda w: (w, jnp.outer(w, w).sum())))(state)
    assert working_set.slot_bytes(program, state, 3, 3) == 40 + 400


@pytest.mark.slow
def test_a_worker_that_traced_and_then_compiles_tells_what_is_unreached(tmp_path):
    """The one that compiled died meanwhile."""
    made = wide_problems.problem()

    def init(key):
        weights, lam = made.init(key)
        return weights, {**lam, "unused": jnp.float32(0)}

    space = SearchSpace({"log_decay": loguniform(1e-4, 1, stored="log")})
    problem, optimizer = dataclasses.replace(made, init=init), wide_problems.optimizer()
    host = ShardHost(sweep(tmp_path, space=space, problem=problem, optimizer=optimizer)._spec())
    host.trace(0, "map")
    (told,) = host.prepare(0, "map").unreached
    assert "unused" in told
