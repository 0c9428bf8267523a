"""Samplers: where the settings of new trials come from, when it is not the space's own draw.

A sampler has one method, `ask(space, history, rng, n)`: a function of what it is given, so that a
sweep that is gone on with asks nothing again that it was told, and is told the same.
"""

from gradhpo.cluster.samplers.asking import Sampler
from gradhpo.cluster.samplers.drawn import Drawn
from gradhpo.cluster.samplers.optuna_sampler import OptunaSampler

__all__ = [
    "Drawn",
    "OptunaSampler",
    "Sampler",
]
