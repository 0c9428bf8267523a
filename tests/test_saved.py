"""`Solution.save` and `load`: every field to the bit, and other problems refused by name."""

import dataclasses
import os
import pickle
import subprocess
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradhpo
from gradhpo import DamagedFile, Problem, Solution, solve
from gradhpo.saved import Packer, Unpacker
from gradhpo.solution import packed
from tests import long_program
from tests.quick import slow_but
from tests.small import BATCH, INNER, OPTIMIZERS, build, start, train_loss, val_loss

KEY = jax.random.key(7)
OPTIMIZER = build("one-step", outer=True)[0]


class Pair(NamedTuple):
    first: jax.Array
    second: jax.Array


def metrics(w, lam):
    return {"far": lam["decay"] + 2.6, "tree": {"pair": Pair(w[0], w), "list": [w, None]}}


PROBLEM = Problem(start, train_loss, val_loss, lambda key: (BATCH, BATCH), metrics=metrics)


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert isinstance(a, jax.Array) == isinstance(b, jax.Array)
        assert jnp.result_type(a) == jnp.result_type(b)
        np.testing.assert_array_equal(*map(plain, (a, b)))


def plain(leaf):
    keys = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(leaf) if keys else leaf


@pytest.mark.slow
def test_another_precision_is_named(tmp_path, x64):
    made = solve(PROBLEM, OPTIMIZER, 3, KEY)
    assert made.metrics["val_loss"].dtype == np.float64
    made.save(tmp_path / "solution")
    with jax.enable_x64(False), pytest.raises(ValueError, match="jax_enable_x64=True"):
        Solution.load(tmp_path / "solution", PROBLEM, OPTIMIZER)


KEYS = {"one": KEY, "batch": jax.random.split(KEY, 2)}


# Greedy and HyperDistill, for what their states hold beside the weights of the others.
@pytest.mark.parametrize(
    ("name", "runs"),
    slow_but(
        [("one-step", "one"), ("one-step", "batch"), ("hyperdistill", "one"), ("greedy", "batch")],
        ("one-step", "one"),
    ),
)
def test_a_solution_comes_back_to_the_bit(tmp_path, name, runs):
    settings = {"T": 3} if name == "hyperdistill" else {}
    optimizer = build(name, outer=True, **settings)[0]
    made = solve(PROBLEM, optimizer, 4, KEYS[runs], eval_every=2, episode_length=3)
    made.save(tmp_path / "new" / "solution.npz")
    found = Solution.load(tmp_path / "new" / "solution.npz", PROBLEM, optimizer)
    assert_same(found, made)
    assert found.fingerprint == made.fingerprint
    assert isinstance(found.evals["tree"]["pair"], Pair)


def keyed(**data):
    """A problem and a method whose states hold a batch and a PRNG key."""
    optimizer = gradhpo.OnlineHypergradientOptimizer(INNER, T=3, distill_data=True)
    return Problem(start, train_loss, val_loss, **data), optimizer


@pytest.mark.slow
def test_keys_in_a_state_come_back(tmp_path):
    problem, optimizer = keyed(batch=long_program.batch)
    made = solve(problem, optimizer, 4, jax.random.key(1, impl="rbg"), lr_hyper=0.01)
    assert any(plain(x) is not x for x in jax.tree.leaves(made))
    made.save(tmp_path / "solution")
    found = Solution.load(tmp_path / "solution", problem, optimizer)
    assert_same(found, made)


@pytest.mark.slow
def test_keys_in_a_state_of_a_run_on_host_data_come_back(tmp_path):
    on_host, optimizer = keyed(batches=[(BATCH, BATCH)] * 20)
    made = solve(on_host, optimizer, 4, KEY, lr_hyper=0.01)
    made.save(tmp_path / "host")
    assert_same(Solution.load(tmp_path / "host", on_host, optimizer), made)
    once = dataclasses.replace(on_host, batches=iter([(BATCH, BATCH)]))
    with pytest.raises(ValueError, match="batches must be readable again"):
        Solution.load(tmp_path / "host", once, optimizer)


