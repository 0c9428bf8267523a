"""Settings of JAX that change how it works, and must not change what comes out."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental.compilation_cache import compilation_cache

import gradhpo
from gradhpo.parallel import Population, compilations, compiled, make_mesh
from tests.problems import assert_same_bits
from tests.small import (
    BATCH,
    OPTIMIZERS,
    REFERENCES,
    build,
    run_arguments,
    start,
    train_loss,
    val_loss,
)
from tests.sweeps import assert_same_tables, sweep

KEY = jax.random.key(0)
KEYS = jax.random.split(KEY, 2)
ZERO = jnp.zeros(2)
METHODS = [*OPTIMIZERS, *REFERENCES]


def noisy(key):
    """Another training batch at each step."""
    return (BATCH[0] + jax.random.normal(key, BATCH[0].shape), BATCH[1]), BATCH


PROBLEM = gradhpo.Problem(
    start, train_loss, val_loss, batch=noisy, metrics=lambda w, lam: {"first": w[0]}
)


def built(name):
    """Return a method with short episodes, and the `lr_hyper` of its step, a tuple of 0 or 1."""
    return build(name, **({"T": 2} if name in ("t1t2", "hyperdistill") else {}))


def everything(name, batching):
    """Return what a method gives in `solve`; HyperDistill, which calibrates, in `run` and in a
    population too."""
    optimizer, rate = built(name)
    losses, lr_hyper = (train_loss, val_loss), {"lr_hyper": rate[0]} if rate else {}
    solution = gradhpo.solve(PROBLEM, optimizer, 3, KEY, episode_length=2, **lr_hyper)
    if name != "hyperdistill":
        return solution
    trials = Population(PROBLEM, optimizer, 2, batching=batching)
    first = optimizer.init(*start(KEY))
    length, draw = run_arguments(name, 2), (lambda: BATCH, lambda: BATCH)
    run = optimizer.run(first, 1, *length, *draw, *losses, **lr_hyper)
    state = trials.select(trials.calibrate(trials.init(KEY), KEYS), [1, 0])
    return solution, run, trials.run(state, 1, KEYS, *rate)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.slow
def test_nan_checks_change_nothing(name):
    with jax.debug_nans(True):
        checked = everything(name, "vmap")
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(checked))
    if name == "hyperdistill":
        assert_same_bits(checked, everything(name, "vmap"))


# First-Order is a part of One-Step, and Greedy unrolls as "unrolled" does.
@pytest.mark.parametrize("name", [n for n in METHODS if n not in ("first-order", "unrolled")])
@pytest.mark.slow
def test_running_in_python_changes_nothing_but_rounding(name):
    expected = everything(name, "map")
    with jax.disable_jit():
        found = everything(name, "map")
    found, expected = jax.tree.map(np.asarray, (found, expected))
    chex.assert_trees_all_equal_dtypes(found, expected)
    chex.assert_trees_all_close(found, expected, rtol=2e-3, atol=1e-5)


def overflowing(w, lam, batch):
    """Infinite and without a NaN from the second step on, where the rate is large."""
    return jnp.where(jnp.abs(w[0]) > 1e3, jnp.inf, jnp.sum(w * lam["l"]))


def not_a_number(w, lam, batch):
    """The root of a negative number in the same place."""
    return jnp.sum(w * lam["l"]) + jnp.sqrt(1e3 - jnp.abs(w[0]))


def linear(w, lam, batch):
    return jnp.sum(w * lam["l"]) * batch[0][0, 0]


def plain(loss):
    return gradhpo.Problem(start, loss, loss, batch=lambda key: (BATCH, BATCH))


def slots_of(loss):
    return Population(plain(loss), gradhpo.FOOptimizer(optax.sgd(1.0)), 2, batching="vmap")


def test_a_slot_that_overflows_is_no_nan_to_the_program():
    trials = slots_of(overflowing)
    state = trials.init(KEY, hyperparams={"l": jnp.array([[1.0] * 3, [1e6] * 3]), "decay": ZERO})
    with jax.debug_nans(True):
        state, rows = trials.run(state, 3, KEYS, 0.0)
    assert state.metadata["diverged_at"].tolist() == [0, 1]
    for row in rows.values():
        assert np.isfinite(row[:, 0]).all()
        assert np.isnan(row[:, 1]).all()


def test_a_nan_in_a_slot_is_an_error_with_the_checks_on():
    trials = slots_of(not_a_number)
    state = trials.init(KEY, hyperparams={"l": jnp.array([[1.0] * 3, [1e6] * 3]), "decay": ZERO})
    with jax.debug_nans(True), pytest.raises(FloatingPointError, match="nan"):
        trials.run(state, 3, KEYS, 0.0)


@pytest.mark.slow
def test_a_sweep_does_not_change(tmp_path):
    changes = {"population": 2, "shards": 2, "generations": 2, "steps_per_generation": 1}
    expected = sweep(tmp_path / "plain", **changes).run()
    for switch in (jax.disable_jit, jax.debug_nans):
        with switch(True):
            found = sweep(tmp_path / switch.__name__, **changes).run()
        for name, column in expected.table.items():
            np.testing.assert_allclose(found.table[name], column, rtol=1e-4, err_msg=name)


@pytest.mark.slow
def test_a_divided_population_runs_in_python():
    mesh = make_mesh(trial=2, data=1, devices=jax.devices()[:2])
    trials = Population(plain(linear), gradhpo.FOOptimizer(optax.sgd(1.0)), 2, mesh, "shard/map")
    expected = trials.run(trials.init(KEY), 1, KEYS, 0.05)
    with jax.disable_jit():
        found = trials.run(trials.init(KEY), 1, KEYS, 0.05)
    chex.assert_trees_all_close(found, expected, rtol=2e-3, atol=1e-5)


# --- JAX's persistent compilation cache ---------------------------------------------------------


@pytest.fixture
def cache(tmp_path):
    """Keep every program in a folder that JAX looks in before it compiles."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path / "cache"),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    forget()
    yield tmp_path / "cache"
    for name, value in before.items():
        jax.config.update(name, value)
    forget()


