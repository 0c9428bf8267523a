"""Ways to find a mixture, compared: each trains a model on what it found, at counted FLOPs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradhpo import notebook
from gradhpo.errors import check_callable, check_count, check_instance, check_number
from gradhpo.flops import flops
from gradhpo.mixture.group_dro import group_dro, weighted
from gradhpo.mixture.problem import WEIGHTS, Mixture, check_weights
from gradhpo.mixture.swarm import predicted_best, simplex_grid, train_fixed
from gradhpo.optimizer import BilevelOptimizer
from gradhpo.parallel.batching import Batching
from gradhpo.problem import Problem
from gradhpo.solution import Solution
from gradhpo.solver import solve
from gradhpo.task import Task
from gradhpo.timetable import Timetable
from gradhpo.trial import Trial

UNIFORM, PROPORTIONAL, GROUP_DRO = "uniform", "proportional", "group DRO"
SWARM, REGRESSION = "swarm", "swarm + regression"
BASELINES = (UNIFORM, PROPORTIONAL, GROUP_DRO, SWARM, REGRESSION)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What `compare` found."""

    domains: tuple[str, ...]
    """Their names, in the order of the weights."""
    score: str
    """The metric in which models are compared, smaller being better."""
    weights: dict[str, np.ndarray]
    """By way of finding them, `(seeds, domains)`."""
    losses: dict[str, np.ndarray]
    """By the same, `(seeds,)`: `score` of a new model trained on the weights of that seed."""
    flops: dict[str, float]
    """By the same, FLOPs of the training that found them, of one seed."""
    training_flops: float
    """FLOPs of training one model."""
    swarm: np.ndarray
    """`(n, domains)`: the mixtures of the swarm."""
    swarm_losses: np.ndarray
    """`(seeds, n)`: `score` of the swarm's models."""
    paths: dict[str, np.ndarray]
    """By tuner, `(seeds, steps, domains)`: the weights after every step."""

    def gain(self, name: str) -> float:
        """Return what part of the swarm's gain over uniform weights a way has, in the means.

        1 is as much as the swarm's best; it may be more. NaN where the swarm has none.
        """
        uniform, swarm, found = (self.losses[x].mean() for x in (UNIFORM, SWARM, name))
        return float((uniform - found) / (uniform - swarm)) if uniform > swarm else float("nan")

    def rows(self) -> list[list[str]]:
        """Return a table: way, weights, loss, gain, FLOPs as models that could be trained."""
        return [
            [
                name,
                " ".join(f"{x:.3f}" for x in self.weights[name].mean(0)),
                f"{losses.mean():.4f}",
                f"{self.gain(name):.0%}",
                f"{self.flops[name] / self.training_flops:.1f}",
            ]
            for name, losses in self.losses.items()
        ]

    def __str__(self) -> str:
        table = [self._columns(), *self.rows()]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [zip(row, widths, strict=True) for row in table]
        return "\n".join("  ".join(cell.ljust(width) for cell, width in line) for line in lines)

    def _repr_html_(self) -> str:
        """Show the table in a notebook."""
        return notebook.table(self._columns(), self.rows())

    def _columns(self) -> list[str]:
        weights = f"weights: {', '.join(self.domains)}"
        return ["", weights, self.score, "of the swarm's gain", "cost in trainings"]


