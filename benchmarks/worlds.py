"""Five small worlds to choose a method in, each with a judge of λ that no method sees."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import gradhpo

FEATURES, ROWS = 10, 30


class World(NamedTuple):
    """A problem, and how it is run and judged."""

    name: str
    about: str
    problem: Callable[[int], gradhpo.Problem]
    """Of the number of inner steps in a step: training batches come in stacks of it, or alone."""
    inner: Any
    T: int
    judge: Callable[[Any, Any], jax.Array]
    """`(λ, weights) -> scalar`: what is better smaller; traceable."""
    stacked: bool = False
    """Whether a step of several inner steps takes a batch for each."""
    anew: bool = False
    """Whether weights start anew after T inner steps."""
    samples: int = 1
    """Walks over which cosines are taken."""
    smooth: Callable[[int], gradhpo.Problem] | None = None
    """What methods that need a gradient take instead."""
    only: tuple[str, ...] = ()
    """How the names of the methods begin that it is asked; by default all are."""


# --- Ridge regression -----------------------------------------------------------------------------


@functools.cache
def rows() -> dict[str, Any]:
    """Return a regression of 10 features, 3 of which count: 30 rows to train, 30 to validate."""
    rng = np.random.default_rng(0)
    w = np.where(np.arange(FEATURES) < 3, 1.0, 0.0)

    def made() -> tuple[Any, Any]:
        x = rng.normal(size=(ROWS, FEATURES))
        return np.float32(x), np.float32(x @ w + rng.normal(size=ROWS))

    return {"train": made(), "val": made()}


def squares(w: Any, batch: Any) -> jax.Array:
    """Return half the mean squared error."""
    x, y = batch
    return 0.5 * jnp.mean((x @ w - y) ** 2)


def decay(lam: Any) -> jax.Array:
    """Return the decays of λ."""
    return 5 * jax.nn.sigmoid(lam)


def ridge_train(w: Any, lam: Any, batch: Any) -> jax.Array:
    """Return the same with a decay for each weight, of at most 5, at which SGD stays stable."""
    return squares(w, batch) + 0.5 * jnp.sum(decay(lam) * w**2)


def ridge_val(w: Any, lam: Any, batch: Any) -> jax.Array:
    """Return the error without it."""
    del lam
    return squares(w, batch)


def ridge_judge(lam: Any, w: Any) -> jax.Array:
    """Return the error on all validation rows of the weights that training at λ ends at."""
    del w
    (x, y), val = rows()["train"], rows()["val"]
    minimum = jnp.linalg.solve(x.T @ x / ROWS + jnp.diag(decay(lam)), x.T @ y / ROWS)
    return squares(minimum, val)


def ridge(steps: int, batch_rows: int | None = None) -> gradhpo.Problem:
    """Return the regression: all rows at every step, or so many at random."""
    data = rows()

    def batch(key: jax.Array) -> Any:
        if batch_rows is None:
            return data["train"], data["val"]
        first, second = jax.random.split(key)
        shape = (steps, batch_rows) if steps > 1 else (batch_rows,)
        chosen = jax.random.randint(first, shape, 0, ROWS)
        other = jax.random.randint(second, (batch_rows,), 0, ROWS)
        train = jax.tree.map(lambda x: jnp.asarray(x)[chosen], data["train"])
        return train, jax.tree.map(lambda x: jnp.asarray(x)[other], data["val"])

    def init(key: jax.Array) -> Any:
        del key
        return jnp.zeros(FEATURES), jnp.full(FEATURES, -3.0)

    return gradhpo.Problem(init, ridge_train, ridge_val, batch)


# --- Digits with wrong labels ---------------------------------------------------------------------

SIZES, TRAIN, VAL = (64, 16, 10), 200, 300


@functools.cache
def digits() -> dict[str, Any]:
    """Return 200 digits to train on, half of them labelled at random, 300 to validate, the rest."""
    bunch: Any = load_digits()
    rng = np.random.default_rng(0)
    order = rng.permutation(len(bunch.target))
    x, y = np.asarray(bunch.data, np.float32)[order] / 16, bunch.target[order].copy()
    wrong = rng.random(TRAIN) < 0.5
    y[:TRAIN] = np.where(wrong, rng.integers(0, 10, TRAIN), y[:TRAIN])
    seen = TRAIN + VAL
    cuts = {"train": slice(TRAIN), "val": slice(TRAIN, seen), "test": slice(seen, None)}
    return {name: (x[cut], np.asarray(y[cut], np.int32)) for name, cut in cuts.items()}


def start_digits(key: jax.Array, lam: Any) -> Any:
    """Return the weights of the MLP, and λ."""
    keys = jax.random.split(key, len(SIZES) - 1)
    shapes = itertools.pairwise(SIZES)
    weights = [jax.random.normal(k, s) / np.sqrt(s[0]) for k, s in zip(keys, shapes, strict=True)]
    return weights, lam


def logits(params: Any, x: Any) -> jax.Array:
    """Return what the MLP says."""
    return jax.nn.relu(x @ params[0]) @ params[1]


def entropies(params: Any, batch: Any) -> jax.Array:
    """Return the cross-entropy of each image."""
    x, y = batch
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits(params, x), y)


def weighted(params: Any, lam: Any, batch: Any) -> jax.Array:
    """Return the loss with a weight σ(λ_i) for each image."""
    return jnp.mean(jax.nn.sigmoid(lam) * entropies(params, batch))


def clean(params: Any, lam: Any, batch: Any) -> jax.Array:
    """Return the loss without."""
    del lam
    return entropies(params, batch).mean()


MOMENTUM = optax.sgd(0.1, momentum=0.9)


def trained(loss: Any, lam: Any, batch: Any, steps: int) -> Any:
    """Return weights that were trained at λ from the start."""
    params = start_digits(jax.random.key(9), None)[0]

    def step(_: Any, carry: Any) -> Any:
        w, s = carry
        updates, s = MOMENTUM.update(jax.grad(loss)(w, lam, batch), s, w)
        return optax.apply_updates(w, updates), s

    return jax.lax.fori_loop(0, steps, step, (params, MOMENTUM.init(params)))[0]


def cleaning(steps: int) -> gradhpo.Problem:
    """Return hyper-cleaning of the digits."""
    del steps
    return of_digits(jnp.zeros(TRAIN), weighted, clean)


def of_digits(lam: jax.Array, train_loss: Any, val_loss: Any) -> gradhpo.Problem:
    """Return the problem of a network of the digits, all rows at every step."""
    data = digits()
    batches = data["train"], data["val"]
    return gradhpo.Problem(
        lambda key: start_digits(key, lam), train_loss, val_loss, lambda key: batches
    )


def cleaning_judge(lam: Any, w: Any) -> jax.Array:
    """Return the test loss after 200 steps at λ from the start."""
    del w
    data = digits()
    return clean(trained(weighted, lam, data["train"], 200), lam, data["test"])


# --- A validation accuracy ------------------------------------------------------------------------


def decayed(params: Any, lam: Any, batch: Any) -> jax.Array:
    """Return the loss with a decay for each layer."""
    total = jnp.stack([jnp.sum(w**2) for w in params])
    return entropies(params, batch).mean() + jnp.exp(lam) @ total


def errors(params: Any, lam: Any, batch: Any) -> jax.Array:
    """Return the share of wrong answers, which has no gradient."""
    del lam
    x, y = batch
    return 1 - jnp.mean((jnp.argmax(logits(params, x), -1) == y).astype(jnp.float32))


def accuracy(steps: int, val_loss: Any = errors) -> gradhpo.Problem:
    """Return the digits with a decay for each layer."""
    del steps
    return of_digits(jnp.full(2, -8.0), decayed, val_loss)


def accuracy_judge(lam: Any, w: Any) -> jax.Array:
    """Return the share of wrong answers on test after 200 steps at λ from the start."""
    del w
    data = digits()
    return errors(trained(decayed, lam, data["train"], 200), lam, data["test"])


# --- The rough toy of the PES paper ---------------------------------------------------------------


def landscape(x: Any, lam: Any, batch: Any) -> jax.Array:
    """Return the loss of two weights, to train and to validate."""
    del lam, batch
    bumps = jnp.sin(x[1]) ** 2 * jnp.exp(-5 * x[0] ** 2)
    return jnp.sqrt(x[0] ** 2 + 5) - jnp.sqrt(5.0) + bumps + 0.25 * jnp.abs(x[1] - 100)


def rough_inner(lam: Any) -> optax.GradientTransformation:
    """Return SGD with a rate that goes from exp(λ₀) to exp(λ₁) in 100 steps, on a line."""
    return optax.sgd(optax.linear_schedule(jnp.exp(lam[0]), jnp.exp(lam[1]), 100))


def rough(steps: int) -> gradhpo.Problem:
    """Return the toy; it has no data."""
    del steps
    nothing = jnp.zeros(())
    return gradhpo.Problem(
        lambda key: (jnp.ones(2), jnp.full(2, -4.0)),
        landscape,
        landscape,
        lambda key: (nothing, nothing),
    )


def rough_judge(lam: Any, w: Any) -> jax.Array:
    """Return the mean loss of 100 steps at λ."""
    del w
    optimizer, x = rough_inner(lam), jnp.ones(2)

    def step(carry: Any, _: None) -> Any:
        x, s = carry
        updates, s = optimizer.update(jax.grad(landscape)(x, lam, None), s, x)
        x = optax.apply_updates(x, updates)
        return (x, s), landscape(x, lam, None)

    return jax.lax.scan(step, (x, optimizer.init(x)), length=100)[1].mean()


WORLDS = (
    World(
        "ridge",
        "convex, with a closed form: ridge regression, a decay for each of 10 weights; all rows at "
        "every step. Judged by the validation loss of the exact minimum at λ.",
        ridge,
        optax.sgd(0.1),
        20,
        ridge_judge,
    ),
    World(
        "noisy",
        "the same with batches of 4 rows, to train and to validate.",
        functools.partial(ridge, batch_rows=4),
        optax.sgd(0.05),
        20,
        ridge_judge,
        stacked=True,
        samples=16,
        only=("OneStep", "Online", "Implicit, cg", "Unrolled", "NRES", "SOBA", "MASOBA", "F2SA"),
    ),
    World(
        "cleaning",
        "an MLP on 200 digits, half of them labelled at random, with a weight for each image; "
        "momentum. Judged by the test loss of a training from the start at λ.",
        cleaning,
        MOMENTUM,
        20,
        cleaning_judge,
    ),
    World(
        "rough",
        "the toy regression of the PES paper: two numbers of a schedule of the rate, 100 steps. "
        "Judged by the mean loss of the steps.",
        rough,
        rough_inner,
        100,
        rough_judge,
        anew=True,
    ),
    World(
        "accuracy",
        "the MLP with a decay for each layer, tuned for a validation accuracy, which has no "
        "gradient. Methods that need one are given the cross-entropy instead. Judged by the share "
        "of wrong answers on test of a training from the start at λ.",
        accuracy,
        MOMENTUM,
        20,
        accuracy_judge,
        smooth=functools.partial(accuracy, val_loss=clean),
        only=("OneStep", "DrMAD", "Unrolled", "ES", "PES", "NRES"),
    ),
)
