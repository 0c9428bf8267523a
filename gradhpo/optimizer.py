"""`BilevelOptimizer`: the interface of every algorithm, its `step`, and the outer update."""

from __future__ import annotations

import abc
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable
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
    shown,
    tracing,
)
from gradhpo.hypergradient import MODES, Mode, Validation, norm, validation
from gradhpo.injected import check_initial_state
from gradhpo.inner import InnerStep, Moved, is_optax, optimizer_at
from gradhpo.observers.telling import Observer
from gradhpo.reach import Ways, check_reach
from gradhpo.recompiles import note_compile
from gradhpo.remembered import about
from gradhpo.state import BilevelState, LossFn, PyTree, as_array, prepare
from gradhpo.task import Task, split_fixed, told
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
    """Scalar, at the weights after the step; before it from a method whose validation gradient is
    taken there (SOBA, MA-SOBA, SABA, BOME)."""
    metadata: dict[str, Any] | None = None
    """What the algorithm itself remembers, by name."""
    model_state: PyTree = None
    """What the losses remember after the step; None where they remember nothing."""
    metrics: dict[str, jax.Array] | None = None
    """What else the losses returned: scalars by their full names."""

    @classmethod
    def of(
        cls,
        hypergradient: PyTree,
        moved: Moved,
        val: Validation,
        memory: dict[str, Any] | None = None,
    ) -> Estimate:
        """Return the estimate of a step, from the inner step that it took and its validation."""
        return cls(
            hypergradient,
            moved.carried.whole(moved.params),
            moved.carried.opt_state,
            moved.train_loss,
            val.loss,
            memory,
            moved.carried.model_state,
            {**moved.metrics, **val.metrics},
        )


