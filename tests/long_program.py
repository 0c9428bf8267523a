"""A run with a checkpoint, in a process that may be killed: run by `test_long_runs`.

That process is a fork of one that has imported everything, and has not started JAX's backend.
"""

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
import jax.numpy as jnp
import numpy as np

from gradhpo import Problem, solve
from gradhpo.program import Program
from gradhpo.timetable import Timetable
from gradhpo.trial import Trial
from tests.small import OPTIMIZERS, REFERENCES, X, Y, build, start, train_loss, val_loss

STEPS = 60


def key():
    """Return the key of all runs: it would start a backend where this module is imported."""
    return jax.random.key(3)


def host_pairs(rng):
    while True:
        rows = rng.choice(len(X), (2, 6))
        yield (X[rows[0]], Y[rows[0]]), (X[rows[1]], Y[rows[1]])


def metrics(w, lam):
    return {"far": jnp.abs(lam["decay"] + 2.6), "w": w}


def batch(key):
    rows = jax.random.choice(key, len(X), (2, 6))
    x, y = jnp.asarray(X)[rows], jnp.asarray(Y)[rows]
    return (x[0], y[0]), (x[1], y[1])


KINDS = {
    "device": ("one-step", {"batch": batch}, 1, {}),
    "episodes": ("greedy", {"batch": batch}, 2, {"episode_length": 7}),
    "host": ("hyperdistill", {"batches": host_pairs}, 1, {"episode_length": 5}),
}
"""Method, data, how many runs there are at once, and settings."""


def run(kind, folder=None, callback=None):
    name, data, runs, settings = KINDS[kind]
    own = {"T": 5, "estimation_period": 2} if name == "hyperdistill" else {}
    optimizer = build(name, outer=True, **own)[0]
    problem = Problem(start, train_loss, val_loss, metrics=metrics, **data)
    if folder is not None:
        settings = settings | {"checkpoint": folder, "every": 4}
    keys = key() if runs == 1 else jax.random.split(key(), runs)
    return solve(
        problem, optimizer, STEPS, keys, eval_every=3, metric="far", callback=callback, **settings
    )


PLAIN = Problem(start, train_loss, val_loss, batch=batch)


def fingerprints():
    """What tells the program of each method with `PLAIN`, by its name; nothing is compiled."""
    methods = {name: build(name, outer=True)[0] for name in (*OPTIMIZERS, *REFERENCES)}
    return {name: fingerprint(made) for name, made in methods.items()}


def fingerprint(optimizer, problem=PLAIN):
    """That of `solve`, without a run."""
    program = Program(Trial(problem.described(), optimizer, Timetable.of(optimizer, None)), False)
    state = jax.eval_shape(program.init, key(), None, None)
    return program.fingerprint(state, key(), None, None)


def killed_at(name, count):
    """Let SIGKILL come at the call of a function of `os` that has this number, before it."""
    function, calls = getattr(os, name), iter(range(1, 10**6))

    def dangerous(*args, **kwargs):
        if next(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    setattr(os, name, dangerous)


def main(kind, folder, function="", count=0):
    if kind == "fingerprints":
        Path(folder).write_text(repr(fingerprints()))
        return
    if function:
        killed_at(function, int(count))
    found = run(kind, folder, lambda steps, state: time.sleep(0.05))
    found.save(Path(folder) / "result")
    assert np.isfinite(found.metrics["val_loss"]).all()


def forks():
    """For each line of arguments of `main` fork a process; tell its number, and how it ended."""
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            try:
                main(*json.loads(line))
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    forks() if sys.argv[1:] == ["forks"] else main(*sys.argv[1:])