def compare(
    mixture: Mixture,
    tuners: Mapping[str, BilevelOptimizer],
    inner_optimizer: Any,
    steps: int,
    key: jax.Array,
    *,
    seeds: int = 5,
    swarm: Any = None,
    score: str | None = None,
    skip: float = 0.5,
    floor: float = 0.0,
    batching: Batching = "auto",
    progress: Callable[[str], Any] | None = None,
) -> Comparison:
    """Compare ways to find a mixture: by hypergradients, and without them.

    The others are uniform and proportional weights, DoReMi's group DRO, the best of a swarm of
    fixed mixtures, and the mixture that a regression on the swarm predicts to be best (RegMix).
    Each is found anew for each seed, and trains a new model, which no search has seen: with the
    same first weights and batches for all ways, and others than the searches'. A swarm chooses by
    the targets, as the tuners do.

    Args:
      mixture: the domains and targets.
      tuners: by name, optimizers of `mixture.problem`; their weights are averaged over a run.
      inner_optimizer: what trains all models that are not tuned.
      steps: of each training.
      key: decides all randomness.
      seeds: how often everything is done.
      swarm: `(n, domains)`: its mixtures; by default those of `simplex_grid` in eighths.
      score: a metric of `mixture.problem`; by default the first set that is held out, or the first
        target.
      skip: the part of a tuner's run that is left out of the mean over it, in [0, 1).
      floor: the least weight that the regression may give a domain.
      batching: how models are laid out, see `Population`.
      progress: told what is done next, a line each.

    Returns:
      What was found; `print` shows a table.

    Raises:
      ValueError: for a number out of range, or a tuner with the name of a baseline.
      TypeError: for an argument of the wrong kind.
    """
    check_instance("mixture", mixture, Mixture)
    check_count("steps", steps)
    check_count("seeds", seeds)
    check_skip(skip)
    for name, tuner in tuners.items():
        check_instance(f"tuners[{name!r}]", tuner, BilevelOptimizer)
        if name in BASELINES:
            raise ValueError(f"tuners must have other names than the baselines, got {name!r}")
    if progress is not None:
        check_callable("progress", progress)
    say = progress or (lambda text: None)
    targets = [f"target/{name}" for name in mixture.targets]
    score = score or next(iter(mixture.held_out), targets[0])
    if score not in (known := [*targets, *mixture.held_out]):
        raise ValueError(f"score must be one of {known}, got {score!r}")
    domains = len(mixture.names)
    swarm = simplex_grid(domains, 8) if swarm is None else swarm
    swarm = check_weights("swarm", np.atleast_2d(swarm), domains)
    search, fresh = (jax.random.split(k, seeds) for k in jax.random.split(key))

    def fixed(weights: np.ndarray, keys: jax.Array) -> dict[str, np.ndarray]:
        """Train `(seeds, n, domains)`; return metrics `(seeds, n)`."""
        n = weights.shape[1]
        each = jnp.repeat(keys, n)
        flat = weights.reshape(-1, domains)
        made = train_fixed(mixture, flat, inner_optimizer, steps, each, batching=batching)
        return {name: row.reshape(seeds, n) for name, row in made.items()}

    found: dict[str, np.ndarray] = {UNIFORM: np.full((seeds, domains), 1 / domains)}
    training = training_flops(mixture, inner_optimizer) * steps
    cost = {UNIFORM: 0.0}
    if mixture.sizes is not None or not mixture.on_host:
        found[PROPORTIONAL] = np.tile(mixture.proportional, (seeds, 1))
        cost[PROPORTIONAL] = 0.0
    say(GROUP_DRO)
    found[GROUP_DRO] = group_dro(mixture, inner_optimizer, steps, search, batching=batching)
    cost[GROUP_DRO] = steps * _group_dro_flops(mixture, inner_optimizer)
    say(f"a swarm of {len(swarm)} mixtures, {seeds} seeds")
    rows = fixed(np.tile(swarm, (seeds, 1, 1)), search)
    stacked = np.stack([rows[name] for name in targets], axis=-1)
    chosen_by = np.asarray(jax.vmap(jax.vmap(mixture.objective))(jnp.asarray(stacked)))
    found[SWARM] = swarm[np.nanargmin(chosen_by, axis=1)]
    found[REGRESSION] = np.stack([predicted_best(swarm, y, floor=floor) for y in chosen_by])
    cost |= dict.fromkeys((SWARM, REGRESSION), len(swarm) * training)
    paths: dict[str, np.ndarray] = {}
    for name, tuner in tuners.items():
        say(f"{name}, {seeds} seeds")
        runs = [
            solve(mixture.problem, tuner, steps, key, record=[WEIGHTS], progress=False)
            for key in search
        ]
        paths[name] = np.stack([np.asarray(run.record[WEIGHTS]) for run in runs])
        found[name] = np.stack([mean_weights(run, skip=skip) for run in runs])
        cost[name] = search_flops(mixture, tuner, steps)
    say(f"new models on the {len(found)} mixtures found, {seeds} seeds")
    final = fixed(np.stack(list(found.values()), axis=1), fresh)[score]
    losses = {name: final[:, i] for i, name in enumerate(found)}
    return Comparison(
        mixture.names, score, found, losses, cost, training, swarm, rows[score], paths
    )


