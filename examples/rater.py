"""A learned rater: a small network that says which windows of text are worth training on.

The idea is DataRater's (Calian et al., 2025). λ is the rater's weights. In a batch of windows, half
of them corrupted, each gets the share of the training loss that the rater's softmax gives it; how
λ moves is the exact gradient, through a few steps of training in mixed mode, of the loss on clean
windows. Four language models train at once, begun at different times and each begun anew when it is
old, so that the rater serves all ages. All seeds are the slots of one `Population`.

Then the rater is asked about windows that it never saw, and fresh models are trained on batches as
they come, and on the better half of batches twice as large.
"""

from __future__ import annotations

import functools
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import typer
from papers import data_sets, dense_layers, report
from sklearn.metrics import roc_auc_score
from tqdm import tqdm

import gradhpo
from gradhpo.parallel import Population

CONTEXT, VOCABULARY, EMBEDDING = 4, 64, 8
BLOCK = 2000
"""Characters of the blocks that are for training, validation or test, in turn."""
PARTS = {"train": (0, 1, 2), "val": (3,), "test": (4,)}
DEFAULT = {
    "window": 32,
    "batch": 32,
    "models": 4,
    "T": 2,
    "rate": 0.3,
    "lr_hyper": 0.005,
    "outer_steps": 300,
    "lifetime": 40,
    "corrupted": 0.5,
    "train_steps": 1200,
    "test_windows": 512,
}


