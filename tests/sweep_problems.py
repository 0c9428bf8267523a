"""Problems and optimizers for tests of sweeps, found by reference in every process."""

import dataclasses
import functools
import os
import signal
import time

import jax
import jax.numpy as jnp
import optax

import gradhpo


def _train(w, lam, x):
    return jnp.mean((x @ w - 1) ** 2) + jnp.sum(jnp.exp(lam["log_decay"]) * w**2)


def _val(w, lam, x):
    return jnp.mean((x @ w - 1) ** 2)


@functools.cache
def problem():
    """A small regression: λ is a decay for each weight and the log of a learning rate."""
    return gradhpo.Problem(
        init=lambda key: (
            jax.random.normal(key, (4,)),
            {"log_decay": jnp.full(4, -3.0), "log_rate": jnp.float32(-3)},
        ),
        train_loss=_train,
        val_loss=_val,
        batch=lambda key, data: (data[jax.random.randint(key, (8,), 0, 32)], data[32:]),
        data=lambda key: jax.random.normal(key, (64, 4)) + 1,
        metrics=lambda w, lam, data: {"test_loss": _val(w, lam, data)},
    )


@functools.cache
def optimizer(method="one-step"):
    """An optimizer whose learning rate is a hyperparameter that only the scheduler moves."""
    outer = optax.multi_transform(
        {"tuned": optax.adam(0.1), "fixed": optax.set_to_zero()},
        {"log_decay": "tuned", "log_rate": "fixed"},
    )
    inner = lambda lam: optax.sgd(jnp.exp(lam["log_rate"]), momentum=0.9)  # noqa: E731
    if method == "hyperdistill":
        return gradhpo.OnlineHypergradientOptimizer(inner, outer, T=4, estimation_period=2)
    return {"one-step": gradhpo.OneStepOptimizer, "first-order": gradhpo.FOOptimizer}[method](
        inner, outer
    )


def with_data(data):
    """The same on the driver's arrays."""
    rows = data["x"]
    if os.environ.get("EXPECT_READ_ONLY"):
        assert not rows.flags.writeable, "the arrays were copied on their way here"
    return dataclasses.replace(problem(), data=lambda key: rows)


def fails_in_its_first_step():
    """A problem whose training loss raises when it is traced."""

    def loss(w, lam, x):
        raise RuntimeError("the loss fails on purpose")

    return dataclasses.replace(problem(), train_loss=loss)


def ends_its_process():
    """A problem in which a process ends as if it were killed for memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def prints_and_fails():
    """A problem that prints, and whose training loss raises an error of many lines."""

    def loss(w, lam, x):
        raise FileNotFoundError("the loss fails on purpose\n" + "and says more than fits\n" * 20)

    print("printed by a problem")
    return dataclasses.replace(problem(), train_loss=loss)


def slow_disk_problem():
    """The same; the first process that asks for it, and writes its number down, has a slow disk."""
    try:
        file = os.open(os.environ["SLOW_DISK"], os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        return problem()
    os.write(file, str(os.getpid()).encode())
    os.close(file)
    fsync = os.fsync

    def slowly(descriptor):
        time.sleep(0.1)
        fsync(descriptor)

    os.fsync = slowly
    return problem()