class BilevelOptimizer(abc.ABC):
    """Tunes hyperparameters by hypergradients while the weights train.

    To write an optimizer, define `init` and `compute_hypergradient`; `step` and `run` then work.
    Define `estimate` instead of leaving it to its default where the hypergradient and the inner
    step share work.
    """

    inner_optimizer: Any = None
    outer_optimizer: Any = None
    update_fn: Callable[..., Any] | None = None
    through_model_state: bool = False
    """Whether what the losses remember is differentiated too."""
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
    draws: bool = False
    """Whether `init` also takes `key`, and the state holds one."""

    def __init__(self, inner_optimizer: Any = None, outer_optimizer: Any = None) -> None:
        self.inner_optimizer = inner_optimizer
        self.outer_optimizer = outer_optimizer

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in ("advance", "estimate", "calibrate"):
            taken = inspect.signature(vars(cls)[name]).parameters if name in vars(cls) else ()
            if "train_loss_fn" in taken:
                raise TypeError(
                    f"{cls.__name__}.{name} must take (self, state, task): a gradhpo.Task holds "
                    "train_batch, val_batch, train_loss and val_loss since version 0.3"
                )

    @abc.abstractmethod
    def init(
        self, params: PyTree, hyperparams: PyTree, *, model_state: PyTree = None
    ) -> BilevelState:
        """Return the state before the first step.

        Args:
          params: weights, a pytree of floating arrays. With an `update_fn`, arrays of other dtypes
            may be among them, such as counts: they are carried on as it returns them.
          hyperparams: hyperparameters, a pytree of floating arrays.
          model_state: what the losses remember, a pytree of arrays, for losses that take it.

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

    def hypergradient(self, state: BilevelState, task: Task) -> PyTree:
        """Return `compute_hypergradient` of a task, whose losses may take more; traceable."""
        plain = task.plain(state)
        losses = (plain.train_loss, plain.val_loss)
        return self.compute_hypergradient(state, task.train_batch, task.val_batch, *losses)

    def estimate(self, state: BilevelState, task: Task) -> Estimate:
        """Return the hypergradient together with the step of the weights it was computed from.

        Pure and traceable. By default `compute_hypergradient` beside a separate inner step.
        """
        (w, s), lam = task.start(state), state.hyperparams
        moved = self.inner_step(task.train_loss)(w, s, lam, task.train_batch)
        val = validation(task, moved.params, moved.carried, lam)
        return Estimate.of(self.hypergradient(state, task), moved, val)

    def step(
        self,
        state: BilevelState,
        train_batch: PyTree,
        val_batch: PyTree,
        train_loss_fn: LossFn,
        val_loss_fn: LossFn,
        lr_hyper: Any = None,
        *,
        key: jax.Array | None = None,
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
          train_loss_fn: `(params, hyperparams, batch) -> scalar`, or more: see `Problem`.
          val_loss_fn: `(params, hyperparams, batch) -> scalar`, or more: see `Problem`.
          lr_hyper: step size of plain gradient descent on λ, where there is no
            `outer_optimizer`; a number or a scalar array, traced.
          key: for losses that take a `key`: a typed PRNG key. The same one may be given at every
            step: what the losses get differs with `state.step`.

        Returns:
          The state after the step, with the metrics `METRICS` in its `metadata`, and those that
          the losses return.

        Raises:
          ValueError: if neither or both of `outer_optimizer` and `lr_hyper` are given, or a loss
            is not scalar.
          TypeError: if a loss does not return a floating-point number.

        Warns:
          UnreachedWarning: if a hyperparameter gets no hypergradient, whatever the numbers.
          RecompileWarning: if a loss is a new function at every call.
        """
        task = Task.of(train_batch, val_batch, train_loss_fn, val_loss_fn, key)
        return _step(self, *self._checked_step(state, task, lr_hyper))

    def lower_step(
        self,
        state: BilevelState,
        train_batch: PyTree,
        val_batch: PyTree,
        train_loss_fn: LossFn,
        val_loss_fn: LossFn,
        lr_hyper: Any = None,
        *,
        key: jax.Array | None = None,
    ) -> jax.stages.Lowered:
        """Return the program of `step`, lowered: its text, and `compile()` for XLA's own figures.

        The arguments are those of `step`; the compiled program takes the state, a `Task` and
        `lr_hyper`.
        """
        task = Task.of(train_batch, val_batch, train_loss_fn, val_loss_fn, key)
        return _step.lower(self, *self._checked_step(state, task, lr_hyper))

    def _checked_step(
        self, state: BilevelState, task: Task, lr_hyper: Any
    ) -> tuple[BilevelState, Task, Any]:
        """Return the arguments of a compiled step."""
        self.check_step(task.train_loss, task.val_loss, lr_hyper)
        return self.ready(prepare(state), task), task, rate(lr_hyper)

    def ready(self, state: BilevelState, task: Task) -> BilevelState:
        """Return the state with a place for each metric of the losses, as it is after a step.

        Needed before a loop of one's own around `advance`, with losses that return metrics; what
        they return is found by tracing them, once.
        """
        missing = [n for n in self._metric_names(state, task) if n not in state.metadata]
        if not missing:
            return state
        dtype = jnp.result_type(float)  # each in a buffer of its own, which may be donated
        return state.update(metadata={name: jnp.asarray(jnp.inf, dtype) for name in missing})

    def _metric_names(self, state: BilevelState, task: Task) -> list[str]:
        """Return the names of the metrics that the losses return; traced once for such trees."""
        told: dict[Any, list[str]] = about(task.train_loss, task.val_loss).setdefault("metrics", {})
        given = (state.params, state.hyperparams, state.model_state)
        trees = jax.tree.structure((given, task.train_batch, task.val_batch))
        if trees not in told:
            told[trees] = list(jax.eval_shape(self.told, state, task))
        return told[trees]

    def told(self, state: BilevelState, task: Task) -> dict[str, jax.Array]:
        """Return the metrics that the losses return before a step; traceable."""
        return told(state, self._with_one_batch(task))

    def _with_one_batch(self, task: Task) -> Task:
        """Return the task with a training batch for one inner step."""
        if not self.batch_axis:
            return task
        one = jax.tree.map(lambda x: x[0], task.train_batch)
        return dataclasses.replace(task, train_batch=one)

    def advance(self, state: BilevelState, task: Task, lr_hyper: Any = None) -> BilevelState:
        """Take the step of `step` as a pure function, for use inside another traced program.

        In a loop of one's own around it, XLA's CPU compiler runs convolutions slowly: `solve`,
        `run` and a population bring them into the fast form first.
        """
        done = self.estimate(state, task)
        chex.assert_rank([done.train_loss, done.val_loss], 0)
        state = self.ready(state, task)
        self._check_complete(done, state, task)
        check_same_tree("hypergradient", done.hypergradient, "hyperparams", state.hyperparams)
        hyperparams, outer_opt_state = self._outer_update(done, state, lr_hyper)
        metrics = {
            "train_loss": done.train_loss,
            "val_loss": done.val_loss,
            "hypergrad_norm": norm(done.hypergradient),
            "param_norm": norm(split_fixed(done.params)[0]),
            "hyperparam_norm": norm(hyperparams),
        }
        new = state.update(
            params=done.params,
            hyperparams=hyperparams,
            inner_opt_state=done.inner_opt_state,
            outer_opt_state=outer_opt_state,
            step=state.step + 1,
            metadata={**metrics, **(done.metrics or {}), **(done.metadata or {})},
            model_state=done.model_state,
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
        *,
        key: jax.Array | None = None,
        observers: Iterable[Observer] = (),
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
          key: for losses that take a `key`: what they get differs at every step of every episode.
          observers: told of the metrics of each episode's last step, see `gradhpo.observers`.

        Returns:
          The state after the last episode, with `params = φ`. If a loss or a norm stops being
          finite, the state before that step, after a `DivergenceWarning` that says which and when.
        """
        self.check_step(train_loss_fn, val_loss_fn, lr_hyper)
        plan = episodes.Plan(
            M, self.T, lr_reptile, lr_hyper, callback, progress, key, tuple(observers)
        )
        return episodes.run(
            self, prepare(state), plan, get_train_batch, get_val_batch, train_loss_fn, val_loss_fn
        )

    def reset(self, state: BilevelState, params: PyTree) -> BilevelState:
        """Return `state` at the beginning of an episode that starts from `params`."""
        fresh = state.inner_opt_state
        if self.inner_optimizer is not None:
            fresh = optimizer_at(self.inner_optimizer, state.hyperparams).init(params)
        return _same_types(state.update(params=params, inner_opt_state=fresh, step=0), state)

    def calibrate(self, state: BilevelState, task: Task) -> BilevelState:
        """Return `state` with the algorithm's own settings estimated anew; by default, as it is.

        Called before every `calibration_period`-th episode with a stack of `T` training batches.
        """
        del task
        return state

    def inner_step(self, train_loss_fn: LossFn) -> InnerStep:
        """Return Φ for this training loss."""
        # A mixed mode takes what the losses remember for a constant.
        reverse = self.update_fn is not None or self.through_model_state
        auto = "reverse-over-reverse" if reverse else self.auto_mode
        mode = auto if self.mode == "auto" else self.mode
        return InnerStep(
            self.inner_optimizer,
            self.update_fn,
            train_loss_fn,
            mode,
            through_model_state=self.through_model_state,
        )

    def check_step(self, train_loss_fn: LossFn, val_loss_fn: LossFn, lr_hyper: Any) -> None:
        """Raise if a step with these arguments could not be compiled."""
        check_hashable("train_loss_fn", train_loss_fn)
        check_hashable("val_loss_fn", val_loss_fn)
        owner = f"{type(self).__name__}.step"
        check_exactly_one(owner, outer_optimizer=self.outer_optimizer, lr_hyper=lr_hyper)

    def _check_complete(self, done: Estimate, state: BilevelState, task: Task) -> None:
        """Raise if an `estimate` of one's own leaves out what the losses remember or tell."""
        told = done.metrics or {}
        lost = [name for name in self._metric_names(state, task) if name not in told]
        if state.model_state is not None and done.model_state is None:
            lost = ["model_state", *lost]
        if lost:
            raise ValueError(
                f"{type(self).__name__}.estimate returned no {lost[0]}: return Estimate.of("
                "hypergradient, moved, val), with what inner_step and validation gave"
            )

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
    zero_order: bool = False
    """Whether it is taken from values of the validation loss alone."""

    def __post_init__(self) -> None:
        name = type(self).__name__
        check_exactly_one(name, inner_optimizer=self.inner_optimizer, update_fn=self.update_fn)
        if self.update_fn is not None:
            check_hashable("update_fn", self.update_fn)
        elif not is_optax(self.inner_optimizer) and not callable(self.inner_optimizer):
            accepted = "an optax.GradientTransformation or a function of the hyperparameters"
            raise TypeError(
                f"inner_optimizer must be {accepted}, got {shown(self.inner_optimizer)}"
            )
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {MODES}, got {self.mode!r}")
        if self.update_fn is not None and self.mode not in ("auto", "reverse-over-reverse"):
            raise ValueError(
                f"mode={self.mode!r} needs an inner_optimizer: an update_fn hides its gradient, "
                'and can only be differentiated by mode="reverse-over-reverse"'
            )
        if self.through_model_state and self.mode not in ("auto", "reverse-over-reverse"):
            raise ValueError(
                f"mode={self.mode!r} takes what the losses remember for a constant: "
                'through_model_state=True needs mode="reverse-over-reverse"'
            )
        if self.outer_optimizer is not None and not is_optax(self.outer_optimizer):
            accepted = "an optax.GradientTransformation"
            raise TypeError(
                f"outer_optimizer must be {accepted}, got {shown(self.outer_optimizer)}"
            )

    @abc.abstractmethod
    def estimate(self, state: BilevelState, task: Task) -> Estimate:
        """Return the hypergradient together with the step it was computed from."""

    def hypergradient(self, state: BilevelState, task: Task) -> PyTree:
        """Return the hypergradient of a step; traceable."""
        self.check_reach(state, task)
        return self.estimate(state, task).hypergradient

    def init(
        self, params: PyTree, hyperparams: PyTree, *, model_state: PyTree = None
    ) -> BilevelState:
        """Return the state before the first step; see `BilevelOptimizer.init`."""
        check_floating("params", params, others=self.update_fn is not None)
        check_floating("hyperparams", hyperparams)
        params, hyperparams = jax.tree.map(as_array, (params, hyperparams))
        outer = self.outer_optimizer
        with tracing("outer_optimizer.init", hyperparams=hyperparams):
            outer_state = None if outer is None else outer.init(hyperparams)
        states = (self._first_inner_state(params, hyperparams), outer_state)
        first = BilevelState.create(params, hyperparams, *states, model_state=model_state)
        return prepare(first)

    def advance(self, state: BilevelState, task: Task, lr_hyper: Any = None) -> BilevelState:
        """Take the step of `step` as a pure function, for use inside another traced program."""
        self.check_reach(state, task)
        return super().advance(state, task, lr_hyper)

    def check_reach(self, state: BilevelState, task: Task) -> None:
        """Tell of hyperparameters that get no hypergradient here; see `gradhpo.reach`."""
        ways = Ways(
            type(self).__name__,
            self.inner_step(task.train_loss) if self.differentiates_inner else None,
            self.by_values,
            lambda: self._tuned(state.hyperparams),
            self.zero_order,
        )
        check_reach(ways, state, self._with_one_batch(task))

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
        *,
        key: jax.Array | None = None,
    ) -> PyTree:
        """Return the hypergradient that `step` would apply from `state`.

        Args:
          state: from `init` or a step.
          train_batch: a pytree of arrays, passed to `train_loss_fn`.
          val_batch: a pytree of arrays, passed to `val_loss_fn`.
          train_loss_fn: `(params, hyperparams, batch) -> scalar`, or more: see `Problem`.
          val_loss_fn: `(params, hyperparams, batch) -> scalar`, or more: see `Problem`.
          key: for losses that take a `key`.

        Returns:
          A pytree with the structure, shapes and dtypes of `state.hyperparams`.
        """
        task = Task.of(train_batch, val_batch, train_loss_fn, val_loss_fn, key)
        return _hypergradient(self, prepare(state), task)


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
        *,
        key: jax.Array | None = None,
        observers: Iterable[Observer] = (),
    ) -> BilevelState:
        """Train for `M` episodes of `T` steps; the other arguments as in `BilevelOptimizer.run`."""
        self.check_step(train_loss_fn, val_loss_fn, lr_hyper)
        plan = episodes.Plan(M, T, lr_reptile, lr_hyper, callback, progress, key, tuple(observers))
        draw = (get_train_batch, get_val_batch)
        return episodes.run(self, prepare(state), plan, *draw, train_loss_fn, val_loss_fn)


