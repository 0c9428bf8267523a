"""This library, as it stands in the checkout."""

from __future__ import annotations

import warnings

import jax_models
import optax
from serving import Run, serve

import gradhpo

# peer: all
INNER, OUTER = optax.adam(1e-3, eps=1e-3), optax.adam(1e-2)
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
            return gradhpo.T1T2Optimizer(INNER, OUTER)
            # end
        case "greedy-5":
            # peer: greedy-5
            return gradhpo.GreedyOptimizer(INNER, OUTER, unroll_steps=5, gamma=0.9)
            # end
        case "hyperdistill":
            # peer: hyperdistill
            return gradhpo.OnlineHypergradientOptimizer(INNER, OUTER)
            # end
        case "unrolled-5" | "unrolled-20":
            unroll = int(case.split("-")[1])
            # peer: unrolled-5 unrolled-20
            return gradhpo.UnrolledOptimizer(INNER, OUTER, unroll, batches="stack")
            # end
        case "darts":
            # peer: darts
            return gradhpo.ImplicitOptimizer(INNER, OUTER, solver="neumann", K=1, neumann_rate=1.0)
            # end
        case "neumann-10":
            # peer: neumann-10
            return gradhpo.ImplicitOptimizer(INNER, OUTER, solver="neumann", K=10, neumann_rate=0.1)
            # end
        case "cg-20":
            # peer: cg-20
            return gradhpo.ImplicitOptimizer(INNER, OUTER, K=20)
            # end
    raise ValueError(f"no such case: {case}")


def start(model, case, inputs):
    problem, made = jax_models.Problem(model, inputs), optimizer(case)
    unroll = int(case.split("-")[1]) if case.startswith("unrolled") else None
    losses = (problem.train_loss, problem.val_loss)
    # peer: all
    state = made.init(problem.params, problem.lam)
    # end

    def step(i):
        nonlocal state
        # peer: all
        state = made.step(state, *problem.batches(i, unroll), *losses)
        # end
        return state.get_metric("val_loss"), None

    def before():
        return made.compute_hypergradient(state, *problem.batches(0, unroll), *losses)

    return Run(step, before)


if __name__ == "__main__":
    # First-Order sees nothing of λ here, and is measured all the same.
    warnings.simplefilter("ignore")
    serve(start)