def forget():
    """Be a process that has just started, as far as programs go."""
    compilation_cache.reset_cache()
    jax.clear_caches()
    compiled.clear()


def sorting():
    """A small population whose loss sorts."""

    def loss(w, lam, batch):
        return jnp.sum((jnp.sort(w) - batch) ** 2) + jnp.sum(lam**2)

    problem = gradhpo.Problem(
        lambda key: (jax.random.normal(key, (4,)), jnp.ones(2)),
        loss,
        loss,
        batch=lambda key: (jnp.arange(4.0), jnp.arange(4.0)),
    )
    return Population(problem, gradhpo.FOOptimizer(optax.sgd(0.1)), 2, batching="vmap")


def made(before):
    """Return what was done to get programs since then, by name, without zeros."""
    before, now = (dataclasses.asdict(counts) for counts in (before, compiled.counts()))
    return {name: now[name] - before[name] for name in now if now[name] != before[name]}


@pytest.mark.compiler
@pytest.mark.slow
def test_a_program_from_the_cache_is_not_sent(cache):
    first, before = sorting(), compiled.counts()
    state = first.init(KEY)
    program = first.compile(state, 2, 0.1)
    assert made(before) == {"compiles": 2}
    assert program.shareable
    sent = program.serialize()
    expected = first.run(state, 2, KEYS, 0.1)

    forget()
    second, before = sorting(), compiled.counts()
    state, counted = second.init(KEY), compilations.of_this_process()
    again = second.compile(state, 2, 0.1)
    assert made(before) == {"restores": 2}
    assert compilations.of_this_process().since(counted).compiled == 0
    assert not again.shareable
    empty = again.serialize()
    assert len(empty) < len(sent) / 10
    assert_same_bits(second.run(state, 2, KEYS, 0.1), expected)

    for blob, message in ((sent, None), (empty, "persistent compilation cache, .* compiled here")):
        forget()
        other, before = sorting(), compiled.counts()
        if message is None:
            other.load(blob, state, 2, 0.1)
            assert made(before) == {"loads": 1}
        else:
            with pytest.warns(compiled.CompileWarning, match=message):
                other.load(blob, state, 2, 0.1)
            assert made(before) == {"refusals": 1, "restores": 1}
        assert_same_bits(other.run(state, 2, KEYS, 0.1), expected)


@pytest.mark.compiler
def test_what_jax_has_in_this_process_already_is_not_sent_either(cache):
    def double(x):
        return 2 * x

    compiled.compile(double, np.ones(3))
    forget()
    assert not compiled.compile(double, np.ones(3)).shareable  # from the cache
    compiled.clear()
    assert not compiled.compile(double, np.ones(3)).shareable  # from JAX, and so from the cache


@pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache entry")
@pytest.mark.slow
def test_cut_entries_of_the_cache_do_not_break_a_sweep(cache, tmp_path):
    changes = {"population": 4, "shards": 2, "generations": 2, "steps_per_generation": 2}
    results = []
    for name in ("cold", "warm", "cut"):
        forget()
        if name == "cut":
            for entry in cache.glob("*-cache"):
                entry.write_bytes(entry.read_bytes()[:100])
        results.append(sweep(tmp_path / name, **changes).run())
    assert [(r.report.compiles, r.report.restores) for r in results] == [(1, 0), (0, 1), (1, 0)]
    for result in results[1:]:
        assert_same_tables(result, results[0])
