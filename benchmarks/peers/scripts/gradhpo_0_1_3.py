"""gradhpo 0.1.3 from the package index: its five classes.

Its state holds the step as a part of the program's type, so a new number compiles the step again;
`run` counts from 0 in every episode, and so does this, in episodes of five steps.
"""

from __future__ import annotations

import jax
import jax_models
import optax
from serving import Run, serve

import gradhpo

EPISODE = 5

# peer: all
INNER, OUTER = optax.adam(1e-3, eps=1e-3, eps_root=1e-16), optax.adam(1e-2)
# end


def optimizer(case):
    match case:
        case "first-order":
            # peer: first-order
            return gradhpo.FOOptimizer(INNER, OUTER)
            # end
        case "one-step":
            # peer: one-step
            return gradhpo.OneStepOptimizer(INNER, OUTER)
            # end
        case "t1-t2":
            # peer: t1-t2
            return gradhpo.T1T2Optimizer(INNER, OUTER, gamma=0.0, T=EPISODE)
            # end
        case "greedy-5":
            # peer: greedy-5
            return gradhpo.GreedyOptimizer(INNER, OUTER, unroll_steps=5, gamma=0.9)
            # end
        case "hyperdistill":
            # peer: hyperdistill
            return gradhpo.OnlineHypergradientOptimizer(INNER, OUTER, T=EPISODE)
            # end
    raise ValueError(f"no such case: {case}")


def start(model, case, inputs):
    problem, made = jax_models.Problem(model, inputs), optimizer(case)
    losses = (problem.train_loss, problem.val_loss)
    jitted = jax.jit(problem.val_loss)
    # peer: all
    state = made.init(problem.params, problem.lam)
    # end

    def step(i):
        nonlocal state
        # peer: all
        if i % EPISODE == 0:
            state = state.update(step=0)
        train, val = problem.batches(i)
        state = made.step(state, train, val, *losses)
        # end
        return lambda: jitted(state.params, None, val), None

    def before():
        return made.compute_hypergradient(state.update(step=1), *problem.batches(0), *losses)

    return Run(step, before)


if __name__ == "__main__":
    serve(start)
