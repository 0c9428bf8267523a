"""Loads a program that another process compiled, and runs it: run by `test_population`."""

import os
import sys
from pathlib import Path

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "")
sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
import numpy as np

from gradhpo.parallel import compiled
from tests.test_population import KEY, KEYS, population


def main(name, layout, folder):
    trials, rate = population(name, layout)
    state = trials.init(KEY)
    before = compiled.counts()
    trials.load((folder / "program").read_bytes(), state, 4, *rate)
    final, _ = trials.run(state, 4, KEYS, *rate)
    after = compiled.counts()
    loaded = after.loads - before.loads
    print(f"runs compiled: {after.compiles - before.compiles}, loaded: {loaded}")
    np.savez(folder / "result.npz", *[np.asarray(leaf) for leaf in jax.tree.leaves(final)])


if __name__ == "__main__":
    main(*sys.argv[1:3], Path(sys.argv[3]))
