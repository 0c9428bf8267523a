"""`BilevelOptimizer`: the interface of every algorithm, its `step`, and the outer update."""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradhpo import episodes
from gradhpo.compilation import jit
from gradhpo.dependence import dependents
from gradhpo.errors import (
    check_exactly_one,
    check_floating,
    check_hashable,
    check_same_tree,
)
from gradhpo.hypergradient import MODES, Mode, norm, validation
from gradhpo.injected import check_initial_state
from gradhpo.inner import InnerStep, is_optax, optimizer_at
from gradhpo.reach import Ways, check_reach
from gradhpo.recompiles import note_compile
from gradhpo.state import BilevelState, LossFn, PyTree, as_array, prepare
from gradhpo.updates import updated


class Estimate(NamedTuple):
    """What an algorithm's mathematics gives for one step: a hypergradient and the moved weights."""

    hypergradient: PyTree
    """Shaped like the hyperparameters."""
    params: PyTree
    """`w_t`."""
    inner_opt_state: PyTree
    """`s_t`."""
    train_loss: jax.Array
    """Scalar, at the weights before the step."""
    val_loss: jax.Array
    """Scalar, at the weights after the step."""
    metadata: dict[str, Any] | None = None
    """What the algorithm itself remembers, by name."""


class BilevelOptimizer(abc.ABC):
    """Tunes hyperparameters by hypergradients while the weights train.

    To write an optimizer, define `init` and `compute_hypergradient`; `step` and `run` then work.
    Define `estimate` instead of leaving it to its default where the hypergradient and the inner
    step share work.
    """

    inner_optimizer: Any = None
    outer_optimizer: Any = None
    update_fn: Callable[[Any, Any, Any], Any] | None = None
    mode: Mode = "auto"
    """How exact derivatives of the inner step are taken."""
    auto_mode: Mode = "reverse-over-reverse"
    """What `mode="auto"` means with an `inner_optimizer`. One product a step is cheapest so: the
    linearization that moves the weights is the one that is pulled back."""

    T: int = 20
    """Steps in an episode of `run`."""
    calibration_period: int = 0
    """Episodes between two calls of `calibrate`; 0 for never."""
    batch_axis: int = 0
    """The axis of `train_batch` that counts examples."""
    remembers_batch: bool = False
    """Whether `init` also takes `train_batch` and `key`."""

    def __init__(self, inner_optimizer: Any = None, outer_optimizer: Any = None) -> None:
        self.inner_optimizer = inner_optimizer
        self.outer_optimizer = outer_optimizer

    @abc.abstractmethod
    def init(self, params: PyTree, hyperparams: PyTree) -> BilevelState:
        """Return the state before the first step.

        Args:
          params: weights, a pytree of floating arrays.
          hyperparams: hyperparameters, a pytree of floating arrays.

        Raises:
          TypeError: if a leaf is not a floating array; it is named by its path.
          ValueError: if a tree has no leaves; or if the inner optimizer's `init` reads a leaf of λ
            that moves by its hypergradient, which cannot see it (but `optax.inject_hyperparams`
            is followed).
        """

    @abc.abstractmethod
    def compute_hypergradient(
        self,
        state: BilevelState,
        train_batch: PyTree,
        val_batch: PyTree,
        train_loss_fn: LossFn,
        val_loss_fn: LossFn,
    ) -> PyTree:
        """Return the hypergradient that `step` would apply from `state`, shaped like λ."""

    def estimate(
        self,
        state: BilevelState,
        train_batch: PyTree,
        val_batch: PyTree,
        train_loss_fn: LossFn,
        val_loss_fn: LossFn,
    ) -> Estimate:
        """Return the hypergradient together with the step of the weights it was computed from.

        Pure and traceable. By default `compute_hypergradient` beside a separate inner step.
        """
        hypergradient = self.compute_hypergradient(
            state, train_batch, val_batch, train_loss_fn, val_loss_fn
        )
        moved = self.inner_step(train_loss_fn)(
            state.params, state.inner_opt_state, state.hyperparams, train_batch
        )
        val = validation(val_loss_fn, moved.params, state.hyperparams, val_batch)
        return Estimate(hypergradient, moved.params, moved.opt_state, moved.train_loss, val.loss)

    def step(
        self,
        state: BilevelState,
        train_batch: PyTree,
        val_batch: PyTree,
        train_loss_fn: LossFn,
        val_loss_fn: LossFn,
        lr_hyper: Any = None,
    ) -> BilevelState:
        """Take one step of the weights and one of the hyperparameters.

        Compiled once for each optimizer, pair of losses and shapes: the compiled step is looked
        up by the loss functions, so define them once, and not anew at every call. It needs no
        `jax.jit` around it; inside another traced program, `advance` is the same step. Nothing
        stops a loop that diverges: look at `state.finite()` now and then, as `solve` and `run` do.

        Args:
          state: from `init` or an earlier step; it stays valid (nothing is donated).
          train_batch: a pytree of arrays, passed to `train_loss_fn`.
          val_batch: a pytree of arrays, passed to `val_loss_fn`.
          train_loss_fn: `(params, hyperparams, batch) -> scalar`.
          val_loss_fn: `(params, hyperparams, batch) -> scalar`.
          lr_hyper: step size of plain gradient descent on λ, where there is no
            `outer_optimizer`; a number or a scalar array, traced.

        Returns:
          The state after the step, with the metrics `METRICS` in its `metadata`.

        Raises:
          ValueError: if neither or both of `outer_optimizer` and `lr_hyper` are given, or a loss
            is not scalar.
          TypeError: if a loss does not return a floating-point number.

        Warns:
          UnreachedWarning: if a hyperparameter gets no hypergradient, whatever the numbers.
          RecompileWarning: if a loss is a new function at every call.
        """
        self.check_step(train_loss_fn, val_loss_fn, lr_hyper)
        state, lr_hyper = prepare(state), rate(lr_hyper)
        return _step(self, state, train_batch, val_batch, train_loss_fn, val_loss_fn, lr_hyper)

    def lower_step(
        self,
        state: BilevelState,
        train_batch: PyTree,
        val_batch: PyTree,
        train_loss_fn: LossFn,
        val_loss_fn: LossFn,
        lr_hyper: Any = None,
    ) -> jax.stages.Lowered:
        """Return the program of `step`, lowered: its text, and `compile()` for XLA's own figures.

        The arguments are those of `step`; the compiled program takes the state, the two batches
        and `lr_hyper`.
        """
        self.check_step(train_loss_fn, val_loss_fn, lr_hyper)
        state, lr_hyper = prepare(state), rate(lr_hyper)
        arguments = (state, train_batch, val_batch, train_loss_fn, val_loss_fn, lr_hyper)
        return _step.lower(self, *arguments)

    def advance(
        self,
        state: BilevelState,
        train_batch: PyTree,
        val_batch: PyTree,
        train_loss_fn: LossFn,
        val_loss_fn: LossFn,
        lr_hyper: Any = None,
    ) -> BilevelState:
        """Take the step of `step` as a pure function, for use inside another traced program.

        In a loop of one's own around it, XLA's CPU compiler runs convolutions slowly: `solve`,
        `run` and a population bring them into the fast form first.
        """
        done = self.estimate(state, train_batch, val_batch, train_loss_fn, val_loss_fn)
        chex.assert_rank([done.train_loss, done.val_loss], 0)
        check_same_tree("hypergradient", done.hypergradient, "hyperparams", state.hyperparams)
        hyperparams, outer_opt_state = self._outer_update(done, state, lr_hyper)
        metrics = {
            "train_loss": done.train_loss,
            "val_loss": done.val_loss,
            "hypergrad_norm": norm(done.hypergradient),
            "param_norm": norm(done.params),
            "hyperparam_norm": norm(hyperparams),
        }
        new = state.update(
            params=done.params,
            hyperparams=hyperparams,
            inner_opt_state=done.inner_opt_state,
            outer_opt_state=outer_opt_state,
            step=state.step + 1,
            metadata={**metrics, **(done.metadata or {})},
        )
        return _same_types(new, state)

    def run(
        self,
        state: BilevelState,
        M: int,
        get_train_batch: Callable[[], Any],
        get_val_batch: Callable[[], Any],
        train_loss_fn: LossFn,
        val_loss_fn: LossFn,
        lr_reptile: float = 1.0,
        lr_hyper: float | None = None,
        callback: Callable[[int, BilevelState], Any] | None = None,
        progress: bool | None = None,
    ) -> BilevelState:
        """Train for `M` episodes of `T` steps, each from the initialization `φ`.

        After an episode `φ ← φ - lr_reptile (φ - w_T)` (Reptile); `lr_hyper` falls linearly to 0
        over the episodes (HyperDistill, Algorithm 3). The weights, the step count and the inner
        optimizer start anew in each episode; hyperparameters and the outer optimizer go on. The
        step compiles once, whatever `M`, `T` and the schedule.

        Args:
          state: from `init` or an earlier run; its `params` are the first φ. It stays valid.
          M: episodes.
          get_train_batch: called without arguments for the next training batch.
          get_val_batch: called without arguments for the next validation batch.
          train_loss_fn: `(params, hyperparams, batch) -> scalar`.
          val_loss_fn: `(params, hyperparams, batch) -> scalar`.
          lr_reptile: Reptile step size; 1 goes on from `w_T`.
          lr_hyper: initial step size on λ, where there is no `outer_optimizer`.
          callback: called as `callback(episode, state)` after each episode, counted from 1, with
            `state.params = w_T` and the loss on a fresh validation batch in
            `state.metadata["val_loss"]`.
          progress: whether to draw a progress bar (needs tqdm); None draws one on a terminal.

        Returns:
          The state after the last episode, with `params = φ`. If a loss or a norm stops being
          finite, the state before that step, after a `DivergenceWarning` that says which and when.
        """
        self.check_step(train_loss_fn, val_loss_fn, lr_hyper)
        plan = episodes.Plan(M, self.T, lr_reptile, lr_hyper, callback, progress)
        return episodes.run(
            self, prepare(state), plan, get_train_batch, get_val_batch, train_loss_fn, val_loss_fn
        )

    def reset(self, state: BilevelState, params: PyTree) -> BilevelState:
        """Return `state` at the beginning of an episode that starts from `params`."""
        fresh = state.inner_opt_state
        if self.inner_optimizer is not None:
            fresh = optimizer_at(self.inner_optimizer, state.hyperparams).init(params)
        return _same_types(state.update(params=params, inner_opt_state=fresh, step=0), state)

    def calibrate(
        self,
        state: BilevelState,
        train_batches: PyTree,
        val_batch: PyTree,
        train_loss_fn: LossFn,
        val_loss_fn: LossFn,
    ) -> BilevelState:
        """Return `state` with the algorithm's own settings estimated anew; by default, as it is.

        Called before every `calibration_period`-th episode with a stack of `T` training batches.
        """
        del train_batches, val_batch, train_loss_fn, val_loss_fn
        return state

    def inner_step(self, train_loss_fn: LossFn) -> InnerStep:
        """Return Φ for this training loss."""
        auto = self.auto_mode if self.update_fn is None else "reverse-over-reverse"
        mode = auto if self.mode == "auto" else self.mode
        return InnerStep(self.inner_optimizer, self.update_fn, train_loss_fn, mode)

    def check_step(self, train_loss_fn: LossFn, val_loss_fn: LossFn, lr_hyper: Any) -> None:
        """Raise if a step with these arguments could not be compiled."""
        check_hashable("train_loss_fn", train_loss_fn)
        check_hashable("val_loss_fn", val_loss_fn)
        owner = f"{type(self).__name__}.step"
        check_exactly_one(owner, outer_optimizer=self.outer_optimizer, lr_hyper=lr_hyper)

    def _outer_update(
        self, done: Estimate, state: BilevelState, lr_hyper: Any
    ) -> tuple[PyTree, PyTree]:
        g, lam, outer_state = done.hypergradient, state.hyperparams, state.outer_opt_state
        if self.outer_optimizer is None:
            return optax.apply_updates(lam, jax.tree.map(lambda g: -lr_hyper * g, g)), outer_state
        optimizer = self.outer_optimizer
        return updated("outer_optimizer", optimizer, g, outer_state, lam, done.val_loss)


