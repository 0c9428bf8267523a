"""What each peer's script does when it is run: answer with its first steps, then take turns.

`python SCRIPT MODEL CASE INPUTS` says, as a line of JSON, the hypergradient of the first step and
the validation losses of the first five; then it takes as many steps as each line of its input
says, and answers with the seconds of CPU. With `--steps N` it takes N steps and ends, as a user's
process.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

CHECKED = 5


class Run(NamedTuple):
    """A method at work on a model."""

    step: Callable[[int], Any]
    """Takes step `i`; returns the validation loss, or a function that computes it, and the
    hypergradient, or None for it."""
    before: Callable[[], Any] | None = None
    """Returns the hypergradient of the first step, where `step` does not."""


def serve(start: Callable[..., Run]) -> None:
    """Do what the command line asks; `start(model, case, inputs)` returns a `Run`."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("case")
    parser.add_argument("inputs")
    parser.add_argument("--steps", type=int, default=0)
    given = parser.parse_args()
    with np.load(given.inputs) as file:
        inputs = {name: file[name] for name in file.files}
    run = start(given.model, given.case, inputs)
    if given.steps:
        answer: Any = {"loss": _take(run, 0, given.steps)}
        print(json.dumps(answer), file=channel, flush=True)
        return
    print(json.dumps(_first(run)), file=channel, flush=True)
    done = CHECKED
    for line in sys.stdin:
        count = int(line)
        began = time.process_time()
        _take(run, done, count)
        print(json.dumps(time.process_time() - began), file=channel, flush=True)
        done += count


def _take(run: Run, begin: int, count: int) -> float:
    loss: Any = float("nan")
    for i in range(begin, begin + count):
        loss, _ = run.step(i)
    return _number(loss)  # waits


def _number(loss: Any) -> float:
    return float(loss() if callable(loss) else loss)


def _first(run: Run) -> dict[str, Any]:
    hypergradient = None if run.before is None else np.array(run.before())
    losses: list[float] = []
    for i in range(CHECKED):
        loss, told = run.step(i)
        losses.append(_number(loss))
        hypergradient = np.array(told) if hypergradient is None else hypergradient
    return {"losses": losses, "hypergradient": hypergradient.tolist()}
