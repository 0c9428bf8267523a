"""Population-based training in Ray Tune, one trial an actor: by default, and at its best."""

from __future__ import annotations

import functools
import logging
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")

import jax
import numpy as np
import ray
import trials
from measure import cores
from ray import tune
from ray.tune.schedulers import PopulationBasedTraining


@functools.cache
def shared(steps: int) -> tuple[Any, Any]:
    """Return the problem and the jitted generation of this process, for all trials that it runs."""
    problem = trials.problem()
    return problem, jax.jit(trials.generation(problem, steps))


def by_default(config: dict[str, Any]) -> None:
    """Run one trial: a function, with `jax.jit` inside."""
    problem = trials.problem()
    run = jax.jit(trials.generation(problem, config["steps"]))
    carry = trials.start(problem, jax.random.key(config["seed"]), np.log(config["decay"]))
    done = 0
    if (checkpoint := tune.get_checkpoint()) is not None:
        with checkpoint.as_directory() as folder:
            carry, done = _load(folder, carry, config)
    while True:
        carry, val_loss = run(carry, _key(config, done))
        done += 1
        with tempfile.TemporaryDirectory() as folder:
            _save(folder, carry, done, config)
            kept = tune.Checkpoint.from_directory(folder)
            tune.report({"val_loss": float(val_loss)}, checkpoint=kept)


class AtItsBest(tune.Trainable):
    """One trial: a class whose actor is used again, with a step of the module."""

    def setup(self, config: dict[str, Any]) -> None:
        """Start a trial."""
        problem, self.run_generation = shared(config["steps"])
        self.carry = trials.start(problem, jax.random.key(config["seed"]), np.log(config["decay"]))
        self.done_before = 0

    def step(self) -> dict[str, Any]:
        """Run a generation."""
        self.carry, val_loss = self.run_generation(self.carry, _key(self.config, self.done_before))
        self.done_before += 1
        return {"val_loss": float(val_loss)}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Write the trial."""
        _save(checkpoint_dir, self.carry, self.done_before, self.config)

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Read a trial, perhaps another's."""
        self.carry, self.done_before = _load(checkpoint, self.carry, self.config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Become another trial."""
        self.config = new_config
        self.setup(new_config)
        return True


class Times(tune.Callback):
    """When results came."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def on_trial_result(self, *args: Any, **info: Any) -> None:
        """Note one."""
        del args, info
        self.at.append(time.perf_counter())


def measure(
    best: bool, n: int, steps: int, generations: int, budget: float
) -> tuple[float, float, int]:
    """Return results a second after the first one, the seconds until then, and how many came.

    Args:
      best: whether Tune is at its best.
      n: trials.
      steps: of a generation.
      generations: after which a trial ends.
      budget: seconds after which all end.
    """
    started = time.perf_counter()  # as a sweep's start counts its Ray too
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1" if best else "0"
    env = {"PJRT_NPROC": "1", "JAX_PLATFORMS": "cpu"}
    ray.init(
        address="local", num_cpus=cores(), include_dashboard=False, log_to_driver=False,
        logging_level=logging.ERROR, runtime_env={"env_vars": env},
    )  # fmt: skip
    decay = tune.loguniform(trials.LOW, trials.HIGH)
    scheduler = PopulationBasedTraining(
        time_attr="training_iteration",
        perturbation_interval=1,
        hyperparam_mutations={"decay": decay},
        quantile_fraction=trials.QUANTILE,
        resample_probability=trials.RESAMPLE,
        perturbation_factors=trials.FACTORS,
        log_config=False,
    )
    times = Times()
    with tempfile.TemporaryDirectory() as folder:
        tuner = tune.Tuner(
            AtItsBest if best else by_default,
            param_space={"decay": decay, "steps": steps, "seed": tune.randint(0, 2**31 - 1)},
            tune_config=tune.TuneConfig(
                metric="val_loss", mode="min", num_samples=n, scheduler=scheduler,
                time_budget_s=budget, reuse_actors=best,
            ),
            run_config=tune.RunConfig(
                storage_path=folder, verbose=0, callbacks=[times],
                stop={"training_iteration": generations},
            ),
        )  # fmt: skip
        tuner.fit()
    ray.shutdown()
    if len(times.at) < 2:
        return float("nan"), float("nan"), len(times.at)
    first, last = times.at[0], times.at[-1]
    return (len(times.at) - 1) / (last - first), first - started, len(times.at)


def _key(config: dict[str, Any], done: int) -> jax.Array:
    return jax.random.fold_in(jax.random.key(config["seed"]), done)


def _save(folder: str, carry: Any, done: int, config: dict[str, Any]) -> None:
    arrays: dict[str, Any] = {f"leaf{i}": leaf for i, leaf in enumerate(jax.tree.leaves(carry))}
    np.savez(Path(folder) / "trial.npz", done=done, decay=config["decay"], **arrays)


def _load(folder: str, like: Any, config: dict[str, Any]) -> tuple[Any, int]:
    with np.load(Path(folder) / "trial.npz") as file:
        leaves = [file[f"leaf{i}"] for i in range(len(jax.tree.leaves(like)))]
        carry = jax.tree.unflatten(jax.tree.structure(like), leaves)
        if float(file["decay"]) != config["decay"]:  # the scheduler has changed it
            carry = trials.with_log_decay(carry, np.log(config["decay"]))
        return carry, int(file["done"])