class HypergradientMethod(BilevelOptimizer):
    """An optimizer that states its `estimate`, and nothing else."""

    differentiates_inner: bool = True
    """Whether the hypergradient goes through the inner step."""
    by_values: bool = False
    """Whether it is taken by differences in λ, for which no derivative is needed."""

    def __post_init__(self) -> None:
        name = type(self).__name__
        check_exactly_one(name, inner_optimizer=self.inner_optimizer, update_fn=self.update_fn)
        if self.update_fn is not None:
            check_hashable("update_fn", self.update_fn)
        elif not is_optax(self.inner_optimizer) and not callable(self.inner_optimizer):
            accepted = "an optax.GradientTransformation or a function of the hyperparameters"
            raise TypeError(f"inner_optimizer must be {accepted}, got {self.inner_optimizer!r}")
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {MODES}, got {self.mode!r}")
        if self.update_fn is not None and self.mode not in ("auto", "reverse-over-reverse"):
            raise ValueError(
                f"mode={self.mode!r} needs an inner_optimizer: an update_fn hides its gradient, "
                'and can only be differentiated by mode="reverse-over-reverse"'
            )
        if self.outer_optimizer is not None and not is_optax(self.outer_optimizer):
            accepted = "an optax.GradientTransformation"
            raise TypeError(f"outer_optimizer must be {accepted}, got {self.outer_optimizer!r}")

    @abc.abstractmethod
    def estimate(
        self,
        state: BilevelState,
        train_batch: PyTree,
        val_batch: PyTree,
        train_loss_fn: LossFn,
        val_loss_fn: LossFn,
    ) -> Estimate:
        """Return the hypergradient together with the step it was computed from."""

    def init(self, params: PyTree, hyperparams: PyTree) -> BilevelState:
        """Return the state before the first step; see `BilevelOptimizer.init`."""
        check_floating("params", params)
        check_floating("hyperparams", hyperparams)
        params, hyperparams = jax.tree.map(as_array, (params, hyperparams))
        outer = self.outer_optimizer
        outer_state = None if outer is None else outer.init(hyperparams)
        inner_state = self._first_inner_state(params, hyperparams)
        return prepare(BilevelState.create(params, hyperparams, inner_state, outer_state))

    def advance(
        self,
        state: BilevelState,
        train_batch: PyTree,
        val_batch: PyTree,
        train_loss_fn: LossFn,
        val_loss_fn: LossFn,
        lr_hyper: Any = None,
    ) -> BilevelState:
        """Take the step of `step` as a pure function, for use inside another traced program."""
        losses = (train_loss_fn, val_loss_fn)
        self.check_reach(state, train_batch, val_batch, *losses)
        return super().advance(state, train_batch, val_batch, *losses, lr_hyper)

    def check_reach(
        self,
        state: BilevelState,
        train_batch: PyTree,
        val_batch: PyTree,
        train_loss_fn: LossFn,
        val_loss_fn: LossFn,
    ) -> None:
        """Tell of hyperparameters that get no hypergradient here; see `gradhpo.reach`."""
        ways = Ways(
            type(self).__name__,
            self.inner_step(train_loss_fn) if self.differentiates_inner else None,
            self.by_values,
            lambda: self._tuned(state.hyperparams),
        )
        one = jax.tree.map(lambda x: x[0], train_batch) if self.batch_axis else train_batch
        check_reach(ways, state, one, val_batch, (train_loss_fn, val_loss_fn))

    def _tuned(self, hyperparams: PyTree) -> list[bool]:
        """Return for each leaf of λ whether the outer update moves it by its hypergradient."""
        outer = self.outer_optimizer
        if outer is None:
            return [True] * len(jax.tree.leaves(hyperparams))

        def moved(g: PyTree, outer_state: PyTree) -> PyTree:
            return updated("outer_optimizer", outer, g, outer_state, hyperparams, jnp.zeros(()))[0]

        state = jax.eval_shape(outer.init, hyperparams)
        # By values: a sign has no derivative, and moves.
        return dependents(moved, hyperparams, state, derivative=False)

    def _first_inner_state(self, params: PyTree, lam: PyTree) -> PyTree:
        inner, nothing = self.inner_optimizer, jnp.zeros(())
        if inner is None:
            return None

        def init_of(lam: PyTree) -> PyTree:
            return optimizer_at(inner, lam).init(params)

        def move(state: PyTree, lam: PyTree) -> tuple[PyTree, PyTree]:
            optimizer = optimizer_at(inner, lam)
            return updated("inner_optimizer", optimizer, params, state, params, nothing)

        if self.differentiates_inner and not is_optax(inner):
            check_initial_state(init_of, move, lam, lambda: self._tuned(lam))
        return init_of(lam)

    def compute_hypergradient(
        self,
        state: BilevelState,
        train_batch: PyTree,
        val_batch: PyTree,
        train_loss_fn: LossFn,
        val_loss_fn: LossFn,
    ) -> PyTree:
        """Return the hypergradient that `step` would apply from `state`.

        Args:
          state: from `init` or a step.
          train_batch: a pytree of arrays, passed to `train_loss_fn`.
          val_batch: a pytree of arrays, passed to `val_loss_fn`.
          train_loss_fn: `(params, hyperparams, batch) -> scalar`.
          val_loss_fn: `(params, hyperparams, batch) -> scalar`.

        Returns:
          A pytree with the structure, shapes and dtypes of `state.hyperparams`.
        """
        check_hashable("train_loss_fn", train_loss_fn)
        check_hashable("val_loss_fn", val_loss_fn)
        state = prepare(state)
        return _hypergradient(self, state, train_batch, val_batch, train_loss_fn, val_loss_fn)