@pytest.mark.slow
def test_a_loaded_solution_goes_on_to_the_same_bits(tmp_path):
    problem, optimizer = keyed(batch=long_program.batch)
    whole = solve(problem, optimizer, 9, KEY, lr_hyper=0.01, episode_length=3)
    solve(problem, optimizer, 4, KEY, lr_hyper=0.01, episode_length=3).save(tmp_path / "part")
    part = Solution.load(tmp_path / "part", problem, optimizer)
    found = solve(problem, optimizer, 9, KEY, lr_hyper=0.01, episode_length=3, resume=part)
    np.testing.assert_array_equal(found.metrics["val_loss"], whole.metrics["val_loss"])


@pytest.mark.slow
def test_other_precisions_and_fields_made_by_hand(tmp_path):
    def half(key):
        w, lam = start(key)
        return w.astype(jnp.bfloat16), lam

    problem = dataclasses.replace(PROBLEM, init=half, metrics=None)
    made = solve(problem, OPTIMIZER, 3, KEY)
    by_hand = Solution(made.state, {}, {}, np.zeros(0, int), 3, None, np.zeros((), int))
    by_hand.save(tmp_path / "solution")
    found = Solution.load(tmp_path / "solution", problem, OPTIMIZER)
    assert_same(found, by_hand)
    assert found.state.params.dtype == jnp.bfloat16


def test_a_value_may_hold_anything_that_is_plain():
    array = np.arange(3)
    value = {
        "bytes": b"\0\1",
        "none": None,
        "numbers": [1, 2.5, True, "text"],
        "tuple": (array, array.astype(np.float16), np.int64(3)),
        "empty": {},
    }
    packer = Packer((), ())
    spec = packer.pack(value, "value")
    assert len(packer.arrays) == 4
    found = Unpacker(packer.arrays, {}, (), (), "it").unpack(spec)
    assert found["bytes"] == b"\0\1"
    assert (found["none"], found["numbers"], found["empty"]) == (None, value["numbers"], {})
    assert isinstance(found["tuple"], tuple)
    assert [x.dtype for x in found["tuple"]] == [array.dtype, np.float16, np.int64]
    with pytest.raises(TypeError, match="cannot save value: it holds more than dictionaries"):
        Packer((), ()).pack({"odd": Pair(array, array)}, "value")
    with pytest.raises(TypeError, match="cannot save value, a object"):
        Packer((), ()).pack(object(), "value")
    with pytest.raises(ValueError, match="it was saved by a newer gradhpo: it has 'Best'"):
        Unpacker({}, {}, (), (), "it").unpack({"Best": {}})


def test_one_array_in_several_places_is_written_once(tmp_path):
    made = solve(PROBLEM, OPTIMIZER, 3, KEY)
    assert made.best.state is made.state
    arrays, _ = packed(made)
    assert not any(name.startswith(".best.state") for name in arrays)


def wider(key):
    del key
    return jnp.ones(4), start()[1]


def renamed(key):
    del key
    return jnp.ones(3), {"l": jnp.ones(3), "rate": jnp.asarray(-3.0)}


def of_renamed(w, lam, batch):
    return train_loss(w, {"l": lam["l"], "decay": lam["rate"]}, batch)


@pytest.mark.parametrize(
    ("problem", "optimizer", "message"),
    [
        ({"init": wider}, {}, r"is float32\[3\], and should be float32\[4\]"),
        ({"init": renamed, "train_loss": of_renamed}, {}, r"lacks state\.hyperparams\['rate'\]"),
        ({}, {"outer_optimizer": optax.sgd(0.1)}, r"has state\.outer_opt_state.*not there now"),
        ({}, {"mode": "reverse-over-reverse"}, r"another optimizer, OneStep.*auto.*; got OneStep"),
    ],
)
def test_a_solution_of_something_else_is_refused(tmp_path, problem, optimizer, message):
    solve(PROBLEM, OPTIMIZER, 3, KEY).save(tmp_path / "solution")
    other = dataclasses.replace(PROBLEM, **problem)
    method = gradhpo.OneStepOptimizer(
        **{"inner_optimizer": INNER, "outer_optimizer": OPTIMIZER.outer_optimizer} | optimizer
    )
    if problem:
        other = dataclasses.replace(other, metrics=None)
    with pytest.raises(ValueError, match=rf"{tmp_path}/solution is of .*{message}"):
        Solution.load(tmp_path / "solution", other, method)


