"""The methods of gradhpo as a stochastic JAX solver of `benchmark_bilevel`.

`board.py` puts this file among the board's solvers. A batch is where it begins in the data, which
the board's losses close over, and its number.
"""

from benchmark_utils.stochastic_jax_solver import StochasticJaxSolver
from benchopt import safe_import_context

with safe_import_context() as import_ctx:
    import functools

    import jax
    import jax.numpy as jnp
    from benchmark_utils.gradhpo_methods import (
        ALL_DATA,
        CALLS,
        EVERY_BATCH,
        INNER_STEPS,
        optimizer_of,
    )

    import gradhpo
    from gradhpo.state import METRICS


class Solver(StochasticJaxSolver):
    """gradhpo: gradient-based hyperparameter optimization in JAX."""

    name = "gradhpo"
    parameters = {
        "method": list(CALLS),
        "step_size": [0.1],
        "outer_ratio": [1.0],
        "batch_size": [64],
        **StochasticJaxSolver.parameters,
    }

    def set_objective(self, **objective):
        """Take the problem; BOME takes all data at every step."""
        if self.method in ALL_DATA:
            self.batch_size = "full"
        super().set_objective(**objective)

    def init(self):
        """Return what a step carries, in buffers of its own: an epoch is given them."""
        self.inner_var, self.outer_var = self.inner_var0, self.outer_var0
        state = self.optimizer.init(self.inner_var, self.outer_var)
        carry = {
            "state": state,
            "state_inner_sampler": self.state_inner_sampler,
            "state_outer_sampler": self.state_outer_sampler,
        }
        return jax.tree.map(jnp.copy, carry)

    def get_step(self, inner_sampler, outer_sampler):
        """Return the step, by the optimizer for as many batches as the samplers know."""
        counts = (
            -(-self.n_inner_samples // self.batch_size_inner),
            -(-self.n_outer_samples // self.batch_size_outer),
        )
        optimizer = optimizer_of(self.method, self.step_size, self.outer_ratio, *counts)
        self.optimizer, f_inner, f_outer = optimizer, self.f_inner, self.f_outer

        def train_loss(w, lam, batch):
            return f_inner(w, lam, batch["start"])

        def val_loss(w, lam, batch):
            return f_outer(w, lam, batch["start"])

        def batch(sampler, state):
            start, index, _, state = sampler(state)
            return state, {"start": start, "index": index}

        def step(carry, _):
            draw = functools.partial(batch, inner_sampler)
            if self.method in EVERY_BATCH:
                inner, train = jax.lax.scan(
                    lambda s, _: draw(s), carry["state_inner_sampler"], length=INNER_STEPS
                )
            else:
                inner, train = draw(carry["state_inner_sampler"])
            outer, val = batch(outer_sampler, carry["state_outer_sampler"])
            task = gradhpo.Task(train, val, train_loss, val_loss)
            state = optimizer.advance(carry["state"], task)
            untaken = {name: carry["state"].metadata[name] for name in METRICS}
            state = state.update(metadata=untaken)  # nobody reads them: XLA leaves them out
            after = {"state": state, "state_inner_sampler": inner, "state_outer_sampler": outer}
            return after, None

        return step

    def get_one_epoch_jitted(self, inner_sampler, outer_sampler):
        """Return an epoch that works in the buffers of what it is given."""
        step = self.get_step(inner_sampler, outer_sampler)

        def one_epoch(carry, eval_freq):
            return jax.lax.scan(step, carry, length=eval_freq)[0]

        return jax.jit(one_epoch, static_argnums=1, donate_argnums=0)

    def run(self, callback):
        """Run the epochs that the board asks for."""
        carry = self.init()
        while callback():
            carry = self.one_epoch(carry, self.eval_freq)
            state = jax.block_until_ready(carry["state"])
            self.inner_var, self.outer_var = state.params, state.hyperparams
