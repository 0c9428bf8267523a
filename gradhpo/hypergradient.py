"""What the hypergradients are made of: the validation gradients, and α·∂Φ/∂λ.

Where Φ is an optimizer on a training loss, `α·∂Φ/∂λ = ∇_λ ⟨u, ∇_w L_train⟩ + (∂Ψ/∂λ)ᵀα`, with u the
vector α pulled back through the optimizer Ψ: exact by mixed modes, or by differences.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from gradhpo.branches import anywhere
from gradhpo.forward_mode import refuse_custom_vjp
from gradhpo.state import PyTree
from gradhpo.task import Carried, Task

Loss: TypeAlias = Callable[[PyTree, PyTree], jax.Array]
"""A loss as a function of the weights and λ alone."""

EXACT = jax.lax.Precision.HIGHEST
"""Of products that are inverted: an accelerator's default would be too coarse."""

Mode: TypeAlias = Literal[
    "auto", "reverse-over-reverse", "forward-over-reverse", "reverse-over-forward"
]
"""How `α·∂Φ/∂λ` is taken; equal in exact arithmetic."""

MODES = ("auto", "reverse-over-reverse", "forward-over-reverse", "reverse-over-forward")


class Validation(NamedTuple):
    """The validation loss at `(w_t, λ)` and its two gradients."""

    loss: jax.Array
    alpha: PyTree
    """`α_t = ∂L_val/∂w`."""
    direct: PyTree
    """`g_FO = ∂L_val/∂λ`."""
    metrics: dict[str, jax.Array]
    """What else the validation loss returned, by its full name."""


def validation(task: Task, params: PyTree, carried: Carried, hyperparams: PyTree) -> Validation:
    """Return the validation loss after a step with `α` and `g_FO`, from one backward pass."""

    def loss_fn(params: PyTree, hyperparams: PyTree) -> tuple[jax.Array, dict[str, jax.Array]]:
        return task.validate(params, carried, hyperparams)

    gradient_of = jax.value_and_grad(loss_fn, argnums=(0, 1), has_aux=True)
    (loss, metrics), (alpha, direct) = gradient_of(params, hyperparams)
    return Validation(loss, alpha, direct, metrics)


def second_order(
    loss_fn: Loss,
    params: PyTree,
    hyperparams: PyTree,
    u: PyTree,
    loss_bar: jax.Array | None,
    mode: Mode,
    argnums: tuple[int, ...],
) -> tuple[PyTree, ...]:
    """Return `∇ [⟨u, ∇_w L⟩ + l̄ L]` in the weights (argnum 0) and λ (argnum 1), by a mixed mode.

    "forward-over-reverse" is the derivative of ∇L along u in w; "reverse-over-forward" the gradient
    of L's derivative along u. The term of `loss_bar`, l̄, is left out where it is None.
    """
    if mode == "forward-over-reverse":

        def gradient(w: PyTree) -> tuple[PyTree, ...]:
            # In both arguments, whatever is asked for: an operation with a VJP of its own has no
            # forward mode, but what reverse mode makes of it has.
            both = jax.grad(loss_fn, (0, 1))(w, hyperparams)
            return tuple(both[i] for i in argnums)

        first, along = jax.jvp(gradient, (params,), (u,))
        return along if loss_bar is None else optax.tree.add_scale(along, loss_bar, first)

    def slope(params: PyTree, hyperparams: PyTree) -> jax.Array:
        loss, along = jax.jvp(lambda w: loss_fn(w, hyperparams), (params,), (u,))
        return along if loss_bar is None else along + loss_bar * loss

    instead = 'mode="forward-over-reverse"'
    refuse_custom_vjp(f"mode={mode!r}", instead, jax.grad(slope, argnums), params, hyperparams)
    return jax.grad(slope, argnums)(params, hyperparams)


def norm(tree: PyTree) -> jax.Array:
    """Return the Euclidean norm of a tree, accumulated in float32 or better."""
    return optax.tree.norm(at_least_float32(tree))


def at_least_float32(tree: PyTree) -> PyTree:
    """Return `tree` with leaves of lower precision widened to float32."""
    return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)


