"""Runs that are saved, killed, interrupted and gone on with: the bits of one that was not."""

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradhpo
from gradhpo import DamagedFile, Problem, Stop, StorageInUse, checkpoints, solve
from gradhpo.commit import UNFINISHED
from gradhpo.solution import packed
from tests import long_program
from tests.full_disk import full_disk
from tests.long_program import KINDS, STEPS
from tests.small import BATCH, INNER, build, start, train_loss, val_loss
from tests.sweeps import alive

KEY = jax.random.key(7)
KEYS = jax.random.split(KEY, 3)
OPTIMIZER = build("one-step", outer=True)[0]
PROBLEM = Problem(start, train_loss, val_loss, long_program.batch, metrics=long_program.metrics)
PROGRAM = [sys.executable, long_program.__file__]


def assert_same(found, expected):
    """Every array, number and word of two solutions is the same."""
    (arrays, about), (others, other) = packed(found), packed(expected)
    assert about == other
    assert arrays.keys() == others.keys()
    for name, array in arrays.items():
        assert array.dtype == others[name].dtype
        np.testing.assert_array_equal(array, others[name], err_msg=name)


def files(folder):
    return sorted(path.name for path in folder.glob("*.arrays"))


# --- a folder -----------------------------------------------------------------------------------


SLOW = pytest.mark.slow


@pytest.mark.compiler  # what goes on runs the same program: these two tests stand for the others
@pytest.mark.parametrize(
    "kind", ["device", *(pytest.param(kind, marks=SLOW) for kind in ("episodes", "host"))]
)
def test_chunks_and_checkpoints_change_no_bit_and_a_run_goes_on_by_itself(tmp_path, kind):
    whole = long_program.run(kind)
    calls = []

    def callback(steps, state):
        calls.append(steps)
        if steps == 33 and len(calls) == 11:
            raise InterruptedError("power cut")

    with pytest.raises(InterruptedError):
        long_program.run(kind, tmp_path, callback)
    assert len(files(tmp_path)) == 2
    assert "step-32" in files(tmp_path)[-1]
    assert_same(long_program.run(kind, tmp_path, callback), whole)
    assert calls == [*range(3, 34, 3), *range(33, STEPS + 1, 3)]
    assert len(files(tmp_path)) == 2
    assert_same(long_program.run(kind, tmp_path), whole)


def test_a_finished_run_goes_on_to_more_steps_as_if_it_had_never_ended(tmp_path):
    for steps in (7, 7, 12):
        found = solve(PROBLEM, OPTIMIZER, steps, KEY, eval_every=5, checkpoint=tmp_path)
        assert_same(found, solve(PROBLEM, OPTIMIZER, steps, KEY, eval_every=5))
    found = solve(PROBLEM, OPTIMIZER, 20, KEY, checkpoint=tmp_path)
    assert found.eval_steps.tolist() == [5, 10, 20]
    with pytest.raises(ValueError, match=r"checkpoint '.*' has taken 20 steps already"):
        solve(PROBLEM, OPTIMIZER, 19, KEY, checkpoint=tmp_path)


def test_a_run_that_stopped_stays_so(tmp_path):
    settings = {"eval_every": 2, "metric": "far", "checkpoint": tmp_path / "stop"}
    whole = solve(PROBLEM, OPTIMIZER, 60, KEY, stop=Stop(patience=1), **settings)
    assert 2 < whole.steps < 60
    assert_same(solve(PROBLEM, OPTIMIZER, 60, KEY, stop=Stop(patience=1), **settings), whole)
    longer = solve(PROBLEM, OPTIMIZER, 60, KEY, stop=Stop(patience=3), **settings)
    assert longer.steps > whole.steps
    settings["checkpoint"] = tmp_path / "told"
    calls = []

    def enough(steps, state):
        calls.append(steps)
        return steps == 6

    told = solve(PROBLEM, OPTIMIZER, 60, KEY, callback=enough, **settings)
    again = solve(PROBLEM, OPTIMIZER, 60, KEY, callback=enough, **settings)
    assert (told.steps, again.steps, calls) == (6, 6, [2, 4, 6])
    assert solve(PROBLEM, OPTIMIZER, 10, KEY, **settings).steps == 10


def test_a_solution_is_where_an_empty_folder_begins(tmp_path):
    part = solve(PROBLEM, OPTIMIZER, 5, KEY, eval_every=5)
    for _ in range(2):
        found = solve(
            PROBLEM, OPTIMIZER, 9, KEY, eval_every=5, resume=part, checkpoint=tmp_path, every=2
        )
        assert_same(found, solve(PROBLEM, OPTIMIZER, 9, KEY, eval_every=5))


