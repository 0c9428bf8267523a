"""Who is compared on what: the cases, the scripts that do each, and what is known to differ."""

from __future__ import annotations

from typing import NamedTuple


class Peer(NamedTuple):
    """A library, or a way to do without."""

    title: str
    script: str
    environment: str
    """Of `requirements/`."""


PEERS = {
    "gradhpo": Peer("**gradhpo**", "gradhpo_here", "gradhpo"),
    "hand": Peer("JAX by hand", "jax_by_hand", "gradhpo"),
    "0.1.3": Peer("gradhpo 0.1.3", "gradhpo_0_1_3", "gradhpo_0_1_3"),
    "jaxopt": Peer("jaxopt", "jaxopt_implicit", "jaxopt"),
    "torchopt": Peer("TorchOpt", "torchopt_peer", "torch"),
    "func": Peer("torch.func", "torch_func", "torch"),
    "betty": Peer("Betty", "betty_peer", "torch"),
}

OURS = "gradhpo"
"""Whose hypergradients the others are held against, and whose times."""


class Case(NamedTuple):
    """One hypergradient, which several peers compute."""

    title: str
    peers: tuple[str, ...]
    models: tuple[str, ...] = ("mlp", "cnn", "transformer")


CASES = {
    "one-step": Case("One-Step", ("gradhpo", "hand", "0.1.3", "torchopt", "func")),
    "unrolled-5": Case("unrolled, 5 steps", ("gradhpo", "hand", "torchopt", "func")),
    "unrolled-20": Case("unrolled, 20 steps", ("gradhpo", "hand", "torchopt", "func"), ("mlp",)),
    "t1-t2": Case("T1–T2", ("gradhpo", "hand", "0.1.3")),
    "greedy-5": Case("Greedy, 5 steps", ("gradhpo", "hand", "0.1.3"), ("mlp",)),
    "hyperdistill": Case("HyperDistill", ("gradhpo", "0.1.3"), ("mlp",)),
    "first-order": Case("First-Order", ("gradhpo", "0.1.3"), ("mlp",)),
    "darts": Case("implicit, H ≈ 1", ("gradhpo", "hand", "betty")),
    "neumann-10": Case("implicit, Neumann", ("gradhpo", "hand", "torchopt", "betty")),
    "cg-20": Case("implicit, CG", ("gradhpo", "hand", "jaxopt", "torchopt", "betty")),
}

AWAY_FROM_A_MINIMUM = "the Hessian is not positive there, and ours are conjugate residuals"

ANOTHER = {
    ("0.1.3", "t1-t2", ""): "every coordinate of a λ gets the sum of all their derivatives",
    ("betty", "cg-20", ""): "its next direction is taken from the old residual; mended since 0.2.1",
    ("hand", "cg-20", "transformer"): AWAY_FROM_A_MINIMUM,
    ("jaxopt", "cg-20", "transformer"): AWAY_FROM_A_MINIMUM,
    ("torchopt", "cg-20", "transformer"): AWAY_FROM_A_MINIMUM,
}
"""Whose hypergradients are known to be other ones, on a model or on all, and why.

They are measured all the same, for the work is of the same kind; it is told if they agree.
"""

ROUGHER = {("betty", "darts"): 1e-2}
"""Whose hypergradients may be further away than the others', being differences in float32."""

FIRST_LOSS = {
    ("0.1.3", "first-order"): "it never keeps its inner optimizer's state",
    ("0.1.3", "one-step"): "it never keeps its inner optimizer's state",
    ("0.1.3", "t1-t2"): "its λ goes elsewhere",
}
"""Whose validation losses agree at the first step alone, and why."""


def checked_losses(peer: str, case: str) -> int:
    """Return how many of the first validation losses must agree."""
    return 1 if (peer, case) in FIRST_LOSS else 5


def why_another(peer: str, case: str, model: str) -> str | None:
    """Return why a peer's hypergradient is known to be another one; None where it must agree."""
    return ANOTHER.get((peer, case, model)) or ANOTHER.get((peer, case, ""))
