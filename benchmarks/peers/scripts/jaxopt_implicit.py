"""jaxopt: implicit differentiation of one Adam step's result, as if it were a minimum."""

from __future__ import annotations

import functools

import jax
import jax_models
import jaxopt
import optax
from jaxopt import implicit_diff, linear_solve
from serving import Run, serve

# peer: all
INNER, OUTER = optax.adam(1e-3, eps=1e-3), optax.adam(1e-2)
# end


def start(model, case, inputs):
    problem = jax_models.Problem(model, inputs)
    train_loss, val_loss = problem.train_loss, problem.val_loss
    assert case == "cg-20", case
    # peer: all
    solve = functools.partial(linear_solve.solve_cg, maxiter=20, tol=0.0)
    inner = jaxopt.OptaxSolver(train_loss, INNER, maxiter=1, implicit_diff=False)

    @jax.jit
    def whole_step(w, s, lam, o, train, val):
        @implicit_diff.custom_root(jax.grad(train_loss), has_aux=True, solve=solve)
        def inner_step(w, lam, batch):
            return inner.update(w, s, lam, batch)

        def objective(lam):
            new_w, new_s = inner_step(w, lam, train)
            return val_loss(new_w, lam, val), (new_w, new_s)

        (loss, (w, s)), g = jax.value_and_grad(objective, has_aux=True)(lam)
        updates, o = OUTER.update(g, o, lam)
        return loss, g, (w, s, optax.apply_updates(lam, updates), o)

    w, lam = problem.params, problem.lam
    s = inner.init_state(w, lam, problem.batches(0)[0])
    carry = (w, s, lam, OUTER.init(lam))
    # end

    def step(i):
        nonlocal carry
        # peer: all
        loss, g, carry = whole_step(*carry, *problem.batches(i))
        # end
        return loss, g

    return Run(step)


if __name__ == "__main__":
    serve(start)
