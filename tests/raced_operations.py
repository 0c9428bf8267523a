"""The kills of `file_operations`, in a sweep whose combinations race; run by `test_race`.

The states of the combinations differ in shape: a shard that changes hands and goes on from its
former state would fail.
"""

import sys

import numpy as np

from gradhpo.cluster import Race, SearchSpace, loguniform
from tests import file_operations
from tests.file_operations import main, told

SPACE = SearchSpace(
    {"log_rate": loguniform(1e-3, 3e-1, stored="log")},
    choices={"size": [100, 200, 300]},
    race=Race(),
)


class Variant(file_operations.Variant):
    """A state of as many numbers as was chosen; the more, the worse."""

    def __init__(self, spec, arguments, data):
        super().__init__(spec, arguments, data)
        self.size = arguments["size"]

    def zeros(self):
        return {name: x[:, : self.size] for name, x in super().zeros().items() if x.ndim > 1} | {
            ".rate": np.zeros(self.slots)
        }

    def turn(self, state, order):
        assert state[".params"].shape == (self.slots, self.size)
        state, columns = super().turn(state, order)
        return state, {**columns, "val_loss": columns["val_loss"] * self.size}


if __name__ == "__main__":
    file_operations.CHANGES |= {"space": SPACE, "shards": 6}
    file_operations.Variant = Variant
    for given in told(sys.argv[1:]):
        main(*given)
