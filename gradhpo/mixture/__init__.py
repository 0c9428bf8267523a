"""Data mixtures: weights of training domains on the simplex, tuned by hypergradients or without."""

from gradhpo.mixture.comparison import (
    Comparison,
    compare,
    mean_weights,
    rank_correlation,
    search_flops,
    training_flops,
)
from gradhpo.mixture.group_dro import group_dro
from gradhpo.mixture.problem import Mixture
from gradhpo.mixture.simplex import entropic_descent, scale_by_spread, softmax_descent
from gradhpo.mixture.swarm import predicted_best, simplex_grid, train_fixed

__all__ = [
    "Comparison",
    "Mixture",
    "compare",
    "entropic_descent",
    "group_dro",
    "mean_weights",
    "predicted_best",
    "rank_correlation",
    "scale_by_spread",
    "search_flops",
    "simplex_grid",
    "softmax_descent",
    "train_fixed",
    "training_flops",
]
