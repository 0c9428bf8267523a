"""JAX and optax, each method written by hand in one jitted function."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import jax_models
import optax
from serving import Run, serve

# peer: all
INNER, OUTER = optax.adam(1e-3, eps=1e-3, eps_root=1e-16), optax.adam(1e-2)


def moved(train_loss, w, s, lam, batch):
    updates, s = INNER.update(jax.grad(train_loss)(w, lam, batch), s, w)
    return optax.apply_updates(w, updates), s


# end
# peer: one-step
def one_step(train_loss, val_loss, w, s, lam, train, val):
    w, pull, s = jax.vjp(lambda lam: moved(train_loss, w, s, lam, train), lam, has_aux=True)
    loss, alpha = jax.value_and_grad(val_loss)(w, lam, val)
    return loss, pull(alpha)[0], w, s


# end
# peer: t1-t2
def t1_t2(train_loss, val_loss, w, s, lam, train, val):
    def update(gradient):
        updates, new = INNER.update(gradient, s, w)
        return optax.apply_updates(w, updates), new

    new_w, pull, s = jax.vjp(update, jax.grad(train_loss)(w, lam, train), has_aux=True)
    loss, alpha = jax.value_and_grad(val_loss)(new_w, lam, val)
    (u,) = pull(alpha)
    eps = 0.01 / optax.tree.norm(u)
    plus, minus = (
        jax.grad(train_loss, argnums=1)(optax.tree.add_scale(w, sign * eps, u), lam, train)
        for sign in (1, -1)
    )
    return loss, (plus - minus) / (2 * eps), new_w, s


# end
# peer: greedy-5
def greedy(train_loss, val_loss, w, s, lam, train, val):
    total = jnp.zeros_like(lam)
    for _ in range(5):
        loss, g, w, s = one_step(train_loss, val_loss, w, s, lam, train, val)
        total = 0.9 * total + g
    return loss, total, w, s


# end
# peer: unrolled-5 unrolled-20
def unrolled(train_loss, val_loss, w, s, lam, train, val):
    def objective(lam, w, s):
        for t in range(len(train["y"])):
            batch = {name: rows[t] for name, rows in train.items()}
            w, s = moved(train_loss, w, s, lam, batch)
        return val_loss(w, lam, val), (w, s)

    (loss, (w, s)), g = jax.value_and_grad(objective, has_aux=True)(lam, w, s)
    return loss, g, w, s


# end
# peer: darts neumann-10 cg-20
def implicit(train_loss, val_loss, w, s, lam, train, val, solve):
    w, s = moved(train_loss, w, s, lam, train)
    loss, alpha = jax.value_and_grad(val_loss)(w, lam, val)
    _, hessian = jax.linearize(lambda w: jax.grad(train_loss)(w, lam, train), w)
    x = solve(hessian, alpha)
    _, pull = jax.vjp(lambda lam: jax.grad(train_loss)(w, lam, train), lam)
    return loss, -pull(x)[0], w, s


# end
# peer: darts neumann-10
def neumann(hessian, alpha, K, eta):
    power = total = alpha
    for _ in range(K - 1):
        power = optax.tree.add_scale(power, -eta, hessian(power))
        total = optax.tree.add(total, power)
    return optax.tree.scale(eta, total)


# end


def method(case):
    match case:
        case "one-step":
            return one_step
        case "t1-t2":
            return t1_t2
        case "greedy-5":
            return greedy
        case "unrolled-5" | "unrolled-20":
            return unrolled
        case "darts" | "neumann-10":
            K, eta = (1, 1.0) if case == "darts" else (10, 0.1)
            return lambda *args: implicit(*args, lambda H, alpha: neumann(H, alpha, K, eta))
        case "cg-20":
            # peer: cg-20
            def cg(hessian, alpha):
                return jax.scipy.sparse.linalg.cg(hessian, alpha, tol=0.0, maxiter=20)[0]

            return lambda *args: implicit(*args, cg)
            # end
    raise ValueError(f"no such case: {case}")


def start(model, case, inputs):
    problem, estimate = jax_models.Problem(model, inputs), method(case)
    unroll = int(case.split("-")[1]) if case.startswith("unrolled") else None

    # peer: all
    @jax.jit
    def whole_step(w, s, lam, o, train, val):
        loss, g, w, s = estimate(problem.train_loss, problem.val_loss, w, s, lam, train, val)
        updates, o = OUTER.update(g, o, lam)
        return loss, g, (w, s, optax.apply_updates(lam, updates), o)

    w, lam = problem.params, problem.lam
    carry = (w, INNER.init(w), lam, OUTER.init(lam))
    # end

    def step(i):
        nonlocal carry
        # peer: all
        loss, g, carry = whole_step(*carry, *problem.batches(i, unroll))
        # end
        return loss, g

    return Run(step)


if __name__ == "__main__":
    serve(start)
