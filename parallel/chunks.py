"""A generation on host data: all slots take a chunk of steps on a stack of batches, repeatedly."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradhpo.feed import HostFeed, Segment
from gradhpo.parallel.mesh import to_host
from gradhpo.state import BilevelState, PyTree
from gradhpo.task import step_metrics
from gradhpo.trial import Rates, Trial, guard


def running(state: BilevelState) -> Any:
    """Return whether a slot has not diverged."""
    return state.metadata["diverged_at"] == 0


def guarded_step(
    trial: Trial, state: BilevelState, key: jax.Array, rates: Rates, data: PyTree, pair: PyTree
) -> tuple[BilevelState, dict[str, jax.Array]]:
    """Take a slot's next step, and return its row.

    The state is the old one from the first step on that is not finite; `pair` is from the host, or
    None.
    """
    index, runs = state.metadata["trial_step"], running(state)
    state = trial.begin(state, key, index, data, runs)
    new = trial.step(state, trial.task(key, data, index, pair), index, rates)
    taken = index + 1
    new = new.update(metadata={"trial_step": taken})
    kept, runs_on, _ = guard(state, new, runs)
    since = jnp.where(runs & ~runs_on, taken, state.metadata["diverged_at"])
    row = {name: new.metadata[name] for name in step_metrics(new.metadata)}
    row["stopped"] = ~runs_on
    return kept.update(metadata={"diverged_at": since}), row


def chunk(trial: Trial) -> Callable[..., Any]:
    """Return the function of a slot's chunk: as many steps as a traced number says.

    `(state, key, rates, data, host, n) -> (state, rows)`; `host` is a stack of `capacity` pairs, of
    which the first `n` are taken, and so long are the rows.
    """

    def one(
        state: BilevelState, key: jax.Array, rates: Rates, data: PyTree, host: PyTree, n: jax.Array
    ) -> tuple[BilevelState, dict[str, jax.Array]]:
        capacity = jax.tree.leaves(host)[0].shape[0]
        names = step_metrics(state.metadata)
        rows = {name: jnp.zeros(capacity, state.metadata[name].dtype) for name in names}
        rows = {"stopped": jnp.zeros(capacity, bool), **rows}

        def body(i: jax.Array, loop: Any) -> Any:
            state, rows = loop
            pair = jax.tree.map(lambda x: x[i], host)
            state, row = guarded_step(trial, state, key, rates, data, pair)
            return state, {name: rows[name].at[i].set(row[name]) for name in rows}

        return jax.lax.fori_loop(0, n, body, (state, rows))

    return one


def calibration(trial: Trial) -> Callable[..., Any]:
    """Return the function of a slot's calibration, if it is due.

    `(state, key, rates, data, host, due) -> state`; `host` is a stack of `T` pairs.
    """

    def one(
        state: BilevelState, key: jax.Array, rates: Any, data: PyTree, host: PyTree, due: jax.Array
    ) -> BilevelState:
        del rates
        index, due = state.metadata["trial_step"], due & running(state)
        begun = trial.begin_if_fresh(state, key, index, due)
        new = trial.calibrate(begun, key, index, data, host)
        return jax.tree.map(lambda a, b: jnp.where(due, b, a), state, new)

    return one


def segments(
    feed: HostFeed, seeds: np.ndarray, ages: np.ndarray, runs: np.ndarray, steps: int
) -> Iterator[Segment]:
    """Yield a generation's segments, and read on for the next one meanwhile.

    Raises:
      ValueError: if the data ends before.
    """
    taken = 0
    for segment in feed.segments(seeds, ages, runs, steps, beyond=True):
        yield segment
        taken = segment.end
    if taken < steps:
        raise ValueError(
            f"Problem.batches ended: {taken} of the generation's {steps} steps have batches. Give "
            "an iterable, or a function of one, that begins again by itself"
        )


def drive(
    state: Any,
    generation: Iterable[Segment],
    calibrate: Callable[[Any, Segment], Any],
    take: Callable[[Any, Segment, np.int32], Any],
) -> tuple[Any, dict[str, np.ndarray]]:
    """Go through a generation's segments; return the state and the rows, `(steps, slots)` each.

    At most two chunks are under way at a time, so that their stacks do not pile up on the device.
    """
    parts: list[tuple[int, dict[str, jax.Array]]] = []
    for segment in generation:
        if segment.calibrate:
            state = calibrate(state, segment)
            continue
        n = segment.end - segment.start
        state, rows = take(state, segment, np.int32(n))
        if parts:
            jax.block_until_ready(parts[-1][1])
        parts.append((n, rows))
    names = parts[0][1]
    return state, {
        name: np.concatenate([to_host(rows[name])[:, :n].T for n, rows in parts]) for name in names
    }