def exact_product(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return `a @ b` in the arrays' own precision, on accelerators too."""
    return jnp.matmul(a, b, precision=EXACT)


def gradient_difference(
    gradient: Callable[[PyTree], PyTree], params: PyTree, u: PyTree, eps: float | None
) -> PyTree:
    """Return `(∂g/∂w)·u` for `g = gradient(params)`, by central differences along `u`.

    `[g(w + εu) - g(w - εu)] / 2ε` with `ε = 0.01/‖u‖₂` unless given (Liu et al. 2019, eq. 7-8).
    A zero or infinite `u`, which leaves no usable ε, gives zero. Weights of low precision are
    shifted in float32; where `g` takes them in their own precision only, ε is the cube root of its
    machine epsilon over `‖u‖₂`.
    """
    length = norm(u)
    usable = (length > 0) & jnp.isfinite(length)
    wide = _widest(gradient, params)
    machine = max(float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(wide))
    distance = max(0.01, machine ** (1 / 3))
    step = jnp.where(usable, distance / jnp.where(usable, length, 1), 0) if eps is None else eps
    step = jnp.where(usable, step, 0).astype(length.dtype)

    def shifted(signed_step: jax.Array) -> PyTree:
        return jax.tree.map(lambda w, d: (w + signed_step * d).astype(w.dtype), wide, u)

    ahead, behind = shifted(step), shifted(-step)
    moved = jax.tree.reduce(
        jnp.logical_or, jax.tree.map(lambda a, b: jnp.any(a != b), ahead, behind)
    )
    usable = (step > 0) & moved
    inverse = jnp.where(usable, 0.5 / jnp.where(usable, step, 1), 0)
    plus, minus = gradient(ahead), gradient(behind)

    def slope(a: jax.Array, b: jax.Array) -> jax.Array:
        # A NaN in α must be seen, and not turned into the zero of a missing ε.
        return ((a - b) * jnp.where(jnp.isnan(length), length, inverse)).astype(a.dtype)

    return jax.tree.map(slope, plus, minus)


def mixed_difference(
    loss_fn: Loss,
    params: PyTree,
    hyperparams: PyTree,
    u: PyTree,
    train_gradient: PyTree,
    eps: float | None,
) -> PyTree:
    """Return `∇_λ ⟨u, ∇_w L⟩` by a difference along `u`, and exactly along its outsized part.

    Adam divides by 1e-8 for a weight that has never had a gradient, such as an embedding row that
    no batch has used: there `u` is out of all proportion, and would take the whole step of a
    difference, so that nothing of the rest is left after rounding. Most often the mixed derivative
    is 0 there, but not where λ = 0 switches a term of the loss off. A difference of its own would
    turn rounding into a number as large as `u`, so that part is taken by "forward-over-reverse",
    and only where there is such a weight, in any slot of a population.
    """

    def grad_lambda(w: PyTree) -> PyTree:
        return jax.grad(loss_fn, argnums=1)(w, hyperparams)

    live, outsized = _in_two_parts(u, train_gradient)
    rest = gradient_difference(grad_lambda, params, live, eps)

    def added() -> PyTree:
        point = (params, hyperparams, outsized, None)
        (exact,) = second_order(loss_fn, *point, "forward-over-reverse", (1,))
        return optax.tree.add(rest, exact)

    there = jax.tree.reduce(jnp.logical_or, jax.tree.map(lambda d: jnp.any(d != 0), outsized))
    return jax.lax.cond(anywhere(there), added, lambda: rest)


def _in_two_parts(u: PyTree, gradient: PyTree) -> tuple[PyTree, PyTree]:
    """Return `u` with 0 where the gradient is 0 and `u` is out of all proportion, and the rest."""

    def largest(u: jax.Array, g: jax.Array) -> jax.Array:
        return jnp.max(jnp.where(g == 0, 0, jnp.abs(u)), initial=0)

    live = jax.tree.map(largest, u, gradient)
    most = jax.tree.reduce(jnp.maximum, at_least_float32(live))

    def outsized(u: jax.Array, g: jax.Array) -> jax.Array:
        return (g == 0) & (most > 0) & (jnp.abs(u) > 1000 * most)

    masks = jax.tree.map(outsized, u, gradient)
    parts = jax.tree.map(lambda m, u: (jnp.where(m, 0, u), jnp.where(m, u, 0)), masks, u)
    return jax.tree.transpose(jax.tree.structure(u), None, parts)


def _widest(gradient: Callable[[PyTree], PyTree], params: PyTree) -> PyTree:
    """Return the weights in float32 or better, or as they are where `gradient` refuses that."""
    wide = at_least_float32(params)
    same = jax.tree.map(lambda a, b: a.dtype == b.dtype, wide, params)
    if all(jax.tree.leaves(same)):
        return params
    try:
        jax.eval_shape(gradient, wide)
    except (TypeError, ValueError):  # a convolution, or the carry of a scan, of one dtype
        return params
    return wide


def coordinate_differences(
    phi: Callable[[PyTree], PyTree],
    alpha: PyTree,
    hyperparams: PyTree,
    eps: float | None,
    chunk: int | None = None,
) -> PyTree:
    """Return `α·∂Φ/∂λ` by central differences on λ, one coordinate at a time.

    `α·∂Φ/∂λ_i ≈ ⟨α, Φ(λ + ε_i e_i) - Φ(λ - ε_i e_i)⟩ / 2ε_i`, for every coordinate of every leaf:
    2·dim(λ) evaluations of Φ. `ε_i` is `eps`, or the cube root of the machine epsilon (of λ or of
    the weights, whichever is larger) times `max(1, |λ_i|)`. A step lost in rounding gives zero.
    """
    coarsest = max(float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(alpha))

    def shift(leaf: jax.Array, here: jax.Array, sign: int) -> jax.Array:
        machine = max(float(jnp.finfo(leaf.dtype).eps), coarsest) ** (1 / 3)
        width = machine * jnp.maximum(1, jnp.abs(leaf)) if eps is None else eps
        return jnp.where(here, (leaf + sign * width).astype(leaf.dtype), leaf)

    def slope(here: PyTree) -> jax.Array:
        plus = jax.tree.map(lambda leaf, mask: shift(leaf, mask, 1), hyperparams, here)
        minus = jax.tree.map(lambda leaf, mask: shift(leaf, mask, -1), hyperparams, here)
        # The distance really moved, after rounding: only one coordinate differs.
        moved = jax.tree.map(lambda a, b: jnp.sum(a.astype(float) - b), plus, minus)
        distance = jnp.sum(jnp.stack(jax.tree.leaves(moved)))
        change = optax.tree.sub(phi(plus), phi(minus))
        rise = optax.tree.vdot(at_least_float32(alpha), at_least_float32(change))
        return jnp.where(distance == 0, 0, rise / jnp.where(distance == 0, 1, distance))

    return over_coordinates(slope, hyperparams, alpha, chunk)


def over_coordinates(
    function: Callable[[PyTree], jax.Array],
    hyperparams: PyTree,
    params: PyTree,
    chunk: int | None = None,
) -> PyTree:
    """Return a tree shaped like λ of `function(here)`, `here` being True at one coordinate of λ.

    `chunk` coordinates are evaluated together: by default as many as hold about 4 Mi weights, and
    no more than 64, so that memory is bounded.
    """
    leaves, structure = jax.tree.flatten(hyperparams)
    sizes = [leaf.size for leaf in leaves]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    chunk = chunk or max(1, min(64, 2**22 // max(1, optax.tree.size(params))))

    def at(index: jax.Array) -> jax.Array:
        masks: list[Any] = [
            jnp.arange(leaf.size).reshape(leaf.shape) + start == index
            for leaf, start in zip(leaves, starts, strict=True)
        ]
        return function(structure.unflatten(masks))

    values = jax.lax.map(at, jnp.arange(sum(sizes)), batch_size=min(chunk, sum(sizes)))
    parts: list[Any] = [
        values[start : start + leaf.size].reshape(leaf.shape).astype(leaf.dtype)
        for leaf, start in zip(leaves, starts, strict=True)
    ]
    return structure.unflatten(parts)