def mean_weights(solution: Solution, *, skip: float = 0.5) -> np.ndarray:
    """Return the mean of a run's weights, the mixture to train with.

    A hypergradient of a few steps asks which domain helps now; a mixture that is held has to help
    all along. DoReMi, too, uses the mean over a run.

    Args:
      solution: of `solve(..., record=["weights"])` on a mixture's problem.
      skip: the part of the run, at its beginning, that is left out, in [0, 1).

    Returns:
      `(domains,)`, or `(runs, domains)`.

    Raises:
      ValueError: if the weights were not recorded, no step was taken, or for a number out of range.
    """
    check_instance("solution", solution, Solution)
    check_skip(skip)
    if WEIGHTS not in solution.record or not len(solution.record[WEIGHTS]):
        raise ValueError(f'the weights were not recorded: call solve with record=["{WEIGHTS}"]')
    path = np.asarray(solution.record[WEIGHTS])
    return np.nanmean(path[int(skip * len(path)) :], axis=0)


def check_skip(skip: float) -> None:
    """Raise unless a part of the run is left."""
    if check_number("skip", skip, 0, 1) == 1:
        raise ValueError("skip must be below 1, got 1")


def rank_correlation(a: Any, b: Any) -> float:
    """Return Spearman's rank correlation of two losses of the same mixtures, `(n,)` each.

    Whether a small model orders mixtures as a large one does. Ties have their mean rank.

    Raises:
      ValueError: for fewer than two numbers, or lengths that differ.
    """
    a, b = np.asarray(a, float), np.asarray(b, float)
    if a.ndim != 1 or a.shape != b.shape or len(a) < 2:
        raise ValueError(f"both must have shape (n,), n at least 2, got {a.shape} and {b.shape}")
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def _ranks(x: np.ndarray) -> np.ndarray:
    _, where, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[where]


# --- FLOPs, as XLA counts them --------------------------------------------------------------------


def training_flops(mixture: Mixture, inner_optimizer: Any) -> float:
    """Return the FLOPs of a step of training alone: the gradient, and the inner optimizer's move.

    Before XLA's own simplifications, as all FLOPs here; see `search_flops`.
    """

    def step(params: Any, opt_state: Any, hyperparams: Any, batch: Any) -> Any:
        optimizer = _built(inner_optimizer, hyperparams)
        loss, grads = jax.value_and_grad(mixture.train_loss)(params, hyperparams, batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    (params, hyperparams), (train, _) = _shapes(mixture.problem)
    opt_state = jax.eval_shape(
        lambda params, hyperparams: _built(inner_optimizer, hyperparams).init(params),
        params,
        hyperparams,
    )
    return flops(step, params, opt_state, hyperparams, train)


def search_flops(mixture: Mixture, tuner: BilevelOptimizer, steps: int) -> float:
    """Return the FLOPs of a run of `solve` that tunes the mixture, calibrations included.

    Batches are not counted, which are drawn and not computed.
    """
    problem = mixture.problem
    trial = Trial(problem.described(), tuner, Timetable.of(tuner, None))
    key = jax.random.key(0)
    data = jax.eval_shape(problem.start_data, key)
    (_, _), (train, val) = _shapes(problem)
    host = None if problem.batches is None else (train, val)
    state = jax.eval_shape(trial.start, key, data, None, host)

    def task(train: Any, val: Any) -> Task:
        return Task(train, val, problem.train_loss, problem.val_loss)

    total = steps * flops(lambda s, a, b: tuner.advance(s, task(a, b)), state, train, val)
    if tuner.calibration_period:
        stack = jax.tree.map(lambda x: jax.ShapeDtypeStruct((tuner.T, *x.shape), x.dtype), train)
        total += flops(lambda s, a, b: tuner.calibrate(s, task(a, b)), state, stack, val)
    return total


def _group_dro_flops(mixture: Mixture, inner_optimizer: Any) -> float:
    """Return those of a step: of the reference's, the proxy's, and the losses of both."""
    mixture = weighted(mixture)
    (params, _), (train, _) = _shapes(mixture.problem)
    losses = flops(mixture.row_losses, params, train["rows"])
    return 2 * (training_flops(mixture, inner_optimizer) + losses)


def _shapes(problem: Problem) -> tuple[Any, Any]:
    """Return the shapes of the start and of a pair of batches."""
    key = jax.random.key(0)
    start = jax.eval_shape(problem.start, key)
    if problem.batches is not None:
        return start, problem.first_pair()
    data = jax.eval_shape(problem.start_data, key)
    return start, jax.eval_shape(lambda k, d: problem.draw_at(k, 0, d), key, data)


def _built(inner_optimizer: Any, hyperparams: Any) -> Any:
    given = isinstance(inner_optimizer, optax.GradientTransformation)
    return inner_optimizer if given else inner_optimizer(hyperparams)
