"""What a name in the table of `diagnose` is in code."""

from __future__ import annotations

FIXED = {
    "first-order": "FOOptimizer(inner_optimizer)",
    "one-step": "OneStepOptimizer(inner_optimizer)",
    "t1t2": "T1T2Optimizer(inner_optimizer)",
    "drmad": "DrMADOptimizer(inner_optimizer, unroll_steps={T})",
    "exact": "UnrolledOptimizer(inner_optimizer, unroll_steps={T})",
    "es": "ESOptimizer(inner_optimizer, unroll_steps={T})",
    "pes": "PESOptimizer(inner_optimizer, unroll_steps={window})",
    "nres": "NRESOptimizer(inner_optimizer, unroll_steps={window})",
    "forward-gradient": (
        "ForwardGradientOptimizer(inner_optimizer, unroll_steps={T}, directions={directions})"
    ),
    "soba": "SOBAOptimizer(inner_optimizer)",
    "masoba": "MASOBAOptimizer(inner_optimizer)",
    "f2sa": "F2SAOptimizer(inner_optimizer, unroll_steps={window})",
    "implicit cg": "ImplicitOptimizer(inner_optimizer, unroll_steps={T}), K and damping as above",
    "implicit nystrom": (
        'ImplicitOptimizer(inner_optimizer, unroll_steps={T}, solver="nystrom"), K and damping as '
        "above"
    ),
}
WITH_NUMBER = {
    "greedy γ": "GreedyOptimizer(inner_optimizer, outer_optimizer, unroll_steps={T}, gamma={n})",
    "hyperdistill γ": "OnlineHypergradientOptimizer(inner_optimizer, gamma={n}, T={T})",
    "unrolled": "UnrolledOptimizer(inner_optimizer, unroll_steps={n})",
}
WINDOWS = 5
"""In how many the horizon is divided for "pes", "nres" and "f2sa"."""

DIRECTIONS = 16
"""How many "forward-gradient" takes."""


def in_code(name: str, T: int) -> str | None:
    """Return how a method of `diagnose` is made, by its name there; None for a name of one's own.

    Args:
      name: of a row.
      T: the horizon.
    """
    head, _, number = name.replace("=", " ").rpartition(" ")
    written = FIXED.get(name) or WITH_NUMBER.get(head)
    if written is None:
        return None
    fixed = {"window": max(1, T // WINDOWS), "directions": DIRECTIONS}
    return "gradhpo." + written.format(T=T, n=number, **fixed)
