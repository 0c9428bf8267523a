"""`diagnose`: which method, which γ and which horizon suit a problem, measured at a state of it."""

from __future__ import annotations

import dataclasses
import functools
import time as clock
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradhpo.algorithms import (
    DrMADOptimizer,
    ESOptimizer,
    FOOptimizer,
    ForwardGradientOptimizer,
    GreedyOptimizer,
    ImplicitOptimizer,
    NRESOptimizer,
    OneStepOptimizer,
    OnlineHypergradientOptimizer,
    PESOptimizer,
    T1T2Optimizer,
    UnrolledOptimizer,
)
from gradhpo.compilation import jit
from gradhpo.diagnosis import Diagnosis, Row
from gradhpo.errors import check_count, check_number, check_same_tree, stack
from gradhpo.flops import flops
from gradhpo.horizon import estimate_at, fresh_state, moved, walk
from gradhpo.host import Source, seeds_of
from gradhpo.hypergradient import at_least_float32, norm, validation
from gradhpo.inner import InnerStep
from gradhpo.optimizer import BilevelOptimizer, HypergradientMethod
from gradhpo.problem import Problem, stream
from gradhpo.progress import Bar
from gradhpo.state import BilevelState, PyTree, prepare
from gradhpo.task import Task
from gradhpo.unrolling import UnrollingMethod

METHODS = (
    "first-order",
    "one-step",
    "t1t2",
    "greedy",
    "hyperdistill",
    "drmad",
    "implicit",
    "unrolled",
)
"""What `diagnose` compares by default."""
DRAWN = ("es", "pes", "nres", "forward-gradient")
"""What it compares where it is asked to: estimates that draw at random."""
NAMED = (*METHODS, *DRAWN)
WINDOWS = 5
"""In how many the horizon is divided for "pes" and "nres"."""
DIRECTIONS = 16
"""How many "forward-gradient" takes."""
QUICK = ("first-order", "one-step", "t1t2", "hyperdistill")
"""What `methods="quick"` compares: what compiles soonest, with the first γ."""
TRUNCATIONS = (2, 5, 10, 20, 50, 100)
"""The steps that "unrolled" goes back, where they are fewer than the horizon."""
EXACT = "exact"
MEASURE_SECONDS = 0.02
"""How long a program runs in a round of timing, if one call is shorter."""


