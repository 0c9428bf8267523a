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
    return spanning(optuna, [about], values)


def spanning(optuna: Any, several: Sequence[Distribution], values: Sequence[float]) -> Any:
    """Return one distribution of numbers that holds all of several, and some values."""
    kinds = optuna.distributions
    bounds = [x for one in several for x in number_bounds(one)]
    low, high = min(*bounds, *values), max(*bounds, *values)  # hypergradients may lead out
    log = low > 0 and all(isinstance(one, Uniform | Integer) and one.log for one in several)
    whole = all(isinstance(one, Integer) for one in several)
    if whole and all(value == round(value) for value in values):
        return kinds.IntDistribution(int(low), int(high), log=log)
    return kinds.FloatDistribution(low, high, log=log)
