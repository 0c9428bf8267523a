"""`solve`: a whole run as one compiled program, executed in chunks of steps."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from gradhpo.errors import (
    DivergenceWarning,
    advice,
    check_callable,
    check_count,
    check_hashable,
    check_instance,
    check_number,
    check_same_tree,
    warn_user,
)
from gradhpo.feed import HostFeed, Segment, device_feed
from gradhpo.fingerprint import Fingerprint, settings
from gradhpo.host import Source, decode, encode, seeds_of
from gradhpo.interrupts import deferred
from gradhpo.observers.steps import Steps
from gradhpo.observers.telling import Observer, ended
from gradhpo.optimizer import BilevelOptimizer
from gradhpo.problem import Problem
from gradhpo.program import Program
from gradhpo.progress import Bar
from gradhpo.run_folder import RunFolder, open_folder, run_kind
from gradhpo.solution import Best, Solution, check_resume, check_same_names
from gradhpo.state import METRICS, BilevelState, PyTree, prepare
from gradhpo.task import typed_keys
from gradhpo.timetable import EpisodeInit, Timetable, schedule_and_rate, starts_fresh
from gradhpo.trial import PHI, Rates, Trial
from gradhpo.watch import Stop, Watch

Record: TypeAlias = Callable[[PyTree], dict[str, Any]] | Sequence[str] | None
Callback: TypeAlias = Callable[[int, BilevelState, dict[str, Any]], Any]

TOLD = "the callback returned True"
"""Why a run ends that its callback ends."""
CHUNK_SECONDS = 0.5
"""How long a chunk of steps should take, so that the progress bar moves."""


def solve(
    problem: Problem,
    optimizer: BilevelOptimizer,
    steps: int,
    key: jax.Array,
    *,
    lr_hyper: float | Callable[[jax.Array], Any] | None = None,
    episode_length: int | None = None,
    lr_reptile: float = 1.0,
    episode_init: EpisodeInit = "reptile",
    eval_every: int | None = None,
    metric: str = "val_loss",
    mode: Literal["min", "max"] = "min",
    stop: Stop | None = None,
    record: Record = None,
    resume: Solution | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    every: int | None = None,
    callback: Callable[..., Any] | None = None,
    progress: bool | None = None,
    observers: Iterable[Observer] = (),
) -> Solution:
    """Run an optimizer on a problem for a number of steps, reproducibly to the bit.

    The loop is compiled once, whatever `steps`; the host sees the metrics of each chunk of steps.
    Randomness at a step depends on the key and the number of the step alone, so a run that is
    resumed gives the bits of one that was not interrupted.

    Args:
      problem: the losses, the data and the initialization.
      optimizer: any `BilevelOptimizer`.
      steps: steps to take in all, those before `resume` included.
      key: a key from `jax.random.key`, or an array of n keys: n runs, batched by `vmap` in one
        program, each with its own weights, hyperparameters and data: a run of a batch takes the
        batches that it takes alone. Host data of an iterable is shared.
      lr_hyper: step size of plain gradient descent on λ, where the optimizer has no
        `outer_optimizer`: a number, or a traceable function of the step, counted from 0.
      episode_length: steps in an episode, after which the weights start anew from φ, moved by
        Reptile; None for one long episode, in which nothing starts anew. For HyperDistill it must
        be the optimizer's `T`, the horizon for which θ is estimated.
      lr_reptile: Reptile step size, with `episode_length`.
      episode_init: where an episode starts: "reptile": from φ; "fresh": from the weights of
        `Problem.init` with a key of their own, as data distillation needs it.
      eval_every: steps between evaluations, at which `problem.metrics` is measured, the best state
        is kept, `stop` is asked and `callback` is called; by default only after the last step.
      metric: what says which state is the best: one of the metrics of a step, or a name of
        `problem.metrics`.
      mode: "min" or "max": which of its values are good.
      stop: a `Stop(patience=…, target=…)`: when to end before the last step.
      record: what to keep of λ after every step: a function of the hyperparameters that returns a
        dict of arrays by name; or names of their leaves, as `"layer.decay"`; by default the leaves
        that are scalars. `[]` keeps nothing.
      resume: a solution of the same problem, optimizer and key, to go on from. Host batches go on
        after those that were used: a function that takes `start` begins there; an iterator with
        `get_state` and `set_state` is put there by `Solution.data_state`; an iterable, or another
        function, is read anew, and the batches used are skipped. A plain iterator is read on from
        where it stands (exactly the batches used were read, unless the run diverged, or was
        stopped by `stop`, `callback` or a signal: more were read ahead then). `record` and the
        names of `Problem.metrics` must be as before; with another `metric` or `mode` the best is
        looked for anew. The rates may be others; a problem or optimizer that computes something
        else is refused by the solution's `fingerprint`.
      checkpoint: a folder, or an address such as "s3://bucket/run", in which the run is saved now
        and then, and at its end; `gradhpo stop`, or a file `stop.txt` in it, ends it as Ctrl-C
        does, within seconds. Where it holds this run already, the run goes on from there, in
        a new process too, to the bits of one that was not interrupted; `resume` is then not
        looked at. The two newest checkpoints are kept. Another key, problem, optimizer, rate or
        kind of episodes is refused (after a divergence another rate is taken); `steps`, `stop`,
        `callback` and `eval_every` may change. `batches` must be something that can be read
        again, or an iterator with `get_state` and `set_state`.
      every: steps between checkpoints; by default one a minute, or more seldom if writing one
        takes more than three seconds.
      callback: called as `callback(steps, state, evals)` at every evaluation, `evals` being what
        `problem.metrics` gave there; or, if it takes two arguments, without. Returning True stops.
        After a crash it is called again for evaluations since the last checkpoint.
      progress: whether to draw a progress bar (needs tqdm); None draws one on a terminal.
      observers: told of the metrics of every step and of evaluations, chunk by chunk, and of what
        ended the run early, see `gradhpo.observers`; if one raises an error, a warning says so,
        and the run goes on.

    Returns:
      The state and the metrics of every step. If a metric of a step is not finite, a
      `DivergenceWarning` names it, and the state before that step is returned; in a batch of
      keys, the others go on. If host data ends early, a warning says so, and what was done is
      returned. So it is at Ctrl-C or SIGTERM, after the chunk of steps that is being computed, and
      without an evaluation that is not due there, so that the run can go on as if nothing had
      been; a second Ctrl-C raises KeyboardInterrupt at once. `Solution.stopped` says what ended a
      run before its last step.

    Raises:
      ValueError: for an argument out of range, neither or both of `outer_optimizer` and
        `lr_hyper`, host batches whose shapes differ, a `resume` or `checkpoint` of another run, or
        if no hyperparameter would ever move.
      TypeError: for an argument of the wrong kind.
      DamagedFile: if no checkpoint in the folder is whole.
      StorageInUse: if another process runs with this folder, or has taken over a store.

    Warns:
      UnreachedWarning: if a hyperparameter gets no hypergradient, whatever the numbers.
      FrozenWarning: if `Problem.batch` draws by NumPy, once for all steps.
      DivergenceWarning: if a metric stops being finite.
    """
    check_instance("problem", problem, Problem)
    check_instance("optimizer", optimizer, BilevelOptimizer)
    check_count("steps", steps)
    key = _check_key(key)
    optimizer.check_step(problem.train_loss, problem.val_loss, lr_hyper)
    timetable = Timetable.of(optimizer, episode_length)
    watch = Watch(metric, mode, stop, _check_every(eval_every, stop) or steps + 1)
    called = _called(callback)
    fresh = starts_fresh(episode_init, episode_length, lr_reptile)
    lr_reptile = check_number("lr_reptile", lr_reptile, -np.inf, np.inf)
    schedule, rate = schedule_and_rate(lr_hyper)
    if rate is not None:
        rate = check_number("lr_hyper", rate, -np.inf, np.inf)
    rates = Rates(rate, None if episode_length is None else lr_reptile)
    batched = jnp.shape(key) != ()
    # Compiled code is kept by the problem; it must not keep the host data too.
    trial = Trial(problem.described(), optimizer, timetable, schedule, fresh)
    data = None if problem.batch is not None else Source(problem.batches)
    own_batches = batched and data is not None and data.own
    program = Program(trial, batched, _recorded(record), own_batches)
    kind = run_kind(schedule or rate, episode_length, lr_reptile, episode_init)
    folder = open_folder(checkpoint, every, problem, kind)

    def pair() -> PyTree:
        """Return the shapes of what the first step takes from the host."""
        return None if data is None else data.form.shapes(*(key.shape if own_batches else ()))

    with folder or contextlib.nullcontext():
        source, found = "resume", None if folder is None else folder.restored(program, key, pair)
        if folder is not None and found is not None:
            source, resume = folder.name, found
        if resume is not None:
            check_resume(resume, key, episode_length, source)
        first = 0 if resume is None else resume.steps
        if first > steps:
            raise ValueError(f"{source} has taken {first} steps already, more than steps={steps}")
        tells = Steps(observers, key.shape, settings=kind() | {"optimizer": settings(optimizer)})
        run = _Run(program, key, rates, resume, watch, called, source, tells, steps)
        if folder is not None and found is not None:
            run.stop_as_before(folder.told and callback is not None)
        if first == steps or run.stopped is not None:
            segments = iter(())
            run.check(pair() if problem.reopens else None)
        elif data is None:
            segments = device_feed(first, steps)
        else:
            segments = _host_segments(data, timetable, key, resume, steps)
        with Bar(progress, total=steps, unit="step", done=first) as bar, ended(tells.telling):
            tells.begin(steps, None if folder is None else folder.run(key))
            run.go(segments, bar, folder)
        return run.solution()


def _host_segments(
    data: Source, timetable: Timetable, key: jax.Array, resume: Solution | None, steps: int
) -> Iterator[Segment]:
    """Return the segments of a run on host data, after those that were taken already."""
    feed, seeds = HostFeed(data, timetable, axis=jnp.shape(key) != ()), seeds_of(key)
    feed.know(decode(None if resume is None else resume.data_state))
    first, runs = 0 if resume is None else resume.steps, len(seeds)
    return feed.segments(seeds, np.full(runs, first), np.ones(runs, bool), steps - first, first)


class _Run:
    """A run in progress: its state on the device, and what the host has collected of it."""

    def __init__(
        self,
        program: Program,
        key: jax.Array,
        rates: Rates,
        resume: Solution | None,
        watch: Watch,
        callback: Callback,
        source: str,
        tells: Steps,
        steps: int,
    ) -> None:
        self.program, self.key, self.watch, self.callback = program, key, watch, callback
        self._tells, self._steps = tells, steps
        self.told = self.expected = False
        self.stopped: str | None = None
        """Why it ends, even if that is at its last step."""
        self._source = source
        """What `resume` is called in messages."""
        self._best: Best | None = None
        self.rates = jax.tree.map(lambda rate: np.asarray(rate, jnp.result_type(float)), rates)
        self.done = 0
        self.latest: dict[str, float] = {}
        self._state: BilevelState | None = None
        self._planned, self._compiled, self._evaluated, self._checked = 8, False, 0, False
        self._metrics: list[dict[str, np.ndarray]] = []
        self._evals: list[dict[str, Any]] = []
        self._record: list[dict[str, Any]] = []
        self._record_start: dict[str, Any] = {}
        self._fingerprint: Fingerprint | None = None
        """Of the run that is gone on with, until it is compared; then of this one."""
        self._eval_steps: list[int] = []
        self._diverged = np.zeros(key.shape, int)
        self._fault = "every run had diverged before"
        """How the last run diverged."""
        self._frozen: BilevelState | None = None
        self._segment: Segment | None = None
        self._data_state: bytes | None = None
        if resume is not None:
            self._state = prepare(resume.state)
            if resume.phi is not None:
                self._state = self._state.update(metadata={PHI: resume.phi})
            self.done, self._data_state = resume.steps, resume.data_state
            metrics, kept = resume.metrics, resume.record
            if not program.batched:  # without the row of a divergence: that step is taken anew
                metrics, kept = jax.tree.map(lambda rows: rows[: resume.steps], (metrics, kept))
            self._metrics, self._evals, self._record = [metrics], [resume.evals], [kept]
            self._record_start, self._fingerprint = resume.record_start, resume.fingerprint
            if resume.best is not None and watch.asks_as(resume.best):
                self._best = resume.best
            self._eval_steps = resume.eval_steps.tolist()
            tells.resume(metrics, self._eval_steps, resume.evals)
            self._evaluated = max(self._eval_steps, default=0)
            if program.batched:  # a run alone goes on, with a lower rate perhaps
                self._diverged = np.array(resume.diverged_at)
                self.stopped = None if self.alive.any() else resume.stopped or self._fault
                self._frozen = self._state

    @property
    def _problem(self) -> Problem:
        return self.program.trial.problem

    @property
    def alive(self) -> np.ndarray:
        """Which runs have not diverged: bools, `()` or `(n,)`."""
        return self._diverged == 0

    @property
    def over(self) -> bool:
        """Whether it ends before its last step: stopped, or diverged."""
        return self.stopped is not None or not self.alive.any()

    @functools.cached_property
    def data(self) -> PyTree:
        """`Problem.data` of the run or runs."""
        return None if self._problem.data is None else self.program.data(self.key)

    @property
    def early(self) -> bool:
        """Whether it has ended before its last step."""
        return self.stopped is not None and self.done < self._steps

    def go(self, segments: Iterable[Segment], bar: Bar, folder: RunFolder | None) -> None:
        """Take the steps, evaluate and save when it is due; what asks ends it after a chunk."""
        asked: list[str] = []

        def note(name: str) -> None:
            asked.append(name)
            bar.write(f"{name}: finishing a chunk of steps; once more to stop at once")

        with deferred(note):
            for segment in segments:
                self.begin(segment)
                while self.done < segment.end and not (self.over or asked):
                    evaluated = (self.done // self.watch.every + 1) * self.watch.every
                    saved = evaluated if folder is None else folder.next(self.done)
                    until = min(segment.end, evaluated, saved)
                    bar.advance(self.advance(segment, until), **self.latest)
                    if self.done == evaluated and self.alive.any():
                        self.evaluate()
                    if folder is not None and folder.due(self.done):
                        folder.save(self.solution(), self.told)
                    if folder is not None and (who := folder.stop_request()) is not None:
                        asked.append(who)
                if self.over or asked:
                    break
            asks = bool(asked) and self.done < self._steps and not self.over
            if asks:
                self.stopped = asked[0]
            if folder is not None and self._state is not None:
                folder.save(self.solution(), self.told)
        again = "resume=solution" if folder is None else f"checkpoint={folder.address!r}"
        how = f"To go on, call solve again with {again}"
        if asks:
            ends = f"stopped after step {self.done} of {self._steps}"
            warn_user(f"{asked[0]}: {ends}. {how}", RuntimeWarning)
        else:
            self.finish()
        self._tells.tell()
        if self.early and self.stopped is not None:
            self._tells.stop(self.done, self.stopped, how, self.expected)

    def stop_as_before(self, told: bool) -> None:
        """Stop where the run that is gone on with had stopped, if that still holds.

        Seconds are each call's own.
        """
        best, why = self._best, None
        if best is not None:
            why = self.watch.why(self.done, best, self.alive, elapsed=0)
        self._stop(why, told)

    def _stop(self, why: str | None, told: bool) -> None:
        """Stop if a condition of `stop` says so, or the callback was."""
        self.told = told
        if self.stopped is None and (why is not None or told):
            self.expected = why is not None
            self.stopped = TOLD if why is None else why

    def begin(self, segment: Segment) -> None:
        """Make the first state if there is none, and calibrate where the segment says so."""
        self._segment = segment
        if not self._checked:
            own = self.program.own_batches
            pair = jax.tree.map(lambda x: x[:, 0] if own else x[0], segment.host)
            first = self.check(pair)
            if not segment.calibrate:
                span = dict.fromkeys(("start", "n", "offset"), np.int32(0))
                args = (first, self.key, self._data_shape, self.rates, span, segment.host)
                jax.eval_shape(lambda *args: self.program.chunk(*args, segment.capacity), *args)
            if self._state is None:
                self._state = state = self.program.init(self.key, self.data, pair)
                kept = jax.device_get(self.program.keep(state.hyperparams))
                self._record_start = jax.tree.map(np.array, kept)
            self._checked = True
        if segment.calibrate:
            index = np.int32(segment.start)
            self._state = self.program.calibrate(
                self._state, self.key, self.data, index, segment.host
            )

    def check(self, pair: PyTree) -> BilevelState:
        """Trace a run, and compile nothing: what is wrong with a loss is said here.

        Returns the shapes of its state. Without a pair of host batches its program is not compared
        with that of the run that is gone on with.
        """
        data, problem = self._data_shape, self._problem
        first = jax.eval_shape(self.program.init, self.key, data, pair)
        evals = jax.eval_shape(self.program.evaluate, first, data)
        self.watch.check(first.metadata, evals, self.key.shape)
        if self._metrics and self._metrics[0]:  # rows of a resumed run; a state by hand has none
            kept = self.program.kept_shapes(first.hyperparams)
            check_same_names("record", kept, self._record[0])
            if self._eval_steps:
                check_same_names("Problem.metrics", evals, self._evals[0])
        if self._state is not None:
            check_same_tree(self._source, self._state, "the state of this run", first)
        if pair is not None or problem.batch is not None:
            before = self._fingerprint
            self._fingerprint = self.program.fingerprint(first, self.key, data, pair)
            if before is not None:
                self._fingerprint.check(self._source, before)
        return first

    @functools.cached_property
    def _data_shape(self) -> PyTree:
        if self._problem.data is None:
            return None
        return jax.eval_shape(self.program.data, self.key)

    def advance(self, segment: Segment, until: int) -> int:
        """Take steps of the segment, no more than until the given one; return how many."""
        started, before = time.perf_counter(), self._state
        n = min(self._planned, segment.capacity, until - self.done)
        self._state, values, record, bad = self._chunk(before, segment, n)
        values, record, bad = jax.device_get((values, record, bad))
        values, record, bad = jax.tree.map(lambda x: np.array(x[:n]), (values, record, bad))
        for run in np.flatnonzero(np.ravel(self.alive & bad.any(axis=(0, -1)))):
            self._diverge(int(run), bad, before, segment)
        rows = self.done + 1 + np.arange(n).reshape(-1, *[1] * self._diverged.ndim)
        for array in jax.tree.leaves((values, record)):
            array[(self._diverged > 0) & (rows >= self._diverged)] = np.nan
        self._metrics.append(values)
        self._tells.add(jax.tree.map(lambda x: x[: self._told_rows(n)], values))
        self._record.append(record)
        self.done += n
        seconds = time.perf_counter() - started
        self._planned = max(1, int(n * CHUNK_SECONDS / seconds)) if self._compiled else 8
        self._compiled = True
        if self.alive.any():
            self.latest = {name: float(np.nanmean(values[name][-1])) for name in METRICS[:2]}
        else:
            self.done = int(self._diverged.max()) - 1
            self.stopped = self._fault
        return n

    def _told_rows(self, n: int) -> int:
        """Return how many of a chunk's rows observers are told of: none that is taken anew."""
        if self.alive.any():
            return n
        last = int(self._diverged.max()) - (not self.program.batched)
        return last - self.done

    def finish(self) -> None:
        """Say so if the data ended early, and evaluate at the end if that was not done yet."""
        if self._state is None:
            raise ValueError("Problem.batches is empty: no step was taken")
        if self.done < self._steps and not self.over:
            self.stopped = "Problem.batches ended"
            message = f"{self.stopped}: {self.done} of {self._steps} steps were taken"
            warn_user(message, RuntimeWarning)
        if self._evaluated < self.done:
            self.evaluate()

    def evaluate(self) -> None:
        """Measure `Problem.metrics`, keep the best state, call the callback, and ask to stop."""
        state, evals = self._mended(), {}
        if self._problem.metrics is not None:
            evals = jax.tree.map(np.asarray, self.program.evaluate(state, self.data))
            self._evals.append(jax.tree.map(lambda row: row[None], evals))
            self._eval_steps.append(self.done)
            self._tells.evaluated(self.done, evals)
        self._evaluated = self.done
        self._best = self._better(state, evals)
        asked = self.callback(self.done, state, evals)
        said = isinstance(asked, bool | np.bool_ | np.ndarray | jax.Array)
        told = said and np.shape(asked) == () and bool(asked)
        self._stop(self.watch.why(self.done, self._best, self.alive), told)

    def _better(self, state: BilevelState, evals: dict[str, Any]) -> Best:
        """Return the best of each run, now that it has this state."""
        metric, mode = self.watch.metric, self.watch.mode
        # A run that has diverged is as it was before that.
        step = np.where(self._diverged > 0, self._diverged - 1, self.done)
        if metric in evals:
            score = np.asarray(evals[metric])
        else:  # of the last step, which is infinite before the first
            last = np.asarray(state.metadata[metric])
            score = np.where(step > 0, last, np.nan).astype(last.dtype)
        better = self.watch.better(score, self._best)
        if self._best is None or better.all():
            return Best(state, score, step, metric, mode)
        if not better.any():
            return self._best
        return Best(
            self.program.merge(self._best.state, state, better),
            np.where(better, score, self._best.score),
            np.where(better, step, self._best.step),
            metric,
            mode,
        )

    def data_state(self) -> bytes | None:
        """Return where the host's batches stand: after those of the steps that are done."""
        segment = self._segment
        if segment is None:
            return self._data_state
        over = self.done >= segment.end and not segment.calibrate
        return encode(segment.after if over else segment.before)

    def solution(self) -> Solution:
        """Return what there is."""
        state = self._mended()
        episodes = self.program.trial.timetable.episode_length is not None
        ends = max(self.done, int(self._diverged.max()))  # a diverged step has a row too, of NaN
        return Solution(
            state,
            jax.tree.map(lambda rows: rows[:ends], _concatenate(self._metrics)),
            _concatenate(self._evals),
            np.asarray(self._eval_steps, int),
            self.done,
            state.metadata[PHI] if episodes else None,
            self._diverged,
            np.asarray(jax.random.key_data(self.key)),
            self._best,
            jax.tree.map(lambda rows: rows[:ends], _concatenate(self._record)),
            self.data_state(),
            self._record_start,
            self._fingerprint,
            self.stopped if self.early else None,
        )

    def _chunk(self, state: BilevelState | None, segment: Segment, n: int) -> Any:
        offset = self.done - segment.start if segment.host is not None else 0
        span = {"start": self.done, "n": n, "offset": offset}
        span = {name: np.int32(value) for name, value in span.items()}
        args = (state, self.key, self.data, self.rates, span, segment.host, segment.capacity)
        return self.program.chunk(*args)

    def _diverge(
        self, run: int, bad: np.ndarray, before: BilevelState | None, segment: Segment
    ) -> None:
        """Report a run's first bad step, and keep its state before it.

        The steps up to there are taken again from the chunk's beginning by the same program, to
        the same bits: that costs nothing while all goes well.
        """
        faults = bad.reshape(bad.shape[0], -1, bad.shape[-1])[:, run]
        first = int(np.argmax(faults.any(axis=-1)))
        step = self.done + first + 1
        metric = METRICS[int(np.argmax(faults[first]))]
        which = f" of run {run}" if self.program.batched else ""
        fault = f"{metric} stopped being finite at step {step}{which}"
        if step >= self._diverged.max():
            self._fault = fault
        kept = self._chunk(before, segment, first)[0]
        warn_user(
            f"{fault}: the state after step {step - 1} is kept. {advice(metric, step, kept)}",
            DivergenceWarning,
        )
        mask = (np.arange(self._diverged.size) == run).reshape(self._diverged.shape)
        self._frozen = self.program.merge(self._frozen or kept, kept, mask)
        self._diverged[mask] = step

    def _mended(self) -> BilevelState:
        """Return the state, with each diverged run's part as it was before it diverged."""
        assert self._state is not None
        if self._frozen is None or self.alive.all():
            return self._state
        return self.program.merge(self._state, self._frozen, ~self.alive)


