# pyright: basic, reportOptionalCall=false
"""An ordinary Flax NNX training loop on the digits, to be read beside `training_loop.py`.

Batch normalization, dropout, label smoothing, a NumPy loader, AdamW, warm-up and cosine, clipping.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import typer
from flax import nnx
from sklearn.datasets import load_digits

STEPS, BATCH = 500, 64
USUAL = {"peak": 1e-3, "decay": 1e-4, "smoothing": 0.1, "dropout": 0.1}


class Net(nnx.Module):
    def __init__(self, rngs, dropout):
        self.hidden = nnx.Linear(64, 256, rngs=rngs)
        self.norm = nnx.BatchNorm(256, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.out = nnx.Linear(256, 10, rngs=rngs)

    def __call__(self, x):
        return self.out(self.dropout(nnx.relu(self.norm(self.hidden(x)))))


def digits(seed):
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(y))
    x, y = (x[order] / 16).astype(np.float32), y[order]
    return (x[:300], y[:300]), (x[300:600], y[300:600]), (x[600:], y[600:])


def loader(x, y, rng):
    while True:
        order = rng.permutation(len(y))
        for start in range(0, len(y) - BATCH + 1, BATCH):
            rows = order[start : start + BATCH]
            yield x[rows], y[rows]


def loss_fn(model, batch, settings):
    x, y = batch
    labels = optax.smooth_labels(jax.nn.one_hot(y, 10), settings["smoothing"])
    return optax.softmax_cross_entropy(model(x), labels).mean()


def adamw(settings):
    schedule = optax.warmup_cosine_decay_schedule(0, settings["peak"], STEPS // 10, STEPS)
    update = optax.adamw(schedule, weight_decay=settings["decay"])
    return optax.chain(optax.clip_by_global_norm(1.0), update)


def train(seed, settings):
    data, _, _ = digits(seed)
    model = Net(nnx.Rngs(seed), settings["dropout"])
    optimizer = nnx.Optimizer(model, adamw(settings), wrt=nnx.Param)

    @nnx.jit
    def train_step(model, optimizer, batch):
        loss, grads = nnx.value_and_grad(loss_fn)(model, batch, settings)
        optimizer.update(model, grads)
        return loss

    batches = loader(*data, np.random.default_rng(seed))
    for _, batch in zip(range(STEPS), batches, strict=False):
        train_step(model, optimizer, batch)
    return model


def test_accuracy(model, seed):
    model.eval()
    x, y = digits(seed)[2]
    return float(jnp.mean(model(x).argmax(-1) == y))


def main(seeds: int = 5, peak: float = USUAL["peak"]) -> None:
    settings = {**USUAL, "peak": peak}
    found = [test_accuracy(train(seed, settings), seed) for seed in range(seeds)]
    print(f"test accuracy {np.mean(found):.4f} ± {np.std(found):.4f}, {seeds} seeds")


if __name__ == "__main__":
    typer.run(main)
