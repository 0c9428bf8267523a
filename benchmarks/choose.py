"""Which method where: all of them on five small worlds, the table that the docs refer to."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

# No time is measured here, and most of it would be LLVM's.
os.environ.setdefault(
    "XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)

import jax
import numpy as np
import optax
import typer
from measure import Report
from tqdm import tqdm
from worlds import WORLDS, World

import gradhpo
from gradhpo.flops import flops

DISTANCE = 12.0
"""How far Adam may carry a number of λ in all: the rate is this over the steps, RATE at most."""
RATE = 0.3
Make = Callable[..., gradhpo.BilevelOptimizer]
TRAINED = 100
"""Steps of One-Step before cosines are taken."""


class Way(NamedTuple):
    """A method with its settings."""

    make: Make
    settings: dict[str, Any]
    inner_steps: int
    """In a step."""

    def __call__(self, world: World, outer: Any) -> gradhpo.BilevelOptimizer:
        """Return the optimizer."""
        more = {"batches": "stack"} if world.stacked and self.inner_steps > 1 else {}
        return self.make(world.inner, outer, **self.settings, **more)


def ways(T: int) -> dict[str, Way]:
    """Return every method by the name of its class, some with several settings."""
    fifth = T // 5
    whole, part = {"unroll_steps": T}, {"unroll_steps": fifth}
    es: dict[str, Any] = {"particles": 20, "sigma": 0.1}
    ridge = {"damping": 0.1}

    def way(make: Make, inner_steps: int = 1, **settings: Any) -> Way:
        return Way(make, settings, inner_steps)

    return {
        "FO": way(gradhpo.FOOptimizer),
        "OneStep": way(gradhpo.OneStepOptimizer),
        "T1T2": way(gradhpo.T1T2Optimizer),
        "Greedy, γ = 0.9": way(gradhpo.GreedyOptimizer, T, **whole, gamma=0.9),
        "OnlineHypergradient, γ = 0.99": way(
            gradhpo.OnlineHypergradientOptimizer, 1, gamma=0.99, T=T
        ),
        "DrMAD": way(gradhpo.DrMADOptimizer, T, **whole),
        "Implicit, cg, K = 5": way(gradhpo.ImplicitOptimizer, T, **whole, K=5, **ridge),
        "Implicit, nystrom, K = 5": way(
            gradhpo.ImplicitOptimizer, T, **whole, K=5, solver="nystrom", **ridge
        ),
        f"Unrolled, {fifth} steps": way(gradhpo.UnrolledOptimizer, fifth, **part),
        f"Unrolled, {T} steps": way(gradhpo.UnrolledOptimizer, T, **whole),
        f"Forward, {T} steps": way(gradhpo.ForwardOptimizer, T, **whole),
        "ForwardGradient, b = 4": way(gradhpo.ForwardGradientOptimizer, T, **whole, directions=4),
        f"ES, {T} steps": way(gradhpo.ESOptimizer, T, **whole, **es),
        f"PES, {fifth} steps": way(gradhpo.PESOptimizer, fifth, **part, **es),
        f"NRES, {fifth} steps": way(gradhpo.NRESOptimizer, fifth, **part, **es),
        "SOBA": way(gradhpo.SOBAOptimizer, 1),
        "MASOBA": way(gradhpo.MASOBAOptimizer, 1),
        "F2SA, 5 steps": way(gradhpo.F2SAOptimizer, 5, unroll_steps=5, multiplier=10.0, growth=0.0),
        "BOME, 5 steps": way(gradhpo.BOMEOptimizer, 1, search_steps=5),
    }


def asked(world: World) -> dict[str, Way]:
    """Return the methods that a world asks."""
    named = ways(world.T)
    return {name: way for name, way in named.items() if name.startswith(world.only or ("",))}


class Cost(NamedTuple):
    """Of one inner step, and of one step."""

    flops: float
    kib: float


def cost(world: World, way: Way) -> Cost:
    """Return FLOPs of an inner step, loops counted as often as they run, and a step's memory.

    Memory is XLA's: the arguments, of which the state is one, and the temporaries.
    """
    optimizer, problem = way(world, optax.adam(1.0)), posed(world, way)
    key = jax.random.key(0)
    state = optimizer.init(*problem.start(key))
    batches = problem.draw_at(key, 0, None)
    losses = (problem.train_loss, problem.val_loss)
    train_batch, val_batch = batches
    args = (state, train_batch, val_batch)
    lowered = optimizer.lower_step(*args, problem.train_loss, problem.val_loss)
    memory: Any = lowered.compile().memory_analysis()

    def step(state: Any, batches: Any) -> Any:
        train_batch, val_batch = batches
        return optimizer.step(state, train_batch, val_batch, *losses)

    size = memory.temp_size_in_bytes + memory.argument_size_in_bytes
    return Cost(flops(step, state, batches) / way.inner_steps, size / 2**10)


def posed(world: World, way: Way) -> gradhpo.Problem:
    """Return the problem that a method is given."""
    drawn = "particles" in way.settings
    make = world.smooth if world.smooth is not None and not drawn else world.problem
    return make(way.inner_steps)


def cosines(world: World, given: dict[str, Way], key: jax.Array) -> tuple[dict[str, str], str]:
    """Return each method's cosine to the exact hypergradient through T steps, and the regime."""
    problem = (world.smooth or world.problem)(1)
    start = gradhpo.OneStepOptimizer(world.inner, optax.adam(0.01))
    state = start.init(*problem.start(key))
    if not world.anew:
        state = gradhpo.solve(problem, start, TRAINED, key, progress=False).state
    methods = {name: way(world, optax.adam(1.0)) for name, way in given.items()}
    found = gradhpo.diagnose(
        problem,
        state,
        key,
        methods=methods,
        horizon=world.T,
        samples=world.samples,
        rounds=0,
        progress=False,
    )
    named = {
        row.name: "no direction" if np.isnan(row.cosine).all() else f"{np.mean(row.cosine):.3f}"
        for row in found.rows
    }
    return named, " ".join(found.advice())


