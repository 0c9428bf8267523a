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
    F2SAOptimizer,
    FOOptimizer,
    ForwardGradientOptimizer,
    GreedyOptimizer,
    ImplicitOptimizer,
    MASOBAOptimizer,
    NRESOptimizer,
    OneStepOptimizer,
    OnlineHypergradientOptimizer,
    PESOptimizer,
    SOBAOptimizer,
    T1T2Optimizer,
    UnrolledOptimizer,
)
from gradhpo.compilation import jit
from gradhpo.costs import Plain, Program, own_state, times_of
from gradhpo.diagnosis import Diagnosis, Row
from gradhpo.errors import check_count, check_number, check_same_tree, stack
from gradhpo.horizon import estimate_at, moved
from gradhpo.host import Source, seeds_of
from gradhpo.hypergradient import at_least_float32, norm, validation
from gradhpo.in_code import DIRECTIONS, WINDOWS
from gradhpo.inner import InnerStep
from gradhpo.optimizer import BilevelOptimizer, HypergradientMethod
from gradhpo.problem import Problem, stream
from gradhpo.progress import Bar
from gradhpo.regime import Regime, noise
from gradhpo.roughness import Along, along
from gradhpo.spoken import Spoken
from gradhpo.state import BilevelState, PyTree, prepare
from gradhpo.task import Task
from gradhpo.training_length import training_length

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
STOCHASTIC = ("soba", "masoba", "f2sa")
"""What it compares where it is asked to: methods that need many steps to be right."""
NAMED = (*METHODS, *DRAWN, *STOCHASTIC)
QUICK = ("first-order", "one-step", "t1t2", "hyperdistill")
"""What `methods="quick"` compares: what compiles soonest, with the first γ."""
TRUNCATIONS = (2, 5, 10, 20, 50, 100)
"""The steps that "unrolled" goes back, where they are fewer than the horizon."""
EXACT = "exact"
OF_EXACT, OF_METHOD = 6.0, 2.0
"""Times of the exact hypergradient and of a method over that of training alone, to compile most."""


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
    outer_step: float = 0.01,
    budget: float | None = None,
    progress: bool | None = None,
) -> Diagnosis:
    """Compare methods with the exact hypergradient at a state, and their cost; recommend one.

    Also tells where the state stands: whether training is chaotic along the hypergradient, how much
    noise there is over batches, and whether the weights are at a minimum: `Diagnosis.regime`.

    The exact hypergradient is `dL_val(w_T(λ), λ)/dλ` through the T = `horizon` inner steps that
    begin at `state`, by reverse mode. Every method walks the same T steps on the same batches, with
    λ held, so that all see the same `w_T`; its estimate at the end is compared. An online method
    starts an episode there (w*_1 = w_0), and HyperDistill estimates θ first, by Algorithm 4 on T
    other batches, as it does in a run; Greedy and DrMAD unroll all T steps; "unrolled k" is exact
    through the last k of them only. "implicit cg" and "implicit nystrom" estimate once in T steps
    with at most 10 products with the Hessian (fewer for T below 20), and with one over the length
    of the T steps for a ridge (`ImplicitOptimizer.damping`; a note says the settings). "es" (100
    particles, σ = 0.1) and "forward-gradient" (16 directions) unroll all T, and "pes" and "nres"
    go there in windows of T / 5, as "f2sa" does (multiplier 10). "soba" and "masoba" begin with
    nothing solved. A step counts at the pace of one estimate an inner step for the online methods,
    and one estimate in k steps for those that unroll k.

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
      outer_step: how far λ is moved to see whether training is smooth there: its coordinate with
        the largest hypergradient by this, the others in proportion. Take it of the size of a step
        of the outer optimizer.
      budget: seconds. Methods that do not fit any more, by what those before took, are left out,
        and said in `notes`; the exact hypergradient always is computed.
      progress: whether to draw a progress bar (needs tqdm); None draws one on a terminal, and
        elsewhere writes to stderr a line for each method and every 15 seconds; False is silent.
        Nearly all of the time is compilation: an estimate of it comes first, and a better one
        after the exact hypergradient.

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
    outer_step = check_number("outer_step", outer_step, 0, float("inf"), open_low=True)
    if budget is not None:
        budget = check_number("budget", budget, 0, float("inf"))
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
    plain = InnerStep(inner_optimizer, update_fn, problem.train_loss)
    own, total = isinstance(methods, Mapping), (len(optimizers) + 1) * (samples + 1)
    with (
        Bar(progress, total=total, unit="estimate") as bar,
        Spoken(bar, silent=progress is False) as spoken,
    ):
        work = _Work(state, walks, stream(key, "optimizer"), rounds, spoken, bar, budget)
        work.begin(plain, len(optimizers), T)
        work.look(exact, plain, outer_step)
        optimizers = optimizers if own else work.tuned(optimizers, plain)
        for name, optimizer in {EXACT: exact, **optimizers}.items():
            work.compare(name, optimizer, strict=own)
        return work.diagnosis(T)


class _Work:
    """A diagnosis while it is made."""

    def __init__(
        self,
        state: BilevelState,
        walks: list[tuple[Task, PyTree]],
        key: jax.Array,
        rounds: int,
        spoken: Spoken,
        bar: Bar,
        budget: float | None,
    ) -> None:
        self._state, self._walks, self._key, self._rounds = state, walks, key, rounds
        self._spoken, self._bar, self._budget = spoken, bar, budget
        self._started = self._last = clock.perf_counter()
        self._notes: list[str] = []
        self._compared: dict[str, np.ndarray] = {}
        self._noise: dict[str, float] = {}
        self._programs: dict[str, Program] = {}

    def begin(self, plain: InnerStep, methods: int, T: int) -> None:
        """Compile training alone, and say how long all may take by how long that took."""
        self._spoken.doing("diagnose: training alone")
        self._plain = Plain(plain, self._state, self._walks[0][0])
        seconds = self._lap()
        self._methods = methods
        about = seconds * (OF_EXACT + OF_METHOD * methods)
        self._spoken.say(
            f"diagnose: training alone, {seconds:.1f} s; T = {T} steps, {methods} methods and the "
            f"exact hypergradient may take {about:.0f} s"
        )

    def look(self, exact: UnrolledOptimizer, plain: InnerStep, outer_step: float) -> None:
        """Compute the exact hypergradients, and where the state stands."""
        self._spoken.doing("diagnose: the exact hypergradient")
        self._truths = [_exact(exact, self._state, task) for task, _ in self._walks]
        self._spoken.doing("diagnose: roughness along it")
        found = [
            _look(plain, np.asarray(outer_step, np.float32), self._state, *walk, truth[0])
            for walk, truth in zip(self._walks, self._truths, strict=True)
        ]
        rows = jax.device_get(found)
        along, promised = jax.tree.map(lambda *x: np.stack(x).astype(float), *rows)
        truths = [_flat(truth[0]) for truth in self._truths]
        three = (along.smoothness, along.val_losses)
        self._regime = Regime(outer_step, *three, promised, along.train_losses, noise(truths))

    def tuned(
        self, optimizers: dict[str, BilevelOptimizer], plain: InnerStep
    ) -> dict[str, BilevelOptimizer]:
        """Return the methods, the implicit ones with a ridge of one over training's length."""
        if not any(isinstance(optimizer, ImplicitOptimizer) for optimizer in optimizers.values()):
            return optimizers
        try:
            length = float(_length(plain, self._state, self._walks[0][0]))
        except ValueError:  # no gradient of the training loss: they will say so
            length = 0.0

        def tuned(optimizer: BilevelOptimizer) -> BilevelOptimizer:
            if isinstance(optimizer, ImplicitOptimizer) and length > 0:
                return dataclasses.replace(optimizer, damping=1 / length)
            return optimizer

        return {name: tuned(optimizer) for name, optimizer in optimizers.items()}

    def compare(self, name: str, optimizer: BilevelOptimizer, strict: bool) -> None:
        """Compare a method; one that refuses the problem is left out, unless `strict`."""
        self._spoken.doing(f"diagnose: {name}")
        if self._spent(name):
            return
        try:
            made: list[Any] = []
            for index, (given, truth) in enumerate(zip(self._walks, self._truths, strict=True)):
                own = jax.random.fold_in(self._key, index)
                made.append(_compare(optimizer, self._state, *given, truth, own))
                self._bar.advance(1)
        except ValueError as error:
            if name == EXACT or strict:
                raise
            self._notes.append(f"{name} is left out: {error}")
            return
        figures, estimates = zip(*jax.device_get(made), strict=True)
        self._compared[name] = np.asarray(figures, float)
        self._noise[name] = noise([_flat(g) for g in estimates])
        if isinstance(optimizer, ImplicitOptimizer) and not strict:
            settings = f"unroll_steps={optimizer.unroll_steps}, K={optimizer.K}"
            self._notes.append(f"{name}: {settings}, damping={optimizer.damping:.3g}.")
        if self._rounds:
            self._programs[name] = Program(optimizer, self._state, self._walks[0][0])
        self._bar.advance(1)
        self._tell(name)

    def _spent(self, name: str) -> bool:
        """Whether the budget has no place for one method more, by those before; noted."""
        now = clock.perf_counter() - self._started
        if name == EXACT or self._budget is None:
            return False
        after = now + (now / (2 + len(self._compared)))
        if after > self._budget:
            self._notes.append(f"{name} is left out: budget={self._budget:g} s")
        return after > self._budget

    def _tell(self, name: str) -> None:
        """Say what the method took; after the exact one, what the others may take."""
        seconds = self._lap()
        if name == EXACT:
            rest = self._methods * seconds * OF_METHOD / OF_EXACT
            self._spoken.say(
                f"diagnose: the exact hypergradient took {seconds:.1f} s; "
                f"{self._methods} methods more, about {rest:.0f} s"
            )
        elif not self._bar.drawn:
            self._spoken.say(f"diagnose: {name}, {seconds:.1f} s")

    def _lap(self) -> float:
        now = clock.perf_counter()
        seconds, self._last = now - self._last, now
        return seconds

    def diagnosis(self, T: int) -> Diagnosis:
        """Return what was found, after timing."""
        times, base = times_of(self._programs, self._plain, self._rounds, self._spoken)
        rows: list[Row] = []
        for name, values in self._compared.items():
            time, cost = times.get(name, (np.empty(0), np.nan))
            cosine, ratio, share = values.T
            rows.append(Row(name, cosine, ratio, share, time, cost, self._noise[name]))
        return Diagnosis(rows[1:], rows[0], T, base, tuple(self._notes), self._regime)


