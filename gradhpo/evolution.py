"""Evolution strategies: the gradient of a smoothed loss, from its values alone.

`∇_λ E_ε[L(λ + ε)] = E_ε[(L(λ + ε) - L(λ - ε)) ε] / 2σ²`, `ε ~ N(0, σ²I)`: the two of a pair walk
with perturbations of opposite sign. The methods differ in what they perturb by, and weight with.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from gradhpo.drawing import DrawingMethod
from gradhpo.errors import check_count, check_number
from gradhpo.hypergradient import Validation, at_least_float32
from gradhpo.inner import Moved
from gradhpo.optimizer import Estimate
from gradhpo.state import BilevelState, PyTree
from gradhpo.task import Carried, Task

Objective: TypeAlias = Literal["last", "mean"]
"""Which validation losses of a window count: that after its last inner step, or the mean of all."""

OBJECTIVES = ("last", "mean")
SIGNS = (1.0, -1.0)
"""Of the perturbation of the two particles of a pair."""


class Walker(NamedTuple):
    """Where a particle stands."""

    params: PyTree
    inner_opt_state: PyTree
    model_state: PyTree

    @classmethod
    def of(cls, state: BilevelState) -> Walker:
        """Return a particle that stands where the state does."""
        return cls(state.params, state.inner_opt_state, state.model_state)

    def at(self, state: BilevelState, hyperparams: PyTree) -> BilevelState:
        """Return the state with the particle's own weights, at these hyperparameters."""
        return state.update(hyperparams=hyperparams, **self._asdict())

    @classmethod
    def after(cls, moved: Moved) -> Walker:
        """Return the particle after its inner steps."""
        carried = moved.carried
        return cls(carried.whole(moved.params), carried.opt_state, carried.model_state)


@dataclasses.dataclass(frozen=True)
class EvolutionMethod(DrawingMethod):
    """A method that perturbs λ, walks K inner steps with each perturbation, and compares losses.

    A step is a window of K = `unroll_steps` inner steps. Beside the particles the state's own
    weights walk it at λ itself: they are what is trained. All see the same batches and keys.
    """

    inner_optimizer: Any = None
    outer_optimizer: Any = None
    unroll_steps: int = 1
    particles: int = 100
    sigma: float = 0.1
    update_fn: Callable[..., Any] | None = None
    batches: Literal["repeat", "stack"] = "repeat"
    objective: Objective = "last"
    T: int = 20
    chunk: int | None = None
    mesh: Mesh | None = None
    axis: str = "trial"

    zero_order = True

    def __post_init__(self) -> None:
        if check_count("particles", self.particles, 2) % 2:
            raise ValueError(f"particles must be even, as they walk in pairs; got {self.particles}")
        super().__post_init__()
        check_count("T", self.T)
        sigma = check_number("sigma", self.sigma, 0, float("inf"), open_low=True)
        object.__setattr__(self, "sigma", sigma)
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective must be one of {OBJECTIVES}, got {self.objective!r}")

    @property
    def drawn(self) -> tuple[str, int]:
        """Pairs of particles."""
        return "particles / 2", self.particles // 2

    @property
    def keeps(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Where the particles stand and how they were perturbed, where they go on."""
        return ("particles", "perturbations") if self.persists else ()

    @abc.abstractmethod
    def perturbation(
        self, fresh: PyTree, before: PyTree, begins: jax.Array
    ) -> tuple[PyTree, PyTree]:
        """Return what λ is perturbed by in this window, and what weights the losses' difference.

        Args:
          fresh: a draw from N(0, σ²I), shaped like λ.
          before: the weight of the last window; None where nothing is kept.
          begins: whether this window is the first of an episode.
        """

    def memory(self, state: BilevelState) -> dict[str, Any]:
        """Return the particles of all pairs, `(pairs, 2, …)`, and their weights, `(pairs, …)`."""
        if not self.persists:
            return {}
        pairs = self.drawn[1]

        def spread(x: jax.Array) -> jax.Array:
            return jnp.broadcast_to(x, (pairs, len(SIGNS), *x.shape))

        def nothing(x: jax.Array) -> jax.Array:
            return jnp.zeros((pairs, *x.shape), x.dtype)

        walkers = jax.tree.map(spread, Walker.of(state))
        weights = jax.tree.map(nothing, state.hyperparams)
        return {"particles": walkers, "perturbations": weights}

    def estimate(self, state: BilevelState, task: Task) -> Estimate:
        """Return the mean of the pairs' estimates, with the step of the state's own weights."""
        moved, val = self._walk(state, task)
        mean, memory = self.averaged(self._pair, state, task)
        return Estimate.of(optax.tree.cast_like(mean, state.hyperparams), moved, val, memory)

    def _pair(
        self, key: jax.Array, kept: dict[str, Any], state: BilevelState, task: Task
    ) -> tuple[PyTree, dict[str, Any]]:
        """Return a pair's estimate, and where it then stands."""
        lam, begins = state.hyperparams, state.step == 0
        fresh = optax.tree.scale(self.sigma, self.draw(key, lam, jax.random.normal))
        shift, weight = self.perturbation(fresh, kept.get("perturbations"), begins)

        def walk(sign: jax.Array, walker: Walker) -> tuple[jax.Array, Walker]:
            there = jax.tree.map(lambda x, d: x + sign.astype(x.dtype) * d, lam, shift)
            moved, val = self._walk(walker.at(state, there), task)
            return val.loss, Walker.after(moved)

        at, axis = Walker.of(state), None
        if self.persists:
            # At the beginning of an episode all start from the state, whatever moved it there.
            at, axis = jax.tree.map(lambda x, y: jnp.where(begins, x, y), at, kept["particles"]), 0
        losses, walkers = jax.vmap(walk, in_axes=(0, axis))(jnp.asarray(SIGNS), at)
        slope = at_least_float32(losses[0] - losses[1]) / (2 * self.sigma**2)
        kept = {"particles": walkers, "perturbations": weight} if self.persists else {}
        return optax.tree.scale(slope, at_least_float32(weight)), kept

    def _walk(self, state: BilevelState, task: Task) -> tuple[Moved, Validation]:
        """Take the K inner steps from a state at its λ, and return its objective."""
        inner, lam = self.inner_step(task.train_loss), state.hyperparams
        if self.objective == "last":
            moved = self.unroll(inner, state, task, lam)
            loss, metrics = task.validate(moved.params, moved.carried, lam)
            return moved, Validation(loss, None, None, metrics)
        batch_at = self.batch_at(task.train_batch)

        def body(carry: tuple[PyTree, Carried], t: Any) -> tuple[Any, Any]:
            moved = inner(*carry, lam, batch_at(t))
            val = task.validate(moved.params, moved.carried, lam)
            return (moved.params, moved.carried), (moved.train_loss, moved.metrics, val)

        end, told = jax.lax.scan(body, task.start(state), jnp.arange(self.unroll_steps))
        train_loss, metrics, (losses, val_metrics) = told
        last = jax.tree.map(lambda rows: rows[-1], (train_loss, metrics, val_metrics))
        moved = Moved(*end, *last[:2])
        return moved, Validation(losses.mean(), None, None, last[2])
