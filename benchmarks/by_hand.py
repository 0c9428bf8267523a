"""Each method's step written by hand for one optimizer and one pair of losses: the yardstick.

What a careful user would write without this library, in one function that XLA can fuse. A step maps
`(w, s, λ, outer state, memory, t)` to the same, with the two losses.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

GAMMA = 0.99
GREEDY_GAMMA = 0.9
UNROLL = 5


def steps(  # noqa: PLR0915
    train_loss: Any, val_loss: Any, inner: Any, outer: Any
) -> dict[str, Callable[..., Any]]:
    """Return `name -> step`; each takes `(carry, train_batch, val_batch)`."""

    def phi(w: Any, s: Any, lam: Any, batch: Any) -> Any:
        loss, gradient = jax.value_and_grad(train_loss)(w, lam, batch)
        updates, s = inner.update(gradient, s, w)
        return optax.apply_updates(w, updates), (s, loss)

    def validate(w: Any, lam: Any, batch: Any) -> Any:
        return jax.value_and_grad(val_loss, argnums=(0, 1))(w, lam, batch)

    def finish(g: Any, w: Any, s: Any, lam: Any, o: Any, memory: Any, t: Any, *losses: Any) -> Any:
        updates, o = outer.update(g, o, lam)
        return (w, s, optax.apply_updates(lam, updates), o, memory, t + 1), losses

    def plain(carry: Any, batch: Any, val_batch: Any) -> Any:
        del val_batch
        w, s, lam, o, memory, t = carry
        w, (s, loss) = phi(w, s, lam, batch)
        return (w, s, lam, o, memory, t + 1), (loss, loss)

    def first_order(carry: Any, batch: Any, val_batch: Any) -> Any:
        w, s, lam, o, memory, t = carry
        w, (s, loss) = phi(w, s, lam, batch)
        val, (_, direct) = validate(w, lam, val_batch)
        return finish(direct, w, s, lam, o, memory, t, loss, val)

    def one_step(carry: Any, batch: Any, val_batch: Any) -> Any:
        w, s, lam, o, memory, t = carry
        w, pull, (s, loss) = jax.vjp(lambda lam: phi(w, s, lam, batch), lam, has_aux=True)
        val, (alpha, direct) = validate(w, lam, val_batch)
        g = optax.tree.add(direct, pull(alpha)[0])
        return finish(g, w, s, lam, o, memory, t, loss, val)

    def t1t2(carry: Any, batch: Any, val_batch: Any) -> Any:
        w, s, lam, o, memory, t = carry
        loss, gradient = jax.value_and_grad(train_loss)(w, lam, batch)

        def move(gradient: Any) -> Any:
            updates, new = inner.update(gradient, s, w)
            return optax.apply_updates(w, updates), new

        new_w, pull, new_s = jax.vjp(move, gradient, has_aux=True)
        val, (alpha, direct) = validate(new_w, lam, val_batch)
        (u,) = pull(alpha)
        eps = 0.01 / optax.tree.norm(u)
        d_lambda = jax.grad(train_loss, argnums=1)
        plus = d_lambda(optax.tree.add_scale(w, eps, u), lam, batch)
        minus = d_lambda(optax.tree.add_scale(w, -eps, u), lam, batch)
        slope = optax.tree.scale(0.5 / eps, optax.tree.sub(plus, minus))
        g = optax.tree.add(direct, slope)
        return finish(g, new_w, new_s, lam, o, memory, t, loss, val)

    def greedy(carry: Any, batch: Any, val_batch: Any) -> Any:
        w, s, lam, o, memory, t = carry

        def inner_step(w: Any, s: Any, total: Any) -> Any:
            w, pull, (s, loss) = jax.vjp(lambda lam: phi(w, s, lam, batch), lam, has_aux=True)
            val, (alpha, direct) = validate(w, lam, val_batch)
            total = optax.tree.add_scale(pull(alpha)[0], GREEDY_GAMMA, total)
            return (w, s, total), (loss, val, direct)

        def body(carry: Any, _: Any) -> Any:
            return inner_step(*carry)[0], None

        start = (w, s, optax.tree.zeros_like(lam))
        before, _ = jax.lax.scan(body, start, length=UNROLL - 1)
        (w, s, total), (loss, val, direct) = inner_step(*before)
        return finish(optax.tree.add(direct, total), w, s, lam, o, memory, t, loss, val)

    def hyperdistill(carry: Any, batch: Any, val_batch: Any) -> Any:
        w, s, lam, o, (w_star, theta), t = carry
        n = (t + 1).astype(jnp.float32)
        keep = GAMMA * jnp.expm1((n - 1) * math.log(GAMMA)) / jnp.expm1(n * math.log(GAMMA))
        w_star = jax.tree.map(lambda a, b: jnp.where(keep == 0, b, b + keep * (a - b)), w_star, w)
        new_w, (new_s, loss) = phi(w, s, lam, batch)
        _, pull, _ = jax.vjp(lambda lam: phi(w_star, s, lam, batch), lam, has_aux=True)
        val, (alpha, direct) = validate(new_w, lam, val_batch)
        factor = theta * -jnp.expm1(n * math.log(GAMMA)) / (1 - GAMMA)
        g = optax.tree.add_scale(direct, factor, pull(alpha)[0])
        return finish(g, new_w, new_s, lam, o, (w_star, theta), t, loss, val)

    return {
        "plain training": plain,
        "First-Order": first_order,
        "One-Step": one_step,
        "T1-T2": t1t2,
        f"Greedy, {UNROLL} steps": greedy,
        "HyperDistill": hyperdistill,
    }


def start(params: Any, hyperparams: Any, inner: Any, outer: Any) -> Any:
    """Return the first carry."""
    memory = (params, jnp.ones(()))
    states = inner.init(params), outer.init(hyperparams)
    return params, states[0], hyperparams, states[1], memory, jnp.zeros((), jnp.int32)
