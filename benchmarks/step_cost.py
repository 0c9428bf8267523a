"""What a step costs: against plain training, and against the same mathematics written by hand."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated, Any

import by_hand
import jax
import jax.numpy as jnp
import models
import optax
import typer
from measure import Report, cost, paired_ratio

import gradhpo
from gradhpo import UnreachedWarning, episodes
from gradhpo.parallel.compilations import CompileCounter

INNER = optax.adam(1e-3)
OUTER = optax.adam(1e-2)
SHARE_OF_STEPS = {"MLP": 1, "CNN": 10, "transformer": 4}
"""The slower models take fewer steps of `solve`."""


def optimizers() -> dict[str, gradhpo.BilevelOptimizer]:
    """Return the library's optimizers under the names of `by_hand.steps`."""
    made = (
        gradhpo.FOOptimizer(INNER, OUTER),
        gradhpo.OneStepOptimizer(INNER, OUTER),
        gradhpo.T1T2Optimizer(INNER, OUTER),
        gradhpo.GreedyOptimizer(INNER, OUTER, by_hand.UNROLL, by_hand.GREEDY_GAMMA),
        gradhpo.OnlineHypergradientOptimizer(INNER, OUTER, gamma=by_hand.GAMMA),
    )
    return dict(zip(list(hand_steps(models.mlp()))[1:], made, strict=True))


def hand_steps(task: models.Task) -> Any:
    """Return the steps written by hand for a task."""
    return by_hand.steps(task.problem.train_loss, task.problem.val_loss, INNER, OUTER)


def step_rows(task: models.Task, name: str, rounds: int) -> list[list[str]]:
    """Measure each method's step on a task."""
    params, hyperparams = task.start()
    carry = by_hand.start(params, hyperparams, INNER, OUTER)
    batches = (task.train_batch, task.val_batch)
    losses = (task.problem.train_loss, task.problem.val_loss)
    hand = {name: jax.jit(step) for name, step in hand_steps(task).items()}
    plain_step = hand.pop("plain training")
    plain_flops, _ = cost(plain_step.lower(carry, *batches).compile())
    rows: list[list[str]] = []
    for method, optimizer in optimizers().items():
        state = optimizer.init(params, hyperparams)
        by_hand_step = hand[method]

        def ours(optimizer: Any = optimizer, state: Any = state) -> Any:
            return optimizer.step(state, *batches, *losses)

        def theirs(step: Any = by_hand_step) -> Any:
            return step(carry, *batches)

        def plain() -> Any:
            return plain_step(carry, *batches)

        flops, temporary = cost(optimizer.lower_step(state, *batches, *losses).compile())
        hand_flops, hand_bytes = cost(by_hand_step.lower(carry, *batches).compile())
        ratio, low, high = paired_ratio(ours, theirs, rounds)
        against_plain = paired_ratio(ours, plain, rounds)[0]
        rows.append(
            [
                name,
                method,
                f"{flops / plain_flops:.2f}",
                f"{against_plain:.2f}",
                f"{flops / hand_flops:.3f}",
                f"{temporary / 1024:.0f} ({hand_bytes / 1024:.0f})",
                f"{ratio:.2f} ({low:.2f}-{high:.2f})",
            ]
        )
    return rows


