"""Problems with host data, found by reference in every process."""

import itertools

import grain
import numpy as np

import gradhpo
from tests.small import X, Y, start, train_loss, val_loss

ROWS = np.stack([np.random.default_rng(i).permutation(12)[:8] for i in range(40)])


def pair(index):
    """The pair of an index: some rows to train on, others to validate."""
    rows = ROWS[int(index) % len(ROWS)]
    return (X[rows], Y[rows]), (X[:8], Y[:8])


def drawn(rng, start):
    """Pairs of a generator's own, from any of them on."""
    numbers = rng.integers(1, 2**16)
    return (pair(int(numbers) * (start + i + 1) % 997) for i in itertools.count())


def shuffled(rng):
    """Pairs in an order of the generator's own, which begin at their beginning only."""
    while True:
        yield pair(rng.integers(len(ROWS)))


# By itself Grain reads 500 ahead, in 16 threads: most of what a short test would compute.
SOME_AHEAD = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)


def dataset(seed=3):
    """A Grain pipeline over the pairs, shuffled again in every epoch."""
    made = grain.MapDataset.range(len(ROWS)).seed(seed).shuffle().map(pair)
    return made.repeat().to_iter_dataset(SOME_AHEAD)


class Rows:
    """A data source for Grain's `DataLoader`, which goes on only with a source of the same name."""

    def __repr__(self):
        return "Rows()"

    def __len__(self):
        return len(ROWS)

    def __getitem__(self, index):
        return pair(index)


def loader():
    """Grain's other front: a `DataLoader`, whose state is bytes."""
    sampler = grain.samplers.IndexSampler(len(ROWS), shuffle=True, seed=1, num_epochs=None)
    return grain.DataLoader(
        data_source=Rows(), sampler=sampler, worker_count=0, read_options=SOME_AHEAD
    )


SOURCES = {
    "start": lambda: drawn,
    "function": lambda: shuffled,
    "of none": lambda: lambda: shuffled(np.random.default_rng(2)),
    "list": lambda: [pair(i) for i in range(120)],
    "dataset": dataset,
    "loader": loader,
    "seeded": lambda: lambda rng: dataset(int(rng.integers(100))),
}


def metrics(w, lam):
    """The first weight."""
    return {"first": w[0]}


def problem(batches="dataset"):
    """The small problem on one of these; all of them share compiled code."""
    return gradhpo.Problem(start, train_loss, val_loss, batches=SOURCES[batches](), metrics=metrics)