def diverging(w, lam, batch):
    return train_loss(w, lam, batch) + jnp.where(lam["decay"] < -2.85, 0, jnp.nan)


@pytest.mark.slow
@pytest.mark.parametrize("key", [KEY, KEYS], ids=["one", "batch"])
def test_a_diverged_run_comes_back(tmp_path, key):
    problem = dataclasses.replace(PROBLEM, train_loss=diverging)
    with pytest.warns(gradhpo.DivergenceWarning):
        whole = solve(problem, OPTIMIZER, 40, key, eval_every=2)
    with pytest.warns(gradhpo.DivergenceWarning):
        solve(problem, OPTIMIZER, 40, key, eval_every=2, checkpoint=tmp_path, every=1)
    if key is KEY:  # goes on, and diverges again
        with pytest.warns(gradhpo.DivergenceWarning):
            found = solve(problem, OPTIMIZER, 40, key, eval_every=2, checkpoint=tmp_path)
    else:
        found = solve(problem, OPTIMIZER, 40, key, eval_every=2, checkpoint=tmp_path)
    assert_same(found, whole)


@pytest.mark.slow
def test_after_a_divergence_a_lower_rate_goes_on_and_otherwise_none(tmp_path):
    optimizer = build("one-step")[0]

    def spike(step):
        return jnp.where(step == 6, jnp.inf, 0.01)

    with pytest.warns(gradhpo.DivergenceWarning):
        solve(PROBLEM, optimizer, 20, KEY, lr_hyper=spike, checkpoint=tmp_path)
    found = solve(PROBLEM, optimizer, 20, KEY, lr_hyper=0.01, checkpoint=tmp_path)
    np.testing.assert_array_equal(
        found.metrics["val_loss"],
        solve(PROBLEM, optimizer, 20, KEY, lr_hyper=0.01).metrics["val_loss"],
    )
    with pytest.raises(ValueError, match=r"of a run with lr_hyper=0.01, got lr_hyper=0.02"):
        solve(PROBLEM, optimizer, 30, KEY, lr_hyper=0.02, checkpoint=tmp_path)
    with pytest.raises(ValueError, match=r"lr_hyper=0.01, got lr_hyper=a function \("):
        solve(PROBLEM, optimizer, 30, KEY, lr_hyper=spike, checkpoint=tmp_path)


def damage(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path):
    whole = solve(PROBLEM, OPTIMIZER, 12, KEY)
    solve(PROBLEM, OPTIMIZER, 12, KEY, checkpoint=tmp_path, every=5)
    newest = tmp_path / files(tmp_path)[-1]
    damage(newest)
    with pytest.warns(RuntimeWarning, match=rf"damaged, and goes on from .*step-10.*{newest.name}"):
        found = solve(PROBLEM, OPTIMIZER, 12, KEY, checkpoint=tmp_path, every=5)
    assert_same(found, whole)
    assert len(files(tmp_path)) == 2
    for name in files(tmp_path):
        damage(tmp_path / name)
    with pytest.raises(DamagedFile, match=r"has no whole checkpoint .*checksum"):
        solve(PROBLEM, OPTIMIZER, 12, KEY, checkpoint=tmp_path)


