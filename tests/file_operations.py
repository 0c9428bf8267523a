"""Kill a small sweep at every file operation, and go on: run by `test_kills` as a program.

Each life of a sweep is a fork of this process, which never starts JAX's backend. The compiled step
is replaced by a few lines of NumPy; everything that lasts is the real thing.
"""

import builtins
import contextlib
import functools
import hashlib
import importlib
import itertools
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

import jax
import numpy as np

from gradhpo.cluster import PB2, shard
from gradhpo.cluster.orders import Prepared
from gradhpo.observers import CSV
from tests.sweeps import SETTINGS, sweep

SCHEDULERS = {"PBT": SETTINGS["scheduler"], "PB2": PB2(rows=12, candidates=32)}
OPERATIONS = ("open", "fsync", "replace", "unlink", "mkdir", "rmdir")
OPERATIONS += ("write", "ftruncate", "truncate")
SIZE = 4000
"""Numbers of a trial's state: 16 kB."""
CHANGES = {"population": 6, "shards": 2, "generations": 5}


class Variant:
    """A step that is a few lines of NumPy."""

    host = divided = None
    data = "a checksum"

    def __init__(self, spec, arguments, data):
        del arguments, data
        self.slots = spec.slots

    def trace(self):
        return False  # `prepare` does it all

    def prepare(self, blobs):
        del blobs
        key = {"computation": "numpy"}
        return Prepared(-1, "map", key, None, 1, 0, 0, 0, 0, [], data=self.data)

    def let_go(self):
        """Has nothing to let go of."""

    def zeros(self):
        return {".params": np.zeros((self.slots, SIZE), np.float32), ".rate": np.zeros(self.slots)}

    def restore(self, storage, saved):
        return storage.load(saved)

    def select(self, state, parents):
        return {name: x[parents] for name, x in state.items()}

    def take(self, state, slots):
        return {name: x[slots] for name, x in state.items()}

    def put(self, state, slots, rows):
        moved = {name: x.copy() for name, x in state.items()}
        for name, x in moved.items():
            x[slots] = rows[name]
        return moved

    def turn(self, state, order):
        params, rate = (x.copy() for x in state.values())
        for slot, trial in enumerate(order.trials):
            if order.fresh[slot]:
                size = params.shape[1]
                params[slot], rate[slot] = np.random.default_rng(trial).normal(size=size), -3
        if "log_rate" in order.changes:
            mask, multiply, add = order.changes["log_rate"]
            rate = np.where(mask, rate * multiply + add, rate)
        params -= (0.1 * np.exp(rate)[:, None] * np.sign(params)).astype(np.float32)
        columns = {"val_loss": np.abs(params).mean(1), "hyperparams.log_rate": rate}
        columns["diverged_at"] = np.zeros(self.slots, np.int32)
        return {".params": params, ".rate": rate}, columns


@contextlib.contextmanager
def numpy_steps():
    """Let generations of sweeps be a few lines of NumPy; what lasts and what decides stay real."""
    made, shard.Variant = shard.Variant, Variant
    try:
        yield
    finally:
        shard.Variant = made


def run(folder, every, rows=None, scheduler="PBT"):
    """Run the sweep to its end; return what it found, as a digest, with a tracker's file if any."""
    trackers = [] if rows is None else [CSV(rows)]
    made = sweep(folder, scheduler=SCHEDULERS[scheduler], **CHANGES, checkpoint_every=every)
    result = made.run(observers=trackers)
    digest = hashlib.sha256(str((result.best.lineage, result.ended)).encode())
    for name, array in [*result.table.items(), *result.best.arrays.items()]:
        digest.update(name.encode() + array.tobytes())
    if rows is not None:
        digest.update(rows.read_bytes())
        starts = [line.split(b",")[:2] for line in rows.read_bytes().splitlines()[1:]]
        whole = itertools.product(range(1, 6), range(6))
        assert [tuple(map(int, start)) for start in starts] == list(whole), "each row once"
    return digest.hexdigest()


def killed_at(number):
    """Let SIGKILL come at the file operation of this number: before it, or in the middle."""
    calls = itertools.count(1)

    def dangerous(function):
        def call(*args, **kwargs):
            if next(calls) == number:
                if function.__name__ == "write":
                    function(args[0], args[1][: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for name in OPERATIONS:
        setattr(os, name, dangerous(getattr(os, name)))
    builtins.open = dangerous(builtins.open)


def slow_disk():
    """Let files reach the disk late: the next generation is computed meanwhile."""
    fsync = os.fsync

    def slow(descriptor):
        if threading.current_thread() is not threading.main_thread():
            time.sleep(0.004)
        fsync(descriptor)

    os.fsync = slow


def life(folder, every, slow, number=None, scheduler="PBT"):
    """Run the sweep in a process of its own; return whether it came to its end."""
    child = os.fork()
    if child == 0:
        try:
            if slow:
                slow_disk()
            if number is not None:
                killed_at(number)
            found = run(folder / "run", every, folder / "run/rows.csv", scheduler)
            Path(folder / "found").write_text(found)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), f"killed at {number}: {status}"
    return status == 0


def main(folder, every, slow, step, scheduler):
    """Kill at each `step`-th operation, and again while it goes on; print how often."""
    if scheduler == "PB2":  # once, and not in each of the lives
        importlib.import_module("gradhpo.cluster.schedulers.gaussian_process")
    lived = functools.partial(life, scheduler=scheduler)
    jax.process_index, jax.process_count = lambda: 0, lambda: 1  # they would start a backend
    shard.Variant = Variant
    folder = Path(folder)
    shutil.rmtree(folder / "run", ignore_errors=True)
    assert lived(folder, every, slow)
    expected, kills = (folder / "found").read_text(), 0
    for number in itertools.count(1, step):
        shutil.rmtree(folder / "run", ignore_errors=True)
        if lived(folder, every, slow, number):
            break
        kills += 1
        kills += not lived(folder, every, slow, 1 + 7 * number % 60)
        (folder / "found").unlink(missing_ok=True)
        assert lived(folder, every, slow)
        found = (folder / "found").read_text()
        assert found == expected, f"another result after a kill at {number}"
    print(kills, flush=True)


def told(arguments):
    """Yield folder, every, slow, step and scheduler of each group of kills on the command line."""
    folder, *others = arguments
    for every, slow, step, scheduler in zip(*[iter(others)] * 4, strict=True):
        yield folder, int(every), int(slow), int(step), scheduler


if __name__ == "__main__":
    for given in told(sys.argv[1:]):
        main(*given)
