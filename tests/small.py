"""A small regression problem, and the optimizers by name, for tests of the machinery."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gradhpo

RNG = np.random.default_rng(0)
X = RNG.normal(size=(12, 3)).astype(np.float32)
Y = X @ np.asarray([1.0, -2.0, 0.5], np.float32)
BATCH = (X, Y)


def train_loss(w, lam, batch):
    """Squared error of shifted weights, with a decay: λ acts through the training loss."""
    x, y = batch
    return jnp.mean((x @ (w + 0.1 * lam["l"]) - y) ** 2) + jnp.exp(lam["decay"]) * jnp.sum(w**2)


def val_loss(w, lam, batch):
    """Squared error, with a direct term in λ."""
    x, y = batch
    return jnp.mean((x @ w - y) ** 2) + 0.01 * jnp.sum(lam["l"] ** 2)


def update_fn(w, lam, batch):
    """A step of gradient descent."""
    return w - 0.05 * jax.grad(train_loss)(w, lam, batch)


def start(key=None):
    """Weights and hyperparameters; random with a key."""
    w = jnp.ones(3) if key is None else jax.random.normal(key, (3,))
    return w, {"l": jnp.ones(3), "decay": jnp.asarray(-3.0, jnp.float32)}


OPTIMIZERS = {
    "first-order": gradhpo.FOOptimizer,
    "one-step": gradhpo.OneStepOptimizer,
    "t1t2": gradhpo.T1T2Optimizer,
    "greedy": gradhpo.GreedyOptimizer,
    "hyperdistill": gradhpo.OnlineHypergradientOptimizer,
}
REFERENCES = {
    "unrolled": gradhpo.UnrolledOptimizer,
    "forward": gradhpo.ForwardOptimizer,
    "drmad": gradhpo.DrMADOptimizer,
    "implicit": gradhpo.ImplicitOptimizer,
}
UNROLLING = {"greedy", *REFERENCES}
INNER = optax.sgd(0.05, momentum=0.9)
OUTER = optax.adam(0.05)


def build(name, outer=False, **settings):
    """Return an optimizer, and the `lr_hyper` of its step, as a tuple of 0 or 1."""
    if "update_fn" not in settings:
        settings = {"inner_optimizer": INNER} | settings
    if name in UNROLLING:
        settings = {"unroll_steps": 3} | settings
    kind = (OPTIMIZERS | REFERENCES)[name]
    if name == "greedy" or outer:
        return kind(outer_optimizer=OUTER, **settings), ()
    return kind(**settings), (0.05,)


def run_arguments(name, T):
    """Return the episode length as `run` takes it: FO and One-Step have no T of their own."""
    return (T,) if name in ("first-order", "one-step") else ()
