"""The methods of gradhpo by name, with the settings that the board gives its own solvers."""

import functools

import optax

import gradhpo

INNER_STEPS = 10
"""Of a step of the methods that unroll, as the board's own have it."""
FALLING = {"soba": 0.5, "masoba": 0.5, "f2sa": 4 / 7}
"""How the rates fall with the steps, of those that the board's own let fall: as `t^-a`."""
EVERY_BATCH = ("f2sa", "greedy", "implicit", "unrolled")
"""What takes a stack of batches, one for each inner step."""
ALL_DATA = ("bome",)
CALLS = {
    **dict.fromkeys(("soba", "masoba", "saba"), 3 + 2),
    **dict.fromkeys(("one-step", "hyperdistill"), 2 + 2),
    "f2sa": 3 * INNER_STEPS + 3,
    "greedy": 3 * INNER_STEPS + 1,
    "implicit": 2 * INNER_STEPS + 1 + 2,
    "unrolled": 3 * INNER_STEPS + 2,
    "bome": (INNER_STEPS + 3, 2),
}
"""Of oracles in a step: a gradient in w or λ, a product with the Hessian or the mixed derivative,
each of one batch; for BOME, of all training and of all validation data."""


def optimizer_of(method, step_size, outer_ratio, train_batches, val_batches):
    """Return a method by its name, with the settings that the board gives its own."""
    unrolled = {"unroll_steps": INNER_STEPS, "batches": "stack"}
    neumann = {"solver": "neumann", "K": INNER_STEPS, "neumann_rate": step_size}
    inner = _rate(step_size, FALLING.get(method, 0), INNER_STEPS if method == "f2sa" else 1)
    given = (optax.sgd(inner), optax.sgd(_rate(step_size / outer_ratio, FALLING.get(method, 0))))
    counts = {"train_batches": train_batches, "val_batches": val_batches}
    made = {
        "soba": gradhpo.SOBAOptimizer,
        "masoba": gradhpo.MASOBAOptimizer,
        "saba": functools.partial(gradhpo.SABAOptimizer, **counts),
        "f2sa": functools.partial(gradhpo.F2SAOptimizer, **unrolled, growth=0.01),
        "bome": gradhpo.BOMEOptimizer,
        "implicit": functools.partial(gradhpo.ImplicitOptimizer, **unrolled, **neumann),
        "one-step": gradhpo.OneStepOptimizer,
        "hyperdistill": functools.partial(gradhpo.OnlineHypergradientOptimizer, gamma=0.9),
        "greedy": functools.partial(gradhpo.GreedyOptimizer, **unrolled),
        "unrolled": functools.partial(gradhpo.UnrolledOptimizer, **unrolled),
    }
    return made[method](*given)


def _rate(first, exponent, steps=1):
    """Return a rate that falls with the count of outer steps, `steps` inner ones each."""
    if not exponent:
        return first
    return lambda count: first / (count // steps + 1.0) ** exponent
