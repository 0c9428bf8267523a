"""Bytes on each device of a transformer's trial that is divided over eight, by method.

State is the bytes of the arrays that a device holds, temporaries are XLA's own account of a
compiled generation of two steps. Eight devices of the CPU serve: nothing is timed.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python benchmarks/divided.py
"""

from __future__ import annotations

import functools
import math
import sys
from pathlib import Path
from typing import Annotated, Any

import jax
import typer
from measure import Report, cost

sys.path.insert(0, str(Path(__file__).parent.parent))

from gradhpo.parallel import Population, data_parallel, fully_sharded, make_mesh
from tests import divided_problems as problems

DEVICES = 8


def bytes_of(optimizer: Any, width: int) -> tuple[int, int]:
    """Return the bytes of a trial's state and of a step's temporaries, on one device."""
    trials = Population(problems.problem(width), optimizer, 1, batching="map")
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))
    state = trials.placed_state(jax.eval_shape(trials.trace_init, keys, {}, None))
    rates = trials.rates()
    args = (state, trials.placed(keys), trials.placed(rates), None)
    program = jax.jit(trials.trace_run(2)).lower(*args).compile()
    held = sum(map(_held, jax.tree.leaves(state)))
    return held, cost(program)[1]


def _held(leaf: Any) -> int:
    shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
    return math.prod(shape) * getattr(leaf.dtype, "itemsize", 8)


def main(
    widths: Annotated[list[int] | None, typer.Argument(help="Of the transformer.")] = None,
    output: Annotated[Path | None, typer.Option(help="Write the results as Markdown.")] = None,
) -> None:
    """Compare every method undivided and divided."""
    assert jax.device_count() == DEVICES, "set XLA_FLAGS as the module's first lines say"
    command = f"python benchmarks/divided.py {' '.join(map(str, widths or [128]))}"
    report = Report("Trials that are divided over devices", command)
    report.say(
        "A transformer of two layers with Adam, λ a decay for every weight of its widest matrices; "
        'rules `{"": "data"}` over 8 devices. kB on one device, and how many times less than '
        "undivided."
    )
    mesh = make_mesh()
    divide = functools.partial(data_parallel, mesh=mesh, backend="auto", rules=fully_sharded(mesh))
    for width in widths or [128]:
        rows: list[list[str]] = []
        for method in problems.METHODS:
            optimizer = problems.optimizer(method)
            one, eight = bytes_of(optimizer, width), bytes_of(divide(optimizer), width)
            cells = [
                f"{a / 1e3:,.0f} → {b / 1e3:,.0f} ({a / b:.1f}×)"
                for a, b in zip(one, eight, strict=True)
            ]
            rows.append([method, *cells])
        report.table(f"Width {width}", ["method", "state", "temporaries of a step"], rows)
    report.write(output)


if __name__ == "__main__":
    typer.run(main)