class StatelessMethod(HypergradientMethod):
    """A method that keeps nothing between steps: an episode's length is an argument of `run`."""

    def run(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        state: BilevelState,
        M: int,
        T: int,
        get_train_batch: Callable[[], Any],
        get_val_batch: Callable[[], Any],
        train_loss_fn: LossFn,
        val_loss_fn: LossFn,
        lr_reptile: float = 1.0,
        lr_hyper: float | None = None,
        callback: Callable[[int, BilevelState], Any] | None = None,
        progress: bool | None = None,
    ) -> BilevelState:
        """Train for `M` episodes of `T` steps; the other arguments as in `BilevelOptimizer.run`."""
        self.check_step(train_loss_fn, val_loss_fn, lr_hyper)
        plan = episodes.Plan(M, T, lr_reptile, lr_hyper, callback, progress)
        draw = (get_train_batch, get_val_batch)
        return episodes.run(self, prepare(state), plan, *draw, train_loss_fn, val_loss_fn)


def rate(lr_hyper: Any) -> Any:
    """Return a learning rate as a scalar that costs no compilation: a host array, or as traced."""
    if lr_hyper is None or isinstance(lr_hyper, jax.Array):
        return lr_hyper if lr_hyper is None else as_array(lr_hyper, jnp.result_type(float))
    if isinstance(lr_hyper, bool) or np.shape(lr_hyper) != ():
        raise TypeError(f"lr_hyper must be a number or a scalar array, got {lr_hyper!r}")
    return np.asarray(lr_hyper, dtype=jnp.result_type(float))