def test_what_a_killed_process_was_writing_is_removed(tmp_path):
    solve(PROBLEM, OPTIMIZER, 4, KEY, checkpoint=tmp_path)
    (tmp_path / f"00000002-step-5.1{UNFINISHED}").write_bytes(b"half")
    solve(PROBLEM, OPTIMIZER, 4, KEY, checkpoint=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2  # a checkpoint and the lock


def test_a_full_disk_is_told_and_the_run_goes_on(tmp_path):
    told = pytest.warns(RuntimeWarning, match=r"step (8|12) could not be saved, and the run")
    with full_disk(1000), told:
        found = solve(PROBLEM, OPTIMIZER, 12, KEY, checkpoint=tmp_path, every=8)
    assert found.steps == 12
    assert files(tmp_path) == []


def test_a_second_process_is_kept_out(tmp_path):
    def callback(steps, state):
        with pytest.raises(StorageInUse, match=rf"by another run: process {os.getpid()}"):
            solve(PROBLEM, OPTIMIZER, 4, KEY, checkpoint=tmp_path)

    solve(PROBLEM, OPTIMIZER, 4, KEY, checkpoint=tmp_path, callback=callback)


def double(w, lam, batch):
    return 2 * train_loss(w, lam, batch)


def other_start(key):
    w, lam = start(key)
    return w, lam | {"decay": lam["decay"] + 1}


CHANGES = {
    "key": (PROBLEM, OPTIMIZER, jax.random.key(8), "must be of a run with this key"),
    "keys": (PROBLEM, OPTIMIZER, KEYS, r"of a run with keys of shape \(\), got \(3,\)"),
    "method": (PROBLEM, build("t1t2", outer=True)[0], KEY, "another optimizer, One.*; got T1T2"),
    "rate": (PROBLEM, gradhpo.OneStepOptimizer(INNER, optax.adam(0.5)), KEY, "outer_optimizer"),
    "state": (PROBLEM, gradhpo.OneStepOptimizer(INNER, optax.sgd(0.1)), KEY, "outer_opt_state"),
    "loss": (dataclasses.replace(PROBLEM, train_loss=double), OPTIMIZER, KEY, "its losses"),
    "init": (dataclasses.replace(PROBLEM, init=other_start), OPTIMIZER, KEY, "Problem.init"),
}  # fmt: skip


@pytest.mark.parametrize("steps", [4, 9])
@pytest.mark.parametrize("change", CHANGES)
def test_another_run_is_refused(tmp_path, change, steps):
    solve(PROBLEM, OPTIMIZER, 4, KEY, checkpoint=tmp_path)
    problem, optimizer, key, message = CHANGES[change]
    with pytest.raises(ValueError, match=rf"^checkpoint '{tmp_path}' .*{message}"):
        solve(problem, optimizer, steps, key, checkpoint=tmp_path)
    part = solve(PROBLEM, OPTIMIZER, 4, KEY)
    if change not in ("keys", "state"):
        with pytest.raises(ValueError, match=rf"^resume .*{message}"):
            solve(problem, optimizer, steps, key, resume=part)


def test_a_change_that_is_meant_goes_on():
    part = solve(PROBLEM, OPTIMIZER, 4, KEY)
    meant = dataclasses.replace(part, fingerprint=None)
    faster = gradhpo.OneStepOptimizer(INNER, optax.adam(0.5))
    assert solve(PROBLEM, faster, 9, KEY, resume=meant).steps == 9
    older = dataclasses.replace(part.fingerprint, versions="jax 0.1")
    with pytest.warns(UserWarning, match="begun with jax 0.1, and this is gradhpo .* not checked"):
        solve(PROBLEM, faster, 9, KEY, resume=dataclasses.replace(part, fingerprint=older))


def test_mistakes_are_named(tmp_path):
    with pytest.raises(ValueError, match="every needs checkpoint"):
        solve(PROBLEM, OPTIMIZER, 4, KEY, every=2)
    with pytest.raises(
        TypeError, match="checkpoint must be the path of a folder or an address, got 3"
    ):
        solve(PROBLEM, OPTIMIZER, 4, KEY, checkpoint=3)
    with pytest.raises(ValueError, match="every must be at least 1"):
        solve(PROBLEM, OPTIMIZER, 4, KEY, checkpoint=tmp_path, every=0)
    once = Problem(start, train_loss, val_loss, batches=iter([(BATCH, BATCH)] * 9))
    with pytest.raises(ValueError, match=r"must be readable again.*; got list_iterator"):
        solve(once, OPTIMIZER, 4, KEY, checkpoint=tmp_path)


# --- signals ------------------------------------------------------------------------------------


def pairs_of(rng):
    return itertools.islice(long_program.host_pairs(rng), 500)


DEVICE, HOST = {"batch": long_program.batch}, {"batches": pairs_of}


@pytest.mark.parametrize(
    ("number", "kept", "data"),
    [
        (signal.SIGINT, True, DEVICE),
        (signal.SIGINT, False, HOST),
        (signal.SIGTERM, True, HOST),
        (signal.SIGTERM, False, DEVICE),
    ],
    ids=["folder", "none, host", "folder, host", "none"],
)
def test_a_signal_returns_what_there_is_and_the_run_goes_on(tmp_path, number, kept, data, capfd):
    problem = Problem(start, train_loss, val_loss, metrics=long_program.metrics, **data)
    before = signal.getsignal(number)
    whole = solve(problem, OPTIMIZER, 300, KEY, eval_every=50)

    def interrupt(steps, state):
        if steps == 50:
            os.kill(os.getpid(), number)

    name, settings = signal.Signals(number).name, {"checkpoint": tmp_path} if kept else {}
    again = "checkpoint='" if kept else "resume=solution"
    with pytest.warns(RuntimeWarning, match=rf"{name}: stopped after step 50 of 300.*{again}"):
        part = solve(problem, OPTIMIZER, 300, KEY, eval_every=50, callback=interrupt, **settings)
    assert signal.getsignal(number) is before
    assert f"{name}: finishing a chunk" in capfd.readouterr().err
    assert part.steps == 50
    assert part.eval_steps.tolist() == [50]
    settings = {"checkpoint": tmp_path} if kept else {"resume": part}
    assert_same(solve(problem, OPTIMIZER, 300, KEY, eval_every=50, **settings), whole)


def test_a_second_signal_ends_at_once(tmp_path):
    before = signal.getsignal(signal.SIGINT)

    def interrupt(steps, state):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)

    with pytest.raises(KeyboardInterrupt):
        solve(PROBLEM, OPTIMIZER, 30, KEY, eval_every=5, checkpoint=tmp_path, callback=interrupt)
    assert signal.getsignal(signal.SIGINT) is before
    found = solve(PROBLEM, OPTIMIZER, 30, KEY, eval_every=5, checkpoint=tmp_path)
    assert_same(found, solve(PROBLEM, OPTIMIZER, 30, KEY, eval_every=5))