def diagnose(
    problem: Problem,
    state: BilevelState,
    key: jax.Array,
    *,
    inner_optimizer: Any = None,
    update_fn: Callable[[Any, Any, Any], Any] | None = None,
    methods: Literal["quick"] | Sequence[str] | Mapping[str, BilevelOptimizer] = METHODS,
    gammas: Sequence[float] = (0.9, 0.99),
    horizon: int = 20,
    samples: int = 4,
    rounds: int = 5,
    progress: bool | None = None,
) -> Diagnosis:
    """Compare methods with the exact hypergradient at a state, and their cost; recommend one.

    The exact hypergradient is `dL_val(w_T(λ), λ)/dλ` through the T = `horizon` inner steps that
    begin at `state`, by reverse mode. Every method walks the same T steps on the same batches, with
    λ held, so that all see the same `w_T`; its estimate at the end is compared. An online method
    starts an episode there (w*_1 = w_0), and HyperDistill estimates θ first, by Algorithm 4 on T
    other batches, as it does in a run; Greedy and DrMAD unroll all T steps; "unrolled k" is exact
    through the last k of them only. "es" (100 particles, σ = 0.1) and "forward-gradient" (16
    directions) unroll all T, and "pes" and "nres" go there in windows of T / 5. A step counts at
    the pace of one estimate an inner step for the online methods, and one estimate in k steps for
    those that unroll k.

    Args:
      problem: the problem; its `metrics` are not used.
      state: where to look: from `solve(...).state`, or any method's `init`. Its weights, λ and
        inner optimizer's state are used. It stays valid.
      key: of the run that the state comes from, so that `problem.data` is the same; the batches are
        others than the run's.
      inner_optimizer: an `optax.GradientTransformation`, or a function of λ that returns one.
      update_fn: `(params, hyperparams, batch) -> params`, in place of `inner_optimizer`.
      methods: names out of `METHODS`, or "es", "pes", "nres", "forward-gradient"; "quick" for
        First-Order, One-Step, T1-T2 and HyperDistill at the first γ, which takes about half of the
        time of all; or optimizers by a name of your own, which then bring the inner optimizer (the
        same for all), and unroll `horizon` steps at most.
      gammas: γ to try with "greedy" and "hyperdistill".
      horizon: T.
      samples: how many times to walk, on batches of their own; at least 2 give intervals.
      rounds: of timing, in each of which every method runs once; 0 for none.
      progress: whether to draw a progress bar (needs tqdm); None draws one on a terminal, and
        writes a line a method to stderr elsewhere. Nearly all of the time is compilation: how long
        the exact hypergradient took, and an estimate of the rest, are written first.

    Returns:
      The comparison: `print` it, `plot` it, or read its `rows`. A method that refuses the problem,
      as "implicit" does where λ is a learning rate, is left out with its reason in `notes`.

    Raises:
      TypeError: for an argument of the wrong kind.
      ValueError: for an argument out of range, an unknown method, methods that do not share one
        inner optimizer, a state that does not fit it, or host data that ends too early.
    """
    if not isinstance(problem, Problem):
        raise TypeError(f"problem must be a gradhpo.Problem, got {type(problem).__name__}")
    if not isinstance(state, BilevelState):
        raise TypeError(f"state must be a gradhpo.BilevelState, got {type(state).__name__}")
    T, samples = check_count("horizon", horizon), check_count("samples", samples)
    check_count("rounds", rounds, minimum=0)
    if isinstance(methods, Mapping):
        optimizers = dict(methods)
        inner_optimizer, update_fn = _shared_inner(optimizers, inner_optimizer, update_fn)
    else:
        gammas = [check_number("gammas", gamma, 0, 1) for gamma in gammas]
        if isinstance(methods, str) and methods == "quick":
            methods, gammas = QUICK, gammas[:1]
        optimizers = _named(methods, inner_optimizer, update_fn, gammas, T)
    exact = UnrolledOptimizer(inner_optimizer, None, T, update_fn, "stack", remat="sqrt")
    for name, optimizer in optimizers.items():
        if getattr(optimizer, "unroll_steps", 1) > T:
            got = f"{name!r} unrolls {getattr(optimizer, 'unroll_steps', 1)} steps"
            raise ValueError(f"methods must unroll at most horizon={T} steps; {got}")
    state = prepare(state)
    check_same_tree(
        "state.inner_opt_state",
        state.inner_opt_state,
        "the inner optimizer's state",
        exact.init(state.params, state.hyperparams).inner_opt_state,
    )
    walks = list(_walks(problem, key, T, samples))
    # That of the exact hypergradient, of which First-Order's would say less.
    exact.check_reach(state, walks[0][0])
    notes: list[str] = []
    compared: dict[str, np.ndarray] = {}
    programs: dict[str, _Program] = {}
    optimizers = {EXACT: exact, **optimizers}
    with Bar(progress, total=len(optimizers) * (samples + 1), unit="estimate") as bar:
        spoken = _Spoken(bar, len(optimizers), progress)
        truths = [_exact(exact, state, task) for task, _ in walks]
        for name, optimizer in optimizers.items():
            try:
                made: list[Any] = []
                for index, (given, truth) in enumerate(zip(walks, truths, strict=True)):
                    own = jax.random.fold_in(stream(key, "optimizer"), index)
                    made.append(_compare(optimizer, state, *given, truth, own))
                    bar.advance(1)
            except ValueError as error:
                if name == EXACT or isinstance(methods, Mapping):
                    raise
                notes.append(f"{name} is left out: {error}")
                continue
            compared[name] = np.asarray(jax.device_get(made), float)
            if rounds:
                programs[name] = _Program(optimizer, state, T, walks[0][0])
            bar.advance(1)
            spoken.after(name)
        plain = InnerStep(inner_optimizer, update_fn, problem.train_loss)
        times, base = _times(programs, _Plain(plain, state, walks[0][0]), rounds)
    rows: list[Row] = []
    for name, values in compared.items():
        time, cost = times.get(name, (np.empty(0), np.nan))
        rows.append(Row(name, values[:, 0], values[:, 1], values[:, 2], time, cost))
    return Diagnosis(rows[1:], rows[0], T, base, tuple(notes))