def rate(lr_hyper: Any) -> Any:
    """Return a learning rate as a scalar that costs no compilation: a host array, or as traced."""
    if lr_hyper is None or isinstance(lr_hyper, jax.Array):
        return lr_hyper if lr_hyper is None else as_array(lr_hyper, jnp.result_type(float))
    if isinstance(lr_hyper, bool) or np.shape(lr_hyper) != ():
        raise TypeError(f"lr_hyper must be a number or a scalar array, got {shown(lr_hyper)}")
    return np.asarray(lr_hyper, dtype=jnp.result_type(float))


def _same_types(new: BilevelState, old: BilevelState) -> BilevelState:
    """Cast the leaves of `new` to the dtypes of `old`, so that the state fits a `scan`."""
    check_same_tree("the new state", new, "the old one", old, dtypes=False)
    return jax.tree.map(lambda leaf, like: as_array(leaf, like.dtype), new, old)


@functools.partial(jit, static_argnums=0)
def _step(
    optimizer: BilevelOptimizer, state: BilevelState, task: Task, lr_hyper: Any
) -> BilevelState:
    note_compile(optimizer, task.train_loss, task.val_loss)
    return optimizer.advance(state, task.at(state.step), lr_hyper)


@functools.partial(jit, static_argnums=0)
def _hypergradient(optimizer: HypergradientMethod, state: BilevelState, task: Task) -> PyTree:
    note_compile(optimizer, task.train_loss, task.val_loss)
    return optimizer.hypergradient(state, task.at(state.step))
