"""Mirror descent on the simplex with negative entropy, the exponentiated gradient, for optax.

`p_i ← p_i exp(-η g_i) / Σ_j p_j exp(-η g_j)` (Kivinen & Warmuth 1997; Beck & Teboulle 2003).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from gradhpo.errors import check_number
from gradhpo.state import PyTree

Rate: TypeAlias = float | Callable[[Any], Any]
TINY = 1e-30
"""Below what is taken for 0, so that a logarithm is finite."""


class EntropicState(NamedTuple):
    """The state of `entropic_descent`."""

    step: jax.Array
    """Steps taken, `()`."""


def entropic_descent(
    learning_rate: Rate, *, floor: float = 0.0, smoothing: float = 0.0
) -> optax.GradientTransformation:
    """Return mirror descent on the simplex, as an optax transformation.

    Each leaf is a point of the simplex, `(domains,)`; it stays there. A step is the exponentiated
    gradient, then a mixture with uniform weights (`smoothing`), then the nearest point with no
    weight below `floor`, in the sense of the Kullback-Leibler divergence.

    Args:
      learning_rate: η, by how much the logarithm of a weight moves for a gradient of 1: a number,
        or an optax schedule. `scale_by_spread` before it gives gradients of about 1.
      floor: the least weight of a domain, below one over the number of domains.
      smoothing: c in [0, 1): `p ← (1 - c) p + c / domains` after each step, which draws all domains
        toward uniform; DoReMi's.

    Returns:
      An optax transformation whose `update` needs the parameters.

    Raises:
      ValueError: for a number out of range; at `init`, if the floor leaves no room for the domains.

    References:
      Kivinen & Warmuth, Exponentiated Gradient versus Gradient Descent for Linear Predictors, 1997.
      Beck & Teboulle, Mirror Descent and Nonlinear Projected Subgradient Methods for Convex
      Optimization, 2003. Herbster & Warmuth, Tracking the Best Linear Predictor, 2001 (the
      projection). Xie et al., DoReMi, NeurIPS 2023 (smoothing).
    """
    floor = check_number("floor", floor, 0, 1)
    smoothing = check_number("smoothing", smoothing, 0, 1)
    if not callable(learning_rate):
        learning_rate = check_number("learning_rate", learning_rate, 0, float("inf"))

    def init(params: PyTree) -> EntropicState:
        jax.tree.map(lambda p: check_floor(floor, p.shape[-1]), params)
        return EntropicState(jnp.zeros((), jnp.int32))

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        if params is None:
            raise ValueError(
                "entropic_descent needs the parameters: update(updates, state, params)"
            )
        rate = learning_rate(state.step) if callable(learning_rate) else learning_rate

        def move(g: jax.Array, p: jax.Array) -> jax.Array:
            new = jax.nn.softmax(jnp.log(jnp.maximum(p, TINY)) - rate * g)
            new = (1 - smoothing) * new + smoothing / p.shape[-1]
            return (raised(new, floor) - p).astype(p.dtype)

        return jax.tree.map(move, updates, params), EntropicState(state.step + 1)

    return optax.GradientTransformation(init, update)


class SpreadState(NamedTuple):
    """The state of `scale_by_spread`."""

    step: jax.Array
    """Steps taken, `()`."""
    square: PyTree
    """For each leaf the running mean of the squared spread, `()`."""


def scale_by_spread(decay: float = 0.99) -> optax.GradientTransformation:
    """Return a transformation that measures a gradient by its own size, one number for a leaf.

    The mean over the domains is taken off, which moves nothing on the simplex, and what is left is
    divided by the root of its running mean square. As RMSProp, but with one scale for all domains:
    with one for each, a domain that hardly matters would move as fast as one that does.

    Args:
      decay: of the running mean, in [0, 1).

    Returns:
      An optax transformation, to be chained before `entropic_descent`.

    Raises:
      ValueError: for a decay out of range.
    """
    decay = check_number("decay", decay, 0, 1)
    if decay == 1:
        raise ValueError("decay must be below 1, got 1")

    def init(params: PyTree) -> SpreadState:
        zeros = jax.tree.map(lambda p: jnp.zeros((), p.dtype), params)
        return SpreadState(jnp.zeros((), jnp.int32), zeros)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        del params
        centred = jax.tree.map(lambda g: g - g.mean(), updates)
        square = jax.tree.map(
            lambda g, v: decay * v + (1 - decay) * jnp.mean(g**2), centred, state.square
        )
        step = state.step + 1

        def scaled(g: jax.Array, v: jax.Array) -> jax.Array:
            v = v / (1 - jnp.asarray(decay, v.dtype) ** step)
            return jnp.where(v > 0, g * jax.lax.rsqrt(jnp.where(v > 0, v, 1)), 0)

        return jax.tree.map(scaled, centred, square), SpreadState(step, square)

    return optax.GradientTransformation(init, update)


def softmax_descent(
    optimizer: optax.GradientTransformation, *, floor: float = 0.0
) -> optax.GradientTransformation:
    """Return an optimizer of the logits of weights on the simplex, as an optax transformation.

    `p = floor + (1 - domains·floor)·softmax(z)`, and the given optimizer moves z.

    Args:
      optimizer: any `optax.GradientTransformation`, such as `optax.adam(0.02)`.
      floor: the least weight of a domain, below one over the number of domains.

    Returns:
      An optax transformation whose leaves are weights `(domains,)` on the simplex.

    Raises:
      ValueError: for a floor out of range.
    """
    floor = check_number("floor", floor, 0, 1)

    def shares(p: jax.Array) -> jax.Array:
        """Return the softmax that weights are made of."""
        left = 1 - p.shape[-1] * floor
        share = jnp.maximum((p - floor) / left, TINY)
        return share / share.sum()

    def logits(p: jax.Array) -> jax.Array:
        return jnp.log(shares(p))

    def init(params: PyTree) -> Any:
        jax.tree.map(lambda p: check_floor(floor, p.shape[-1]), params)
        return optimizer.init(jax.tree.map(logits, params))

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        if params is None:
            raise ValueError("softmax_descent needs the parameters: update(updates, state, params)")

        def pulled(g: jax.Array, p: jax.Array) -> jax.Array:
            s = shares(p)
            return (1 - p.shape[-1] * floor) * s * (g - s @ g)

        z = jax.tree.map(logits, params)
        moves, state = optimizer.update(jax.tree.map(pulled, updates, params), state, z)

        def move(z: jax.Array, dz: jax.Array, p: jax.Array) -> jax.Array:
            new = floor + (1 - p.shape[-1] * floor) * jax.nn.softmax(z + dz)
            return (new - p).astype(p.dtype)

        return jax.tree.map(move, z, moves, params), state

    return optax.GradientTransformation(init, update)


def raised(p: jax.Array, floor: float) -> jax.Array:
    """Return the point with no weight below the floor that has the least KL divergence from `p`.

    Weights below it become the floor, and the others are scaled, by one number, to what is left.
    """
    if floor == 0:
        return p
    ascending = jnp.sort(p)
    left = 1 - floor * jnp.arange(p.shape[-1])
    scale = left / jnp.cumsum(ascending[::-1])[::-1]
    fits = scale * ascending >= floor
    fits = fits.at[-1].set(True)
    return jnp.maximum(scale[jnp.argmax(fits)] * p, floor)


def check_floor(floor: float, domains: int) -> None:
    """Raise if a floor leaves no room for so many domains."""
    if floor * domains >= 1:
        raise ValueError(f"floor must be below 1/{domains} for {domains} domains, got {floor}")
