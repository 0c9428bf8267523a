"""A population of 64 MLPs with One-Step under population-based training, in one of three ways.

The trials, and how each way runs them, are those of `benchmarks/sweep.py`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[3]))
os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:2])  # of the workers
os.environ["GRADHPO_CACHE"] = "off"

import sweep
from measure import cores

TRIALS, STEPS, GENERATIONS, BUDGET = 64, 100, 8, 25.0


def main(way):
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    match way:
        case "gradhpo":
            row = sweep.this_sweep(cores(), TRIALS, STEPS, GENERATIONS)
        case "hand":
            row = sweep.by_hand(cores(), TRIALS, STEPS, GENERATIONS)
        case "tune":
            row = sweep.ray_tune(True, TRIALS, STEPS, GENERATIONS, BUDGET)
        case _:
            raise ValueError(f"no such way: {way}")
    print(json.dumps({"rate": row.rate, "startup": row.startup}), file=channel, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
