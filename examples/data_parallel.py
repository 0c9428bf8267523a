"""One run over several devices: a weight for every training row, learned data-parallel.

Run it anywhere: without accelerators, eight CPU devices are made. The result is compared with that
of one device.
"""

from __future__ import annotations

import os
from typing import Annotated, Any

if "XLA_FLAGS" not in os.environ:  # before JAX starts; it has no effect on other platforms
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import numpy as np
import optax
import typer
from rich.console import Console
from rich.table import Table

import gradhpo
from gradhpo.parallel import data_parallel, fully_sharded, make_mesh

ROWS, FEATURES, BATCH = 1024, 32, 128


def problem(noise: float) -> gradhpo.Problem:
    """Return a regression whose training targets are partly random; λ weighs each row."""

    def data(key: jax.Array) -> dict[str, jax.Array]:
        keys = jax.random.split(key, 5)
        truth = jax.random.normal(keys[0], (FEATURES,))
        x, x_val = (jax.random.normal(k, (ROWS, FEATURES)) for k in keys[1:3])
        wrong = jax.random.bernoulli(keys[3], noise, (ROWS,))
        y = jnp.where(wrong, 10 * jax.random.normal(keys[4], (ROWS,)), x @ truth)
        return {"x": x, "y": y, "wrong": wrong, "x_val": x_val, "y_val": x_val @ truth}

    def init(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        del key
        return jnp.zeros(FEATURES), jnp.zeros(ROWS)

    def batch(key: jax.Array, data: Any) -> Any:
        index, val_index = jax.random.randint(key, (2, BATCH), 0, ROWS)
        train = {"x": data["x"][index], "y": data["y"][index], "index": index}
        return train, {"x": data["x_val"][val_index], "y": data["y_val"][val_index]}

    def train_loss(w: jax.Array, lam: jax.Array, batch: Any) -> jax.Array:
        # Rows are found by their index, so that each device looks up the weights of its own rows.
        weights = jax.nn.sigmoid(lam[batch["index"]])
        return jnp.mean(weights * (batch["x"] @ w - batch["y"]) ** 2)

    def val_loss(w: jax.Array, lam: jax.Array, batch: Any) -> jax.Array:
        del lam
        return jnp.mean((batch["x"] @ w - batch["y"]) ** 2)

    return gradhpo.Problem(init, train_loss, val_loss, batch, data=data)


def main(
    steps: Annotated[int, typer.Option(min=1, help="Steps of the run.")] = 300,
    noise: Annotated[float, typer.Option(min=0, max=1, help="Share of random targets.")] = 0.3,
    devices: Annotated[int | None, typer.Option(help="By default all, if they divide.")] = None,
    seed: Annotated[int, typer.Option(help="Decides everything.")] = 0,
) -> None:
    """Train on one device, data-parallel, and with weights and λ divided over the devices too."""
    mesh = make_mesh(data=devices)
    one = gradhpo.OneStepOptimizer(optax.adam(0.03), optax.adam(0.05))
    ways: dict[str, gradhpo.BilevelOptimizer] = {
        "one device": one,
        "shard_map": data_parallel(one, mesh),
        "auto, fully sharded": data_parallel(one, mesh, backend="auto", rules=fully_sharded(mesh)),
    }
    console = Console()
    console.print(f"Devices: {mesh.size} of kind {mesh.devices.ravel()[0].device_kind}.")
    table = Table("way", "validation loss", "λ differs from one device's by", "λ on a device")
    task, reference = problem(noise), np.zeros(ROWS)
    for name, optimizer in ways.items():
        solution = gradhpo.solve(task, optimizer, steps, jax.random.key(seed))
        lam = solution.state.hyperparams
        reference = np.asarray(lam) if optimizer is one else reference
        difference = np.abs(np.asarray(lam) - reference).max() / np.abs(reference).max()
        held = lam.addressable_shards[0].data.size
        loss = f"{solution.metrics['val_loss'][-1]:.5f}"
        table.add_row(name, loss, f"{difference:.1e}, relative", f"{held} of {ROWS}")
    console.print(table)
    wrong = np.asarray(task.start_data(jax.random.key(seed))["wrong"])
    weights = 1 / (1 + np.exp(-reference))
    console.print(
        f"Mean weight of clean rows {weights[~wrong].mean():.2f}, of random ones "
        f"{weights[wrong].mean():.2f}.",
        highlight=False,
    )


if __name__ == "__main__":
    typer.run(main)
