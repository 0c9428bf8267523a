"""HyperDistill: the second-order term distilled into one VJP (Lee et al. ICLR 2022).

`g_t = g_FO + θ·(1 - γ^t)/(1 - γ)·α_t·∂Φ(w*_t, λ; D*_t)/∂λ` (eq. 15), θ by Algorithm 4.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from gradhpo import ema
from gradhpo.compilation import jit
from gradhpo.errors import check_count, check_number, stack, stack_length
from gradhpo.hypergradient import Mode, at_least_float32, norm, validation
from gradhpo.optimizer import Estimate, HypergradientMethod
from gradhpo.state import BilevelState, LossFn, PyTree, as_array, prepare, remembered
from gradhpo.task import Carried, Task


@dataclass(frozen=True)
class OnlineHypergradientOptimizer(HypergradientMethod):
    """HyperDistill: hypergradients of a long horizon at the cost of one more VJP a step.

    `metadata` holds `w_star` (w*_t, in float32 at least), `theta` (θ, a scalar, 1 until estimated)
    and `phi` (the initialization of the episode).

    Args:
      inner_optimizer: an `optax.GradientTransformation`, or a function of λ that returns one.
      outer_optimizer: an `optax.GradientTransformation` for λ, in place of `lr_hyper`.
      gamma: γ in [0, 1], the weight of the past. With 0 and θ = 1 this is One-Step.
      estimation_period: episodes between two estimates of θ.
      T: steps in an episode, and in an estimate of θ.
      update_fn: `(params, hyperparams, batch) -> params`, in place of `inner_optimizer`.
      scale: "paper" for eq. 15; "unit" for `g_FO + v_t/‖v_t‖`, which the paper uses where `g_FO`
        is identically 0, and for which θ is not estimated.
      distill_data: mix the batch as the weights (eq. 14): D*_t keeps `round(p_t·|D|)` rows of
        D*_{t-1}, and takes the rest from D_t, at random. `init` then needs a batch and a key.
      mode: how `α·∂Φ/∂λ` is taken: "reverse-over-reverse", "forward-over-reverse" or
        "reverse-over-forward", equal but for rounding. "auto" is the first, of the fewest FLOPs;
        the others need less memory where λ acts deep in a model of rematerialized blocks. An
        `update_fn` has the first alone.

    Raises:
      ValueError: if neither or both of `inner_optimizer` and `update_fn` are given, or a number
        is out of range.

    References:
      Lee et al., Online Hyperparameter Meta-Learning with Hypergradient Distillation, ICLR 2022.
    """

    inner_optimizer: Any = None
    outer_optimizer: Any = None
    gamma: float = 0.99
    estimation_period: int = 50
    T: int = 20
    update_fn: Callable[..., Any] | None = None
    scale: Literal["paper", "unit"] = "paper"
    distill_data: bool = False
    mode: Mode = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "gamma", check_number("gamma", self.gamma, 0, 1))
        check_count("estimation_period", self.estimation_period)
        check_count("T", self.T)
        if self.scale not in ("paper", "unit"):
            raise ValueError(f'scale must be "paper" or "unit", got {self.scale!r}')

    @property
    def calibration_period(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Episodes between two estimates of θ; 0 where none is needed."""
        return self.estimation_period if self.scale == "paper" else 0

    @property
    def remembers_batch(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether `init` needs a training batch and a key."""
        return self.distill_data

    def init(
        self,
        params: PyTree,
        hyperparams: PyTree,
        train_batch: PyTree = None,
        key: jax.Array | None = None,
        *,
        model_state: PyTree = None,
    ) -> BilevelState:
        """Return the state before the first step; see `BilevelOptimizer.init`.

        Args:
          params: weights, a pytree of floating arrays.
          hyperparams: hyperparameters, a pytree of floating arrays.
          model_state: what the losses remember, a pytree of arrays, for losses that take it.
          train_batch: with `distill_data`, a batch like those to come.
          key: with `distill_data`, the key that chooses rows.
        """
        needed = train_batch is not None and key is not None
        if self.distill_data and not needed:
            raise ValueError("distill_data=True needs init(..., train_batch=, key=)")
        if not self.distill_data and (train_batch is not None or key is not None):
            raise ValueError("init takes train_batch and key only with distill_data=True")
        state = super().init(params, hyperparams, model_state=model_state)
        phi = jax.tree.map(jnp.copy, state.params)  # in buffers of its own
        memory = {"w_star": ema.distilled_start(state.params), "theta": 1.0, "phi": phi}
        if self.distill_data:
            stack_length("train_batch", train_batch)
            memory |= {"d_star": jax.tree.map(as_array, train_batch), "key": key}
        return prepare(state.update(metadata=memory))

    def reset(self, state: BilevelState, params: PyTree) -> BilevelState:
        """Return `state` at the beginning of an episode that starts from `params`."""
        state = super().reset(state, params)
        return state.update(metadata={"w_star": ema.distilled_start(params), "phi": params})

    def estimate(self, state: BilevelState, task: Task) -> Estimate:
        """Return eq. 15 with `w_t`."""
        (w, s), lam, t = task.start(state), state.hyperparams, state.step + 1
        train_batch, inner = task.train_batch, self.inner_step(task.train_loss)
        keep = ema.keep_fraction(self.gamma, t)
        memory = self._distill_batch(state, train_batch, keep)
        d_star = memory.get("d_star", train_batch)
        w_star = ema.distilled_point(remembered(state, "w_star"), w, keep)
        if self.gamma == 0:
            moved, pull = inner.pullback(w, s, lam, train_batch)  # w*_t = w_{t-1}
        else:
            moved = inner(w, s, lam, train_batch)
            pull = inner.pullback(optax.tree.cast_like(w_star, w), s, lam, d_star)[1]
        val = validation(task, moved.params, moved.carried, lam)
        v = pull(val.alpha)
        second = optax.tree.scale(self._factor(v, remembered(state, "theta"), t), v)
        hypergradient = optax.tree.add(val.direct, optax.tree.cast_like(second, lam))
        return Estimate.of(hypergradient, moved, val, {**memory, "w_star": w_star})

    def estimate_theta(
        self,
        state: BilevelState,
        train_batches: PyTree,
        val_batch: PyTree,
        train_loss_fn: LossFn,
        val_loss_fn: LossFn,
        *,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Return θ (Algorithm 4), from a run that starts at the state's weights.

        Memory grows with T copies of the weights and of the inner optimizer's state.

        Args:
          state: its weights, λ and the inner optimizer's state are used; nothing is changed.
          train_batches: a list of batches, of any length; or a stack of T of them, a batch with
            a leading axis of length T added.
          val_batch: a pytree of arrays, passed to `val_loss_fn`.
          train_loss_fn: `(params, hyperparams, batch) -> scalar`, or more: see `Problem`.
          val_loss_fn: `(params, hyperparams, batch) -> scalar`, or more: see `Problem`.
          key: for losses that take a `key`.

        Returns:
          θ, a scalar array: `xᵀy/xᵀx`, or 1 where there is no second-order signal (x = 0).
        """
        if isinstance(train_batches, list):
            train_batches = stack("train_batches", train_batches)
        else:
            stack_length("train_batches", train_batches, expected=self.T)
        task = Task.of(train_batches, val_batch, train_loss_fn, val_loss_fn, key)
        return _theta(self, prepare(state), task)

    def calibrate(self, state: BilevelState, task: Task) -> BilevelState:
        """Return `state` with θ estimated anew; an estimate that diverges leaves θ as it was."""
        theta = _algorithm_4(self, state, task)
        before = as_array(remembered(state, "theta"))
        theta = jnp.where(jnp.isfinite(theta), as_array(theta, before.dtype), before)
        return state.update(metadata={"theta": theta})

    def _factor(self, v: PyTree, theta: jax.Array, t: jax.Array) -> jax.Array:
        if self.scale == "unit":
            return _inverse(norm(v))
        return theta * ema.geometric_sum(self.gamma, t)

    def _distill_batch(self, state: BilevelState, batch: PyTree, keep: jax.Array) -> dict[str, Any]:
        if not self.distill_data:
            return {}
        key, rows_key = jax.random.split(remembered(state, "key"))
        d_star = _mix_rows(remembered(state, "d_star"), batch, keep, rows_key)
        return {"key": key, "d_star": d_star}


def _mix_rows(old: PyTree, new: PyTree, keep: jax.Array, key: jax.Array) -> PyTree:
    """Return eq. 14: `round(keep·n)` rows of `old`, at random, and the rest from `new`."""
    n = stack_length("train_batch", new)
    kept = jax.random.permutation(key, n) < jnp.round(keep * n)

    def mix(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(kept.reshape(-1, *[1] * (b.ndim - 1)), a, b)

    return jax.tree.map(mix, old, new)


def _inverse(x: jax.Array) -> jax.Array:
    return jnp.where(x == 0, 0, 1 / jnp.where(x == 0, 1, x))


def _algorithm_4(
    optimizer: OnlineHypergradientOptimizer, state: BilevelState, task: Task
) -> jax.Array:
    lam, gamma, inner = state.hyperparams, optimizer.gamma, optimizer.inner_step(task.train_loss)
    batches, start = task.train_batch, task.start(state)
    T = stack_length("train_batches", batches)

    def forward(carry: tuple[PyTree, Carried], batch: PyTree) -> tuple[Any, Any]:
        moved = inner(*carry, lam, batch)
        return (moved.params, moved.carried), carry

    (w_T, s_T), trajectory = jax.lax.scan(forward, start, batches)
    w_0, alpha_T = start[0], validation(task, w_T, s_T, lam).alpha

    def backward(carry: Any, step: Any) -> Any:
        alpha, g_so, w_star, d_star = carry
        t, (w_prev, s_prev), batch, key = step
        s = T - t + 1
        line = (t - 1) / T
        w_hat = jax.tree.map(lambda a, b: (a + line * (b - a)).astype(a.dtype), w_0, w_T)
        alpha, alpha_b = inner.pullback_both(w_hat, s_prev, lam, batch)(alpha)
        g_so = optax.tree.add(g_so, at_least_float32(alpha_b))
        keep = ema.keep_fraction_backward(gamma, s)  # eq. 17; 0 at s = 1
        w_star = ema.distilled_point(w_star, w_prev, keep)
        d_star = _mix_rows(d_star, batch, keep, key) if optimizer.distill_data else batch
        at = optax.tree.cast_like(w_star, w_prev)
        v = at_least_float32(inner.pullback(at, s_prev, lam, d_star)[1](alpha_T))
        length = norm(v)
        x = length * ema.geometric_sum(gamma, s)
        y = optax.tree.vdot(optax.tree.scale(_inverse(length), v), g_so)
        return (alpha, g_so, w_star, d_star), (x, y)

    key = remembered(state, "key") if optimizer.distill_data else jax.random.key(0)
    first_batch = jax.tree.map(lambda x: x[-1], batches)
    nothing = at_least_float32(optax.tree.zeros_like(lam))
    last = (alpha_T, nothing, at_least_float32(w_T), first_batch)
    steps = (jnp.arange(1, T + 1), trajectory, batches, jax.random.split(key, T))
    _, (x, y) = jax.lax.scan(backward, last, steps, reverse=True)
    signal = jnp.vdot(x, x)
    return jnp.where(signal == 0, 1, jnp.vdot(x, y) / jnp.where(signal == 0, 1, signal))


@functools.partial(jit, static_argnums=0)
def _theta(optimizer: OnlineHypergradientOptimizer, state: BilevelState, task: Task) -> jax.Array:
    return _algorithm_4(optimizer, state, task.at(state.step))
