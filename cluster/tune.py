"""Ray Tune around sweeps: one Tune trial is one whole population.

Tune then compares what a sweep itself does not search: schedulers, steps in a generation, seeds,
programs. Needs `pip install 'gradhpo[tune]'`; nothing else in the package imports this module.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gradhpo.checkpoints import DamagedFile
from gradhpo.cluster import settings as settings_of
from gradhpo.cluster.failures import SweepError
from gradhpo.cluster.space import SearchSpace
from gradhpo.cluster.sweep import Sweep
from gradhpo.cluster.worker import environment
from gradhpo.files import Where

try:
    from ray import tune
except ImportError as error:
    raise ImportError("gradhpo.cluster.tune needs Ray Tune: pip install 'gradhpo[tune]'") from error

__all__ = ["population_trainable"]

FIXED = {
    "executor": "a Tune trial runs its sweep in its own process",
    "workers": "a Tune trial has one process; run more trials at a time",
}


def population_trainable(storage: Where, **settings: Any) -> Callable[[dict[str, Any]], None]:
    """Return a trainable for `ray.tune.Tuner` that runs one `Sweep` in each Tune trial.

    A name in Tune's `param_space` that is an argument of `Sweep` replaces it for the trial; every
    other is a choice with one value, see `SearchSpace.choices`: an argument of the functions that
    make the problem and the optimizer.

    Each generation is reported to Tune: `generation` (from 1), `best` (the metric of the best trial
    so far), `median` (of this generation's trials that have not diverged), `diverged` (how many
    have), and `storage`, where `gradhpo best` finds the sweep. Compare populations by `best`, with
    the mode of the sweep.

    What lasts is the sweep's storage, so Tune saves no checkpoints. A trial that Tune starts again
    (`FailureConfig(max_failures=…)`, `Tuner.restore`) goes on after the last generation in its
    storage, which it reports once more. Schedulers of Tune that stop trials work, such as ASHA;
    those that copy checkpoints between trials cannot.

    Args:
      storage: a folder that all nodes see, or the address of a store; each trial's sweep lies in
        a folder below it, named after the experiment and the trial.
      **settings: the arguments of `Sweep`, by name, without those that say where it runs.

    Raises:
      ValueError: for `executor` or `workers`, here or in `param_space`.
    """
    _refuse_fixed(settings)
    root = settings_of.folder_of(storage)
    folder = Path.cwd()

    def population(config: dict[str, Any]) -> None:
        context = tune.get_context()
        _use(context.get_trial_resources().required_resources)
        place = settings_of.below(root, context.get_experiment_name(), context.get_trial_id())
        if folder.is_dir():  # references are looked up where they were given
            os.chdir(folder)
        _run(_sweep(settings, config, place))

    return population


def _sweep(settings: Mapping[str, Any], config: Mapping[str, Any], place: Where) -> Sweep:
    _refuse_fixed(config)
    accepted = settings_of.names()
    given: dict[str, Any] = {"progress": False, **settings}
    given |= {name: value for name, value in config.items() if name in accepted}
    given |= {"storage": place, "executor": "local"}
    choices = {name: [value] for name, value in config.items() if name not in accepted}
    if choices:
        space: SearchSpace = given["space"]
        given["space"] = dataclasses.replace(space, choices={**space.choices, **choices})
    return Sweep(**given)


def _run(sweep: Sweep) -> None:
    instead = "A Tune trial reports one metric"
    metric, sign = sweep.identity.objectives.only("Tune has one metric", instead)
    best = np.inf

    def report(generation: int, table: Mapping[str, np.ndarray]) -> None:
        nonlocal best
        scores = sign * table[metric]
        finite = scores[np.isfinite(scores)]
        best = min(best, finite.min(initial=np.inf))
        tune.report(
            {
                "generation": generation,
                "best": sign * float(best) if np.isfinite(best) else float("nan"),
                "median": sign * float(np.median(finite)) if len(finite) else float("nan"),
                "diverged": len(scores) - len(finite),
                "storage": str(sweep.storage),
            }
        )

    with contextlib.suppress(SweepError, DamagedFile):  # no generation is done; `run` looks again
        before = sweep.result()
        earlier = sign * before.table[metric]
        best = earlier[np.isfinite(earlier)].min(initial=np.inf)
        report(before.generations, before.final)
    sweep.run(callback=report)


def _use(resources: Mapping[str, float]) -> None:
    """Let JAX, before its backend starts, see what Tune gave the trial and no more."""
    names = {"CPU": "num_cpus", "GPU": "num_gpus"}
    given = {names.get(name, name): n for name, n in resources.items() if n > 0}
    wanted = environment(given, {})
    os.environ.update(wanted)
    if "JAX_PLATFORMS" in wanted:  # JAX has read it already, when it was imported
        jax.config.update("jax_platforms", wanted["JAX_PLATFORMS"])


def _refuse_fixed(given: Mapping[str, Any]) -> None:
    for name, reason in FIXED.items():
        if name in given:
            raise ValueError(f"{name} is not for a population in Ray Tune: {reason}")