def _concatenate(parts: list[dict[str, Any]]) -> dict[str, Any]:
    parts = [part for part in parts if part]
    return jax.tree.map(lambda *rows: np.concatenate(rows), *parts) if parts else {}


def _recorded(record: Record) -> Callable[[PyTree], dict[str, Any]] | tuple[str, ...] | None:
    """Return what a program is told to keep of λ: hashable, and equal for equal requests."""
    if record is None:
        return None
    if callable(record):
        check_hashable("record", record)
        return record
    named = isinstance(record, Sequence) and not isinstance(record, str)
    if not named or not all(isinstance(name, str) for name in record):
        accepted = "a function of the hyperparameters, or a list of names of their leaves"
        raise TypeError(f"record must be {accepted}, got {record!r}")
    return tuple(record)


def _called(callback: Callable[..., Any] | None) -> Callback:
    """Return the callback as a function of steps, state and evals."""
    if callback is None:
        return lambda steps, state, evals: None
    check_callable("callback", callback)
    try:
        signature = inspect.signature(callback)
    except ValueError:  # a function of C, which does not say
        return callback
    if _binds(signature, 3):
        return callback
    if _binds(signature, 2):
        return lambda steps, state, evals: callback(steps, state)
    accepted = "a function of (steps, state, evals) or of (steps, state)"
    raise TypeError(f"callback must be {accepted}, got one of {signature}")


def _binds(signature: inspect.Signature, count: int) -> bool:
    """Whether a function can be called with so many positional arguments."""
    try:
        signature.bind(*[None] * count)
    except TypeError:
        return False
    return True


def _check_every(eval_every: int | None, stop: Stop | None) -> int | None:
    if eval_every is not None:
        check_count("eval_every", eval_every)
    elif stop is not None:
        raise ValueError("stop needs eval_every: it is asked at evaluations")
    return eval_every


def _check_key(key: Any) -> jax.Array:
    """Return a typed key, `()` or `(n,)`, from a typed or a legacy one."""
    accepted = "key must be made by jax.random.key, or be an array of n such keys"
    key = typed_keys(accepted, key)
    if key.ndim > 1:
        raise ValueError(f"{accepted}, got keys of shape {key.shape}")
    return key