def test_a_signal_before_the_first_step_leaves_a_start():
    def data(key):
        os.kill(os.getpid(), signal.SIGINT)  # while the program is traced
        return BATCH

    problem = Problem(start, train_loss, val_loss, lambda key, data: (data, data), data=data)
    with pytest.warns(RuntimeWarning, match="stopped after step 0 of 9"):
        part = solve(problem, OPTIMIZER, 9, KEY)
    assert part.best is None
    assert_same(solve(problem, OPTIMIZER, 9, KEY, resume=part), solve(problem, OPTIMIZER, 9, KEY))


def test_other_threads_leave_signals_alone(tmp_path):
    found, seen = [], []

    def callback(steps, state):
        seen.append(signal.getsignal(signal.SIGINT))

    def work():
        found.append(solve(PROBLEM, OPTIMIZER, 4, KEY, checkpoint=tmp_path, callback=callback))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found[0].steps == 4
    assert seen == [signal.getsignal(signal.SIGINT)]


# --- real kills ---------------------------------------------------------------------------------


class Life:
    """A process that takes a run on, as far as it comes."""

    def __init__(self, forks, kind, folder, *kill):
        print(json.dumps([kind, str(folder), *kill]), file=forks.stdin, flush=True)
        self.pid, self._forks = int(forks.stdout.readline()), forks

    def alive(self):
        return alive(self.pid)

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)

    def finished(self):
        """Whether it came to its end, and was not killed."""
        status = int(self._forks.stdout.readline())
        assert status in (0, -signal.SIGKILL), "see what it printed"
        return status == 0


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    """A process that forks others, of which only the first that goes on compiles."""
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([*PROGRAM, "forks"], env={**os.environ, **cache}, **pipes) as process:
        yield process
        process.stdin.close()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What each kind of run gives, as a file keeps it."""
    made = {}

    def result(kind):
        if kind not in made:
            path = tmp_path_factory.mktemp(kind) / "result"
            long_program.run(kind).save(path)
            made[kind] = checkpoints.read(path)
        return made[kind]

    return result


def assert_result(folder, expected):
    arrays, about = checkpoints.read(folder / "result")
    others, other = expected
    assert about == other
    assert arrays.keys() == others.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, others[name], err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_sigkill_at_random_instants(tmp_path, kind, undisturbed, forks):
    chance, kills = np.random.default_rng(len(kind)), 0
    while True:
        before, life = files(tmp_path), Life(forks, kind, tmp_path)
        if kills == 2:
            assert life.finished()
            break
        deadline = time.monotonic() + 120
        while files(tmp_path) == before and life.alive():
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.12))
        life.kill()
        assert not life.finished()
        kills += 1
    assert_result(tmp_path, undisturbed(kind))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "count"),
    [("fsync", 5), ("replace", 4), ("replace", 1), ("unlink", 2)],
)
def test_sigkill_while_a_checkpoint_is_written(tmp_path, function, count, undisturbed, forks):
    """Before a file is on the disk, before it has its name, and before an older one is removed."""
    assert not Life(forks, "device", tmp_path, function, count).finished()
    left = [path for path in tmp_path.iterdir() if path.suffix == UNFINISHED]
    assert bool(left) == (function != "unlink")
    long_program.run("device", tmp_path).save(tmp_path / "result")  # any process goes on
    assert_result(tmp_path, undisturbed("device"))
    assert len(files(tmp_path)) == 2
    assert not list(tmp_path.glob(f"*{UNFINISHED}"))
