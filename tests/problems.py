"""Bilevel problems that the tests share.

Data are NumPy arrays, so that they take the precision of the test that uses them.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

N = 3
LR = 0.1
SGD = optax.sgd(LR)

_rng = np.random.default_rng(0)


def _spd():
    root = _rng.normal(size=(N, N))
    return root @ root.T / N + np.eye(N)


# --- A quadratic problem: every Jacobian is known in closed form -------------------------------
#
# L_train = 1/2 wᵀGw - x̄ᵀw + 1/2 λᵀw² + (x̄∘λ)ᵀCw, x̄ the mean of a batch's rows. Its mixed
# derivative depends on the weights and on the batch, so a wrong w*_t or D*_t shows, and ∇_λ is
# quadratic in w, so central differences along any direction are exact.

G, H, C = _spd(), _spd(), _rng.normal(size=(N, N))
W0, LAM0 = _rng.normal(size=N), np.abs(_rng.normal(size=N))
TRAIN = _rng.normal(size=(20, 4, N))  # 20 batches of 4 rows
VAL = _rng.normal(size=N)


def quadratic_train(w, lam, rows):
    x = rows.mean(0)
    return w @ G @ w / 2 - x @ w + lam @ w**2 / 2 + (x * lam) @ C @ w


def quadratic_val(w, lam, y):
    return (w - y) @ H @ (w - y) / 2 + 0.3 * lam @ w + lam @ lam / 2


def quadratic_val_without_lambda(w, lam, y):
    del lam
    return (w - y) @ H @ (w - y) / 2


def quadratic_update(w, lam, rows):
    """Φ of plain SGD as the user's own step."""
    return w - LR * jax.grad(quadratic_train)(w, lam, rows)


class Exact:
    """The quadratic problem's derivatives, in NumPy; a row vector times a Jacobian is `v @ J`."""

    @staticmethod
    def phi(w, lam, rows):
        x = rows.mean(0)
        return w - LR * (G @ w - x + lam * w + C.T @ (x * lam))

    @staticmethod
    def dphi_dw(lam):
        return np.eye(N) - LR * (G + np.diag(lam))

    @staticmethod
    def dphi_dlam(w, rows):
        return -LR * (np.diag(w) + C.T @ np.diag(rows.mean(0)))

    @staticmethod
    def alpha(w, lam, y):
        return H @ (w - y) + 0.3 * lam

    @staticmethod
    def direct(w, lam):
        return 0.3 * w + lam


# --- A problem with A = I: the training loss is linear in w ------------------------------------


def linear_train(w, lam, rows):
    return jnp.tanh(C @ lam * rows.mean(0)) @ w


def linear_val(w, lam, y):
    return (y + jnp.sin(lam)) @ w + lam @ lam / 2


# --- Data reweighting: a weight λ_i for every example, and a nonlinear network ------------------

ROWS, FEATURES, HIDDEN = 6, 3, 4
MLP = {
    "w1": _rng.normal(size=(FEATURES, HIDDEN)),
    "b1": _rng.normal(size=HIDDEN) * 0.1,
    "w2": _rng.normal(size=HIDDEN),
}
MLP_LAM = {"logits": _rng.normal(size=ROWS), "decay": {"w1": np.full((), -2.0)}}
MLP_TRAIN = [
    {"x": _rng.normal(size=(ROWS, FEATURES)), "y": _rng.normal(size=ROWS)} for _ in range(10)
]
MLP_VAL = {"x": _rng.normal(size=(5, FEATURES)), "y": _rng.normal(size=5)}


def predict(params, x, activation=jnp.tanh):
    return activation(x @ params["w1"] + params["b1"]) @ params["w2"]


def mlp_train(params, lam, batch):
    errors = (predict(params, batch["x"]) - batch["y"]) ** 2
    decay = jnp.exp(lam["decay"]["w1"]) * jnp.sum(params["w1"] ** 2)
    return jnp.mean(jax.nn.sigmoid(lam["logits"]) * errors) + decay


def mlp_val(params, lam, batch):
    errors = (predict(params, batch["x"]) - batch["y"]) ** 2
    return jnp.mean(errors) + 0.01 * jnp.sum(lam["logits"] ** 2)


def mlp_val_without_lambda(params, lam, batch):
    del lam
    return jnp.mean((predict(params, batch["x"]) - batch["y"]) ** 2)


# --- Ground truth by automatic differentiation --------------------------------------------------


def optax_loop(optimizer, train_loss, params, lam, batches, state=None):
    """The weights and the optimizer's state after plain optax steps, in a Python loop."""
    state = optimizer.init(params) if state is None else state
    for batch in batches:
        gradient = jax.grad(train_loss)(params, lam, batch)
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def unrolled(optimizer_of, train_loss, val_loss, params, lam, batches, val_batch, state=None):
    """The exact hypergradient through all the steps, by reverse mode."""

    def objective(lam):
        weights, _ = optax_loop(optimizer_of(lam), train_loss, params, lam, batches, state)
        return val_loss(weights, lam, val_batch)

    return jax.grad(objective)(lam)


def as_jax(tree):
    """NumPy data as JAX arrays of the precision in force."""
    return jax.tree.map(jnp.asarray, tree)


def assert_close(actual, expected, rtol=1e-10, atol=1e-12):
    """Compare two trees leaf by leaf, and their structures."""
    chex.assert_trees_all_close(actual, expected, rtol=rtol, atol=atol)


def assert_same_bits(actual, expected):
    """Compare two trees exactly."""
    chex.assert_trees_all_equal(actual, expected)