class _Spoken:
    """Tells how long it will take, and where nobody sees a bar, each method as it is done."""

    def __init__(self, bar: Bar, methods: int, progress: bool | None) -> None:
        self._bar, self._methods, self._progress = bar, methods, progress
        self._last = clock.perf_counter()

    def after(self, name: str) -> None:
        """Say what the method took; after the exact one, what all may take."""
        if self._progress is False:
            return
        now = clock.perf_counter()
        seconds, self._last = now - self._last, now
        if name == EXACT:
            # It compiles three programs, the others two.
            rest = (self._methods - 1) * seconds * 2 / 3
            self._bar.write(
                f"diagnose: the exact hypergradient took {seconds:.1f} s; "
                f"{self._methods - 1} methods more, about {rest:.0f} s"
            )
        elif not self._bar.drawn:
            self._bar.write(f"diagnose: {name}, {seconds:.1f} s")


def _named(
    methods: Sequence[str],
    inner_optimizer: Any,
    update_fn: Any,
    gammas: Sequence[float],
    T: int,
) -> dict[str, BilevelOptimizer]:
    if isinstance(methods, str) or not all(isinstance(name, str) for name in methods):
        accepted = f'names out of {NAMED}, "quick", or a dict'
        raise TypeError(f"methods must be {accepted}; got {methods!r}")
    if unknown := [name for name in methods if name not in NAMED]:
        raise ValueError(f"methods must be out of {NAMED}, got {unknown[0]!r}")
    inner: Any = {"inner_optimizer": inner_optimizer, "update_fn": update_fn}
    still = optax.set_to_zero()
    simple: dict[str, Any] = {
        "first-order": FOOptimizer(**inner),
        "one-step": OneStepOptimizer(**inner),
        "t1t2": T1T2Optimizer(**inner),
        "drmad": DrMADOptimizer(**inner, unroll_steps=T),
        "implicit": ImplicitOptimizer(**inner),
        "es": ESOptimizer(**inner, unroll_steps=T),
        "pes": PESOptimizer(**inner, unroll_steps=max(1, T // WINDOWS)),
        "nres": NRESOptimizer(**inner, unroll_steps=max(1, T // WINDOWS)),
        "forward-gradient": ForwardGradientOptimizer(
            **inner, unroll_steps=T, directions=DIRECTIONS
        ),
    }
    made: dict[str, BilevelOptimizer] = {}
    for name in methods:
        if name == "greedy":
            for gamma in (gamma for gamma in gammas if gamma > 0):
                made[f"greedy γ={gamma:g}"] = GreedyOptimizer(
                    **inner, outer_optimizer=still, unroll_steps=T, gamma=gamma
                )
        elif name == "hyperdistill":
            for gamma in gammas:
                made[f"hyperdistill γ={gamma:g}"] = OnlineHypergradientOptimizer(
                    **inner, gamma=gamma, T=T
                )
        elif name == "unrolled":
            for k in (k for k in TRUNCATIONS if k < T):
                made[f"unrolled {k}"] = UnrolledOptimizer(**inner, unroll_steps=k)
        else:
            made[name] = simple[name]
    return made


def _shared_inner(
    optimizers: dict[str, BilevelOptimizer], inner_optimizer: Any, update_fn: Any
) -> tuple[Any, Any]:
    """Return the inner optimizer and the update function that all methods have."""
    if inner_optimizer is not None or update_fn is not None:
        raise ValueError("inner_optimizer and update_fn come with the optimizers in methods")
    if not optimizers:
        raise ValueError("methods is empty: nothing to compare")
    found: tuple[Any, Any] | None = None
    for name, optimizer in optimizers.items():
        if not isinstance(optimizer, HypergradientMethod):
            accepted = "one of the library's optimizers"
            raise TypeError(f"methods[{name!r}] must be {accepted}, got {type(optimizer).__name__}")
        inner = (optimizer.inner_optimizer, optimizer.update_fn)
        if found is not None and inner != found:
            raise ValueError(f"methods[{name!r}] has another inner optimizer than the first")
        found = inner
    assert found is not None
    return found


def _walks(problem: Problem, key: jax.Array, T: int, samples: int) -> Any:
    """Yield for each sample a task with T training batches, and T other batches for θ."""
    fresh = stream(key, "diagnosis")

    def task(pairs: list[Any], index: int) -> tuple[Task, PyTree]:
        trains = [train for train, _ in pairs]
        first = stack("Problem.batch", trains[:T])
        losses = (problem.train_loss, problem.val_loss)
        made = Task(first, pairs[T - 1][1], *losses)
        if made.asks_for_key():
            made = dataclasses.replace(made, key=jax.random.fold_in(stream(key, "losses"), index))
        return made, stack("Problem.batch", trains[T:])

    if problem.batch is not None:
        data = problem.start_data(key)
        for index in range(samples):
            keys = jax.random.split(jax.random.fold_in(fresh, index), 2 * T)
            pairs = [problem.draw(k, data) for k in keys]
            yield task(pairs, index)
        return
    source = Source(problem.batches)
    given = source.open(seeds_of(fresh)[0].tolist(), 0)
    for index in range(samples):
        pairs = [source.form.on_device(pair, jnp.asarray) for pair in given.take(2 * T)]
        if len(pairs) < 2 * T:
            needed = f"{samples} samples of 2 x {T} batches"
            raise ValueError(f"Problem.batches ended early: diagnose needs {needed}")
        yield task(pairs, index)


@functools.partial(jit, static_argnums=0)
def _exact(exact: UnrolledOptimizer, state: BilevelState, task: Task) -> tuple[PyTree, PyTree]:
    """Return the exact hypergradient, and its direct term."""
    done = exact.estimate(state, task)
    end = task.after(exact.unroll_steps).start(moved(state, done))
    direct = validation(task, *end, state.hyperparams).direct
    return at_least_float32(done.hypergradient), at_least_float32(direct)


@functools.partial(jit, static_argnums=0)
def _compare(
    optimizer: BilevelOptimizer,
    state: BilevelState,
    task: Task,
    others: PyTree,
    truth: tuple[PyTree, PyTree],
    key: jax.Array,
) -> jax.Array:
    """Return cosine, norm ratio and second-order share of a method's estimate, `(3,)`.

    `key` is where a method that draws draws from.
    """
    own = _own_state(optimizer, state, task, key)
    if optimizer.calibration_period:
        own = optimizer.calibrate(own, dataclasses.replace(task, train_batch=others))
    g = at_least_float32(estimate_at(optimizer, own, task).hypergradient)
    exact, direct = truth
    length, reference = norm(g), norm(exact)
    cosine = jnp.asarray(optax.tree.vdot(g, exact)) / (length * reference)  # NaN with a zero
    second, first = norm(optax.tree.sub(g, direct)), norm(direct)
    share = jnp.where(second == 0, 0, second / (first + second))
    return jnp.stack([cosine, length / reference, share])


def _own_state(
    optimizer: BilevelOptimizer, state: BilevelState, task: Task, key: Any = None
) -> BilevelState:
    memory: dict[str, Any] = {"key": key} if optimizer.draws else {}
    if optimizer.remembers_batch:
        first = jax.tree.map(lambda x: x[0], task.train_batch)
        memory = {"train_batch": first, "key": jax.random.key(0)}
    return fresh_state(optimizer, state, **memory)


class _Program:
    """A method's estimates along the horizon, compiled: what its cost is measured on."""

    def __init__(
        self,
        optimizer: Any,
        state: BilevelState,
        T: int,
        task: Task,
    ) -> None:
        k = optimizer.unroll_steps if isinstance(optimizer, UnrollingMethod) else 1
        blocks = T // k
        self.steps = blocks * k
        own, trains = _own_state(optimizer, state, task), task.train_batch
        if isinstance(optimizer, UnrollingMethod):
            optimizer = dataclasses.replace(optimizer, batches="stack")  # pyright: ignore[reportArgumentType]
            trains = jax.tree.map(
                lambda x: x[: self.steps].reshape(blocks, k, *x.shape[1:]), trains
            )

        def along(state: BilevelState, task: Task) -> Any:
            def block(carry: Any, train: PyTree) -> Any:
                state, total = carry
                done: Any = optimizer.estimate(state, dataclasses.replace(task, train_batch=train))
                return (moved(state, done), optax.tree.add(total, done.hypergradient)), None

            start = (state, optax.tree.zeros_like(state.hyperparams))
            return jax.lax.scan(block, start, task.train_batch)[0]

        self._args = (own, dataclasses.replace(task, train_batch=trains))
        self.flops = flops(along, *self._args)
        self._compiled = jit(along).lower(*self._args).compile()

    @functools.cached_property
    def _calls(self) -> int:
        """How many calls last long enough for the clock and the scheduler; warms up too."""
        once = [self._time(1) for _ in range(3)]
        return max(1, int(MEASURE_SECONDS / max(min(once), 1e-6)))

    def seconds(self) -> float:
        """Return the time of one inner step."""
        return self._time(self._calls) / self._calls / self.steps

    def _time(self, calls: int) -> float:
        started = clock.perf_counter()
        for _ in range(calls):
            jax.block_until_ready(self._compiled(*self._args))
        return clock.perf_counter() - started


class _Plain(_Program):
    """Training alone along the horizon, with no hypergradient: what costs are relative to."""

    def __init__(self, inner: InnerStep, state: BilevelState, task: Task) -> None:
        def along(state: BilevelState, task: Task) -> Any:
            after = walk(inner, state, task)
            return after.params, after.inner_opt_state, after.model_state

        self.steps = int(jax.tree.leaves(task.train_batch)[0].shape[0])
        self._args = (state, task)
        self.flops = flops(along, *self._args)
        self._compiled = jit(along).lower(*self._args).compile()


def _times(
    programs: dict[str, _Program], plain: _Plain, rounds: int
) -> tuple[dict[str, tuple[np.ndarray, float]], float]:
    """Return each method's time over the plain step's of the same round, and FLOPs over its.

    In a round all run once, the plain step before and after each, so that noise that lasts hits
    both. Also returns the plain step's median time, in seconds.
    """
    if not rounds:
        return {}, float("nan")
    ratios: dict[str, list[float]] = {name: [] for name in programs}
    bases: list[float] = []
    for _ in range(rounds):
        before = plain.seconds()
        for name, program in programs.items():
            here = program.seconds()
            after = plain.seconds()
            ratios[name].append(2 * here / (before + after))
            bases.append(before)
            before = after
    base = plain.flops / plain.steps
    times = {
        name: (np.asarray(ratios[name]), program.flops / program.steps / base)
        for name, program in programs.items()
    }
    return times, float(np.median(bases))