def _same_types(new: BilevelState, old: BilevelState) -> BilevelState:
    """Cast the leaves of `new` to the dtypes of `old`, so that the state fits a `scan`."""
    check_same_tree("the new state", new, "the old one", old, dtypes=False)
    return jax.tree.map(lambda leaf, like: as_array(leaf, like.dtype), new, old)


@functools.partial(jit, static_argnums=(0, 4, 5))
def _step(
    optimizer: BilevelOptimizer,
    state: BilevelState,
    train_batch: PyTree,
    val_batch: PyTree,
    train_loss_fn: LossFn,
    val_loss_fn: LossFn,
    lr_hyper: Any,
) -> BilevelState:
    note_compile(optimizer, train_loss_fn, val_loss_fn)
    return optimizer.advance(state, train_batch, val_batch, train_loss_fn, val_loss_fn, lr_hyper)


@functools.partial(jit, static_argnums=(0, 4, 5))
def _hypergradient(
    optimizer: HypergradientMethod,
    state: BilevelState,
    train_batch: PyTree,
    val_batch: PyTree,
    train_loss_fn: LossFn,
    val_loss_fn: LossFn,
) -> PyTree:
    note_compile(optimizer, train_loss_fn, val_loss_fn)
    args = (state, train_batch, val_batch, train_loss_fn, val_loss_fn)
    optimizer.check_reach(*args)
    return optimizer.estimate(*args).hypergradient