def result(world: World, way: Way, steps: int, keys: jax.Array) -> str:
    """Return the judge's value after so many steps, its median over keys."""
    outer = optax.adam(min(RATE, DISTANCE / steps))
    optimizer, problem = way(world, outer), posed(world, way)
    episodes = world.anew or optimizer.draws or isinstance(optimizer, HYPERDISTILL)
    more: dict[str, Any] = {}
    if episodes:
        more = {"episode_length": world.T // way.inner_steps}
        more["lr_reptile"] = 0.0 if world.anew else 1.0
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = gradhpo.solve(problem, optimizer, steps, keys, progress=False, record=[], **more)
    diverged = any(issubclass(w.category, gradhpo.DivergenceWarning) for w in told)
    values = np.asarray(jax.jit(jax.vmap(world.judge))(found.state.hyperparams, found.state.params))
    return f"{np.median(values):.3f}{', diverged' if diverged else ''}"


HYPERDISTILL = gradhpo.OnlineHypergradientOptimizer


def refusal(world: World, way: Way) -> bool:
    """Return whether a method refuses the world: λ that acts through the inner optimizer only."""
    optimizer, problem = way(world, optax.adam(1.0)), posed(world, way)
    key = jax.random.key(0)
    state = optimizer.init(*problem.start(key))
    try:
        losses = (problem.train_loss, problem.val_loss)
        optimizer.lower_step(state, *problem.draw_at(key, 0, None), *losses)
    except ValueError:
        return True
    return False


def table(world: World, budget: int, seeds: int, bar: Any) -> tuple[list[list[str]], str]:
    """Return a row for each method, and what was found of the state."""
    key = jax.random.key(0)
    named = asked(world)
    refused = {name for name, way in named.items() if refusal(world, way)}
    fit = {name: way for name, way in named.items() if name not in refused}
    aligned, regime = cosines(world, fit, key)
    one = cost(world, fit["OneStep"])
    made: list[list[str]] = []
    for name, way in named.items():
        bar.set_postfix_str(f"{world.name}: {name}")
        if name in refused:
            made.append([name, "refused", "", "", ""])
        else:
            own = cost(world, way)
            ratio = own.flops / one.flops
            steps = max(1, round(budget / ratio / way.inner_steps))
            best = result(world, way, steps, jax.random.split(key, seeds))
            made.append([name, aligned[name], f"{ratio:.2f}", f"{own.kib:.1f}", best])
        bar.update()
    return made, regime


def before(world: World) -> str:
    """Return the judge's value at the λ that all start from."""
    params, lam = world.problem(1).start(jax.random.key(0))
    return f"{float(world.judge(lam, params)):.3f}"


def main(
    world: Annotated[list[str] | None, typer.Option(help="Of these worlds only; repeat.")] = None,
    budget: Annotated[int, typer.Option(min=10, help="Steps of One-Step, in FLOPs.")] = 1000,
    seeds: Annotated[int, typer.Option(min=1, help="Of the batches, draws and weights.")] = 3,
    output: Annotated[Path | None, typer.Option(help="Write the tables as Markdown.")] = None,
) -> None:
    """Compare all methods: cosine, FLOPs, memory, and what they find at equal FLOPs."""
    warnings.filterwarnings("ignore", category=gradhpo.UnreachedWarning)
    chosen = [w for w in WORLDS if world is None or w.name in world]
    only = "".join(f" --world {name}" for name in world or ())
    report = Report("Which method where", f"python benchmarks/choose.py{only}")
    report.say(" ".join(TOLD.split()).format(budget=budget, seeds=seeds))
    columns = ["method", "cosine", "FLOPs / One-Step", "KiB", "result"]
    with tqdm(total=sum(len(asked(w)) for w in chosen)) as bar:
        for one in chosen:
            found, regime = table(one, budget, seeds, bar)
            report.table(one.name, columns, found)
            report.say(f"{one.name}: {one.about} Before: {before(one)}. {regime}")
            report.write(output)


TOLD = """
    cosine: to the exact hypergradient through T steps, at a state after 100 steps of One-Step
    (rough: at the start). FLOPs: of an inner step, loops counted as often as they run. KiB: XLA's,
    arguments (state, batches) and temporaries of a step. result: what λ is worth in the end, less
    is better, the median of {seeds} seeds; every method runs for the FLOPs of {budget} steps of
    One-Step, with Adam on λ, whose rate times the steps is 12, and 0.3 at most.
"""

if __name__ == "__main__":
    typer.run(main)