def _flat(tree: PyTree) -> np.ndarray:
    return np.concatenate([np.ravel(np.asarray(leaf, float)) for leaf in jax.tree.leaves(tree)])


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
        elif name == "implicit":
            K = max(1, min(10, T // 2))
            made["implicit cg"] = ImplicitOptimizer(**inner, unroll_steps=T, K=K)
            # Its damping is known later.
            made["implicit nystrom"] = ImplicitOptimizer(
                **inner, unroll_steps=T, K=K, solver="nystrom", damping=1.0
            )
        elif name == "unrolled":
            for k in (k for k in TRUNCATIONS if k < T):
                made[f"unrolled {k}"] = UnrolledOptimizer(**inner, unroll_steps=k)
        elif name in STOCHASTIC:
            made[name] = _stochastic(name, inner_optimizer, update_fn, T)
        else:
            made[name] = simple[name]
    return made


def _stochastic(name: str, inner_optimizer: Any, update_fn: Any, T: int) -> BilevelOptimizer:
    if update_fn is not None:
        raise ValueError(f"methods: {name!r} needs an inner_optimizer, got an update_fn")
    if name == "f2sa":
        given: Any = {"unroll_steps": max(1, T // WINDOWS), "multiplier": 10.0, "growth": 0.0}
        return F2SAOptimizer(inner_optimizer, **given)
    return (SOBAOptimizer if name == "soba" else MASOBAOptimizer)(inner_optimizer)


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
def _look(
    inner: InnerStep, h: jax.Array, state: BilevelState, task: Task, others: PyTree, g: PyTree
) -> tuple[Along, jax.Array]:
    """Return what lies along the hypergradient, and what it promises."""
    largest = jax.tree.reduce(jnp.maximum, jax.tree.map(lambda x: jnp.max(jnp.abs(x)), g))
    downhill = optax.tree.scale(-1 / jnp.where(largest > 0, largest, 1), g)
    # One that overflows has no direction: all of λ is moved then, and its walks tell.
    finite = jnp.isfinite(norm(downhill))
    downhill = jax.tree.map(lambda x: jnp.where(finite, x, 1), downhill)
    both = jax.tree.map(lambda *x: jnp.concatenate(x), task.train_batch, others)
    longer = dataclasses.replace(task, train_batch=both)
    promised = h * jnp.asarray(optax.tree.vdot(g, downhill))
    return along(inner, state, longer, downhill, h), promised


_length = functools.partial(jit, static_argnums=0)(training_length)


@functools.partial(jit, static_argnums=0)
def _compare(
    optimizer: BilevelOptimizer,
    state: BilevelState,
    task: Task,
    others: PyTree,
    truth: tuple[PyTree, PyTree],
    key: jax.Array,
) -> tuple[jax.Array, PyTree]:
    """Return cosine, norm ratio and second-order share of a method's estimate, and itself.

    `key` is where a method that draws draws from.
    """
    own = own_state(optimizer, state, task, key)
    if optimizer.calibration_period:
        own = optimizer.calibrate(own, dataclasses.replace(task, train_batch=others))
    g = at_least_float32(estimate_at(optimizer, own, task).hypergradient)
    exact, direct = truth
    length, reference = norm(g), norm(exact)
    cosine = jnp.asarray(optax.tree.vdot(g, exact)) / (length * reference)  # NaN with a zero
    second, first = norm(optax.tree.sub(g, direct)), norm(direct)
    share = jnp.where(second == 0, 0, second / (first + second))
    return jnp.stack([cosine, length / reference, share]), g