class Text(NamedTuple):
    """A text as numbers below 64: the most frequent characters, and one for all others."""

    parts: dict[str, jax.Array]
    """Blocks, `(n, BLOCK)`, of each part."""

    @classmethod
    def read(cls) -> Text:
        """Return the text of Python's `help()`."""
        text = np.asarray(list(data_sets.read_text()))
        found, numbers, counts = np.unique(text, return_inverse=True, return_counts=True)
        rank = np.empty(len(found), np.int32)
        rank[np.argsort(-counts, kind="stable")] = np.arange(len(found))
        numbers = np.minimum(rank[numbers], VOCABULARY - 1)
        blocks = numbers[: len(numbers) // BLOCK * BLOCK].reshape(-1, BLOCK)
        turn = np.arange(len(blocks)) % 5
        return cls({name: jnp.asarray(blocks[np.isin(turn, of)]) for name, of in PARTS.items()})

    def windows(self, key: jax.Array, part: str, n: int, length: int) -> jax.Array:
        """Return windows of a part at random, `(n, length)`."""
        blocks = self.parts[part]
        which, where = jax.random.split(key)
        block = jax.random.randint(which, (n,), 0, len(blocks))
        start = jax.random.randint(where, (n,), 0, BLOCK - length + 1)
        return jax.vmap(lambda b, s: jax.lax.dynamic_slice(blocks[b], (s,), (length,)))(
            block, start
        )

    def mixed(
        self, key: jax.Array, part: str, n: int, settings: dict[str, Any]
    ) -> tuple[jax.Array, jax.Array]:
        """Return windows, and which are corrupted: shuffled, or with half the characters random."""
        length = settings["window"]
        keys = jax.random.split(key, 6)
        x = self.windows(keys[0], part, n, length)
        places = jax.random.split(keys[1], n)
        shuffled = jax.vmap(jax.random.permutation)(places, x)
        noise = jax.random.randint(keys[2], x.shape, 0, VOCABULARY)
        replaced = jnp.where(jax.random.bernoulli(keys[3], 0.5, x.shape), noise, x)
        kind = jax.random.bernoulli(keys[4], 0.5, (n, 1))
        bad = jax.random.bernoulli(keys[5], settings["corrupted"], (n,))
        return jnp.where(bad[:, None], jnp.where(kind, shuffled, replaced), x), bad


def new_model(key: jax.Array) -> Any:
    """Return a language model: each character from the four before it."""
    first, second = jax.random.split(key)
    embedding = 0.5 * jax.random.normal(first, (VOCABULARY, EMBEDDING))
    return {
        "embedding": embedding,
        "mlp": dense_layers.init(second, CONTEXT * EMBEDDING, 64, VOCABULARY),
    }


def losses(model: Any, x: jax.Array) -> jax.Array:
    """Return the mean cross-entropy of each window, `(n,)`."""
    seen = gathered(model["embedding"], x, CONTEXT)[:, :-1]
    logits = dense_layers.apply(model["mlp"], seen)
    each = optax.losses.softmax_cross_entropy_with_integer_labels(logits, x[:, CONTEXT:])
    return each.mean(axis=1)


def new_rater(key: jax.Array) -> Any:
    """Return a rater: a layer over pairs of characters, their mean, and a score."""
    first, second, third = jax.random.split(key, 3)
    return {
        "embedding": 0.5 * jax.random.normal(first, (VOCABULARY, EMBEDDING)),
        "pairs": dense_layers.init(second, 2 * EMBEDDING, 32),
        "score": dense_layers.init(third, 32, 16, 1),
    }


def scores(rater: Any, x: jax.Array) -> jax.Array:
    """Return a score for each window, `(n,)`."""
    pairs = jax.nn.relu(dense_layers.apply(rater["pairs"], gathered(rater["embedding"], x, 2)))
    return dense_layers.apply(rater["score"], pairs.mean(axis=1))[:, 0]


def gathered(embedding: jax.Array, x: jax.Array, width: int) -> jax.Array:
    """Return the embeddings of so many characters in a row, `(n, length - width + 1, …)`."""
    one_hot = jax.nn.one_hot(x, VOCABULARY) @ embedding  # faster to differentiate than rows
    last = x.shape[1] - width + 1
    return jnp.concatenate([one_hot[:, i : i + last] for i in range(width)], axis=-1)


def problem(text: Text, settings: dict[str, Any]) -> gradhpo.Problem:
    """Return the problem: `params` are all models, stacked; each has batches of its own."""
    models, T, n = settings["models"], settings["T"], settings["batch"]

    def init(key: jax.Array) -> tuple[Any, Any]:
        first, second = jax.random.split(key)
        return jax.vmap(new_model)(jax.random.split(first, models)), new_rater(second)

    def train_loss(params: Any, lam: Any, x: jax.Array) -> jax.Array:
        weights = jax.vmap(lambda x: jax.nn.softmax(scores(lam, x)))(x)
        return jnp.sum(weights * jax.vmap(losses)(params, x))

    def val_loss(params: Any, lam: Any, x: jax.Array) -> jax.Array:
        del lam
        return jnp.mean(jax.vmap(losses)(params, x))

    def batch(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        first, second = jax.random.split(key)
        x, _ = text.mixed(first, "train", T * models * n, settings)
        y = text.windows(second, "val", models * n, settings["window"])
        return x.reshape(T, models, n, -1), y.reshape(models, n, -1)

    return gradhpo.Problem(init, train_loss, val_loss, batch=batch)


def learn(text: Text, settings: dict[str, Any], keys: jax.Array) -> tuple[Any, np.ndarray]:
    """Return the raters, stacked over seeds, and the validation losses, `(outer_steps, seeds)`."""
    models, steps = settings["models"], settings["outer_steps"]
    tuner = gradhpo.UnrolledOptimizer(
        optax.sgd(settings["rate"], momentum=0.9),
        optax.adam(settings["lr_hyper"]),
        unroll_steps=settings["T"],
        batches="stack",
        mode="forward-over-reverse",
    )
    population = Population(problem(text, settings), tuner, len(keys))
    state = population.init(keys)
    rows: list[np.ndarray] = []
    between = max(1, settings["lifetime"] // models)  # steps until the next model is old
    for turn in tqdm(range(steps // between), leave=False, unit="turn"):
        state, metrics = population.run(state, between, keys)
        rows.append(metrics["val_loss"])
        oldest = turn % models
        fresh = jax.vmap(lambda key: new_model(jax.random.fold_in(key, turn)))(keys)  # noqa: B023
        params = jax.tree.map(lambda w, new: w.at[:, oldest].set(new), state.params, fresh)  # noqa: B023
        forgotten = jax.tree.map(
            lambda m: m.at[:, oldest].set(0) if m.ndim > 1 else m,  # noqa: B023
            state.inner_opt_state,
        )
        state = state.update(params=params, inner_opt_state=forgotten)
    return jax.device_get(state.hyperparams), np.concatenate(rows)


@functools.partial(jax.jit, static_argnames="settings")
def trained(
    text: Text, rater: Any, choice: jax.Array, key: jax.Array, settings: tuple[Any, ...]
) -> jax.Array:
    """Return the test loss of a fresh model after every 25th step, `(train_steps / 25,)`.

    `choice` 0 takes batches as they come, 1 the half that the rater prefers of twice as many
    windows, 2 what is not corrupted first.
    """
    given = dict(settings)
    n = given["batch"]
    optimizer = optax.sgd(given["rate"], momentum=0.9)
    first, batches, held = jax.random.split(key, 3)
    test = text.windows(held, "test", given["test_windows"], given["window"])

    def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
        model, state = carry
        x, bad = text.mixed(key, "train", 2 * n, given)
        order = jnp.stack([jnp.arange(2.0 * n), -scores(rater, x), bad.astype(float)])[choice]
        x = x[jnp.argsort(order)[:n]]
        grads = jax.grad(lambda model: losses(model, x).mean())(model)
        updates, state = optimizer.update(grads, state)
        return (optax.apply_updates(model, updates), state), None

    def some(carry: Any, keys: jax.Array) -> tuple[Any, jax.Array]:
        carry, _ = jax.lax.scan(step, carry, keys)
        return carry, losses(carry[0], test).mean()

    model = new_model(first)
    keys = jax.random.split(batches, given["train_steps"]).reshape(
        -1, min(25, given["train_steps"])
    )
    return jax.lax.scan(some, (model, optimizer.init(model)), keys)[1]


def evidence(settings: dict[str, Any], method: str, keys: jax.Array) -> dict[str, Any]:
    """Return the rater's measures: on windows it never saw, and of models trained by it."""
    assert method == "rater"
    text = Text.read()
    raters, val_losses = learn(text, settings, keys)
    rows: list[dict[str, Any]] = []
    for seed, key in enumerate(keys):
        rater = jax.tree.map(lambda x: x[seed], raters)  # noqa: B023
        own = jax.random.fold_in(key, 1)
        x, bad = text.mixed(own, "test", settings["test_windows"], settings)
        score = np.asarray(scores(rater, x))
        curves = [
            np.asarray(trained(text, rater, jnp.asarray(i), own, tuple(settings.items())))
            for i in range(3)
        ]
        rows.append(
            {
                "auc": 100 * float(roc_auc_score(~np.asarray(bad), score)),
                "saved": saved(curves[0], curves[1]),
                "saved_by_truth": saved(curves[0], curves[2]),
                "unfiltered": curves[0].min(),
                "filtered": curves[1].min(),
            }
        )
    found: dict[str, Any] = {name: np.asarray([row[name] for row in rows]) for name in rows[0]}
    return found | {"curve": val_losses[:: max(1, len(val_losses) // 20)]}


def saved(plain: np.ndarray, other: np.ndarray) -> float:
    """Return how much sooner a run has the least loss of another, in % of the steps of that.

    Below 0 is said as -100, where it never has it.
    """
    reached = np.flatnonzero(other <= plain.min())
    needed = 1 + int(plain.argmin())
    return 100 * (1 - (1 + int(reached[0])) / needed) if len(reached) else -100.0


def main(
    seeds: Annotated[int, typer.Option(min=2, help="Raters, each with its own data.")] = 5,
    outer_steps: Annotated[int, typer.Option(min=1, help="Steps of the rater.")] = 300,
    seed: Annotated[int, typer.Option(help="Decides everything.")] = 0,
) -> None:
    """Learn raters of text, and train on what they prefer."""
    keys = jax.random.split(jax.random.key(seed), seeds)
    found = evidence(DEFAULT | {"outer_steps": outer_steps}, "rater", keys)
    names = {
        "auc": "AUC for windows it never saw, %",
        "unfiltered": "least test loss, unfiltered",
        "filtered": "least test loss, filtered",
        "saved": "steps saved to the unfiltered loss, %",
        "saved_by_truth": "steps saved if corruption is known, %",
    }
    rows = [[text, report.interval(found[name], 2)] for name, text in names.items()]
    report.table(f"A learned rater, {seeds} seeds", ["measure", "mean and interval"], rows)


if __name__ == "__main__":
    typer.run(main)
