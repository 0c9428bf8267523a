"""Distributions as Optuna has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gradhpo.cluster.discrete import Categorical, Choice, Integer
from gradhpo.cluster.distributions import Distribution, Uniform
from gradhpo.cluster.numbers_of import number_bounds


def kind_of(optuna: Any, about: Distribution, values: Sequence[float] = ()) -> Any:
    """Return the distribution of a setting, wide enough for some values that it had."""
    kinds = optuna.distributions
    if isinstance(about, Choice | Categorical) and set(values) <= set(about.values):
        return kinds.CategoricalDistribution(about.values)
    bounds = number_bounds(about)
    low, high = min(*bounds, *values), max(*bounds, *values)  # hypergradients may lead out
    log = isinstance(about, Uniform | Integer) and about.log and low > 0
    if isinstance(about, Integer) and all(value == round(value) for value in values):
        return kinds.IntDistribution(int(low), int(high), log=log)
    return kinds.FloatDistribution(low, high, log=log)