def test_damage_is_named_and_nothing_is_unpickled(tmp_path):
    with pytest.raises(DamagedFile, match=r"solution: cannot be read"):
        Solution.load(tmp_path / "solution", PROBLEM, OPTIMIZER)
    (tmp_path / "solution").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(DamagedFile, match="not a whole file of gradhpo"):
        Solution.load(tmp_path / "solution", PROBLEM, OPTIMIZER)


# --- fingerprints -------------------------------------------------------------------------------


def fingerprint(**changes):
    return long_program.fingerprint(OPTIMIZER, dataclasses.replace(PROBLEM, **changes))


TARGET = np.arange(3.0, dtype=np.float32)


def pulled(target, scale=1.0):
    def loss(w, lam, batch):
        return train_loss(w, lam, batch) + scale * jnp.sum((w - jnp.asarray(target)) ** 2)

    return loss


@pytest.mark.slow
def test_what_is_closed_over_counts_and_names_do_not():
    one = fingerprint(train_loss=pulled(TARGET))
    assert fingerprint(train_loss=pulled(TARGET.copy())) == one
    assert fingerprint(train_loss=pulled(TARGET + 1e-6)) != one
    assert fingerprint(train_loss=pulled(jnp.asarray(TARGET))).step == one.step

    def renamed_loss(a, b, c):
        return train_loss(a, b, c)

    assert fingerprint(train_loss=renamed_loss) == fingerprint()
    assert fingerprint() == solve(PROBLEM, OPTIMIZER, 1, KEY).fingerprint


@pytest.mark.slow
def test_what_may_change_while_a_run_goes_on_does_not_count():
    optimizer = build("one-step")[0]
    runs = [
        solve(PROBLEM, optimizer, 1, KEY, lr_hyper=0.1),
        solve(PROBLEM, optimizer, 5, KEY, lr_hyper=lambda t: 0.1 / (t + 1), record=["l"]),
        solve(dataclasses.replace(PROBLEM, metrics=None), optimizer, 2, KEY, lr_hyper=1),
    ]
    assert len({run.fingerprint for run in runs}) == 1
    host = dataclasses.replace(PROBLEM, batch=None, batches=[(BATCH, BATCH)] * 150)
    runs = [solve(host, optimizer, steps, KEY, lr_hyper=0.1) for steps in (1, 100)]
    assert runs[0].fingerprint == runs[1].fingerprint


@pytest.mark.slow
def test_a_step_is_traced_once_for_the_chunk_and_the_fingerprint():
    traces = []

    def loss(w, lam, batch):
        traces.append(1)
        return train_loss(w, lam, batch)

    problem = Problem(start, loss, val_loss, lambda key: (BATCH, BATCH))
    optimizer = build("one-step", outer=True)[0]
    solve(problem, optimizer, 3, KEY)
    there = len(traces)
    assert there > 0
    solve(problem, optimizer, 5, jax.random.key(9), record=["l"])
    assert len(traces) == there


@pytest.mark.slow
def test_another_process_gives_the_same_fingerprints(tmp_path):
    program = [sys.executable, long_program.__file__, "fingerprints", str(tmp_path / "there")]
    env = {"PYTHONHASHSEED": "1", "XLA_FLAGS": os.environ["XLA_FLAGS"]}
    subprocess.run(program, check=True, env=env, timeout=300)
    made = long_program.fingerprints()
    assert (tmp_path / "there").read_text() == repr(made)
    assert len({found.step for found in made.values()}) == len(made) > len(OPTIMIZERS)