def solve_rows(tasks: dict[str, models.Task], rounds: int, steps: int) -> list[list[str]]:
    """Measure `solve` against a `lax.scan` written by hand, both with batches drawn inside."""
    rows: list[list[str]] = []
    key = jax.random.key(0)
    for name, task in tasks.items():
        for method, optimizer in optimizers().items():
            length = steps // (by_hand.UNROLL if "Greedy" in method else 1)
            length = max(10, length // SHARE_OF_STEPS[name])
            step: Any = hand_steps(task)[method]

            def whole(key: Any, step: Any = step, task: Any = task, length: int = length) -> Any:
                def body(carry: Any, i: Any) -> Any:
                    train, val = task.problem.draw(jax.random.fold_in(key, i), None)
                    return step(carry, train, val)

                params, hyperparams = task.problem.start(key)
                carry = by_hand.start(params, hyperparams, INNER, OUTER)
                return jax.lax.scan(body, carry, jnp.arange(length))

            scan: Any = jax.jit(whole)

            def theirs(scan: Any = scan) -> Any:
                return jax.device_get(scan(key)[1])

            def ours(optimizer: Any = optimizer, task: Any = task, length: int = length) -> Any:
                return gradhpo.solve(task.problem, optimizer, length, key, progress=False).metrics

            ratio, low, high = paired_ratio(ours, theirs, rounds)
            rows.append([name, method, str(length), f"{ratio:.2f} ({low:.2f}-{high:.2f})"])
    return rows


def loop_rows(rounds: int, steps: int) -> list[list[str]]:
    """Measure the steps of CNNs in the one loop of `solve`, against a Python loop of `step`."""
    rows: list[list[str]] = []
    optimizer = gradhpo.OneStepOptimizer(INNER, OUTER)
    length = max(10, steps // SHARE_OF_STEPS["CNN"])
    for name, task in models.convolutions().items():
        losses = (task.problem.train_loss, task.problem.val_loss)
        first = optimizer.init(*task.start())

        def outside(task: Any = task, first: Any = first, losses: Any = losses) -> Any:
            state = first
            for _ in range(length):
                state = optimizer.step(state, task.train_batch, task.val_batch, *losses)
            return state

        def inside(task: Any = task) -> Any:
            key = jax.random.key(0)
            return gradhpo.solve(task.problem, optimizer, length, key, progress=False).metrics

        ratio, low, high = paired_ratio(inside, outside, rounds)
        rows.append([name, str(length), f"{ratio:.2f} ({low:.2f}-{high:.2f})"])
    return rows


def compile_rows(task: models.Task) -> list[list[str]]:
    """Count what `run` compiles for several lengths, and how often it compiles its step."""
    params, hyperparams = task.start()
    losses = (task.problem.train_loss, task.problem.val_loss)
    rows: list[list[str]] = []
    kinds: dict[str, Any] = {
        "First-Order": gradhpo.FOOptimizer,
        "One-Step": gradhpo.OneStepOptimizer,
        "T1-T2": gradhpo.T1T2Optimizer,
        "HyperDistill": gradhpo.OnlineHypergradientOptimizer,
    }
    for method, kind in kinds.items():
        counts: list[str] = []
        for M, length in ((2, 5), (20, 5), (5, 20)):
            jax.clear_caches()
            takes_length = kind in (gradhpo.FOOptimizer, gradhpo.OneStepOptimizer)
            optimizer: Any = kind(INNER) if takes_length else kind(INNER, T=length)
            with CompileCounter() as compiled:
                optimizer.run(
                    optimizer.init(params, hyperparams),
                    M,
                    *([length] if takes_length else []),
                    lambda: task.train_batch,
                    lambda: task.val_batch,
                    *losses,
                    lr_hyper=0.1,
                    progress=False,
                )
            counts.append(f"{compiled.count} ({core_steps()} step)")
        rows.append([method, *counts])
    return rows


def core_steps() -> int:
    """Return how many versions of the step `run` compiled since the caches were cleared."""
    compiled_step: Any = episodes._guarded_step  # pyright: ignore[reportPrivateUsage]
    return compiled_step._cache_size()


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Paired rounds for each ratio.")] = 15,
    steps: Annotated[int, typer.Option(min=10, help="Steps of `solve` and of the scan.")] = 500,
    output: Annotated[Path | None, typer.Option(help="Write the tables as Markdown.")] = None,
) -> None:
    """Measure steps, whole runs and compiles. Ratios are medians of paired runs, with quartiles."""
    command = f"make bench ARGS='--rounds {rounds} --steps {steps}'"
    # First-Order gets no hypergradient here, and is measured all the same.
    warnings.filterwarnings("ignore", category=UnreachedWarning)
    report = Report("What a step costs", command)
    report.say(
        "Adam inside and outside, float32. λ: a weight for each of 256 training rows and a weight "
        "decay. FLOPs and bytes of temporaries are XLA's own figures for the compiled step; times "
        "are medians (and quartiles) of the ratio over paired rounds. XLA counts a loop's body "
        "once, whatever its length: so Greedy's FLOPs are those of two inner steps. It counts both "
        "sides of a branch: T1-T2's FLOPs have the exact derivative that it takes only where a "
        "weight without a gradient is in the way, and here none is."
    )
    tasks = {name: make() for name, make in models.TASKS.items()}
    columns = ["model", "method", "FLOPs / plain", "time / plain"]
    columns += ["FLOPs / hand", "KiB of temporaries (hand)", "time / hand"]
    rows = [row for name, task in tasks.items() for row in step_rows(task, name, rounds)]
    report.table("A step against plain training, and against one written by hand", columns, rows)
    report.say(
        "The MLP's step takes half a millisecond, of which this library's call from Python (its "
        "checks, and a state of named parts) is 0.03 to 0.06: that is what its ratios show."
    )
    columns = ["model", "method", "steps", "time / hand"]
    rows = solve_rows(tasks, max(3, rounds // 3), steps)
    report.table("`solve` against a `lax.scan` written by hand", columns, rows)
    report.say(
        "HyperDistill's run includes its first estimate of θ, from 20 batches, which the loop by "
        "hand leaves out: a fixed cost, large for few steps."
    )
    columns = ["convolutions", "steps", "in a loop / outside"]
    report.table(
        "CNNs: One-Step in the loop of `solve`, against a Python loop of `step`",
        columns,
        loop_rows(max(3, rounds // 3), steps),
    )
    columns = ["method", "M = 2, T = 5", "M = 20, T = 5", "M = 5, T = 20"]
    report.table(
        "Programs compiled by `run`, whatever M and T", columns, compile_rows(tasks["MLP"])
    )
    report.write(output)


if __name__ == "__main__":
    typer.run(main)
