"""The folder of a run: its newest checkpoints, from which `solve` goes on by itself."""

from __future__ import annotations

import hashlib
import re
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from gradhpo import checkpoints, stop_request
from gradhpo.checkpoints import DamagedFile
from gradhpo.checksums import checksum
from gradhpo.commit import UNFINISHED
from gradhpo.errors import check_count, tracing, warn_user
from gradhpo.files import Files, files_of, where_of
from gradhpo.problem import READ_AGAIN, Problem
from gradhpo.program import Program
from gradhpo.solution import Solution, packed, templates, unpacked
from gradhpo.state import PyTree

KEPT = 2
"""Checkpoints that are kept: the newest, and the one before, should the newest be damaged."""
SECONDS = 60.0
"""Between two checkpoints, where nothing else is asked for."""
LOOK = 5.0
"""Seconds between two looks whether somebody asks for the end."""
NEVER = sys.maxsize
PROBE = ".probe"
SAVED = re.compile(r"[0-9]{8}-step-.*(\.arrays|\.npz)$")
"""The names of checkpoints, those of older versions too."""
SHARE = 20
"""How many times as long as writing it took is waited before the next one, at least."""


class RunFolder:
    """Holds a run's folder as a context, reads what is there, and saves to it now and then.

    Args:
      folder: a path, made if it is not there, or the address of a store.
      every: steps between checkpoints; None for one a minute, or more seldom, so that they take
        a twentieth of the time at most.
      problem: of the run.
      kind: what else makes the run, from `run_kind`.

    Raises:
      TypeError: if the folder is no path.
      ValueError: for host data that cannot be read again, or an address of another kind.
      StorageInUse: if another process has the folder.
    """

    def __init__(
        self, folder: Any, every: int | None, problem: Problem, kind: Mapping[str, Any]
    ) -> None:
        self._files = files_of(where_of("checkpoint", folder))
        self.address = self._files.address
        if every is not None:
            check_count("every", every)
        if not problem.reopens:
            got = type(problem.batches).__name__
            raise ValueError(f"with checkpoint= Problem.batches {READ_AGAIN}; got {got}")
        self._every, self._problem, self._kind = every, problem, dict(kind)
        self.told = False
        """Whether the callback had stopped the run that was found."""
        self._saved: tuple[int, bool, list[int]] | None = None
        """Of the newest checkpoint: its steps, whether it was told to stop, and what diverged."""
        self._due = self._look = 0.0

    def __enter__(self) -> RunFolder:
        self._files.probe(PROBE)
        self._lock = self._files.lock("checkpoint", "run", (), _say)
        self._due = time.monotonic() + SECONDS
        stop_request.forget(self._files)
        return self

    def __exit__(self, *exc: object) -> None:
        self._lock.release()

    @property
    def name(self) -> str:
        """How messages name it."""
        return f"checkpoint {self.address!r}"

    def run(self, key: jax.Array) -> str:
        """Return what tells this run from all others, in a few letters and digits."""
        what = f"{self.address} {np.asarray(jax.random.key_data(key)).tolist()}"
        return hashlib.sha256(what.encode()).hexdigest()[:16]

    def restored(
        self, program: Program, key: jax.Array, pair: Callable[[], PyTree]
    ) -> Solution | None:
        """Return the newest solution; None where there is none.

        Args:
          program: of the run.
          key: of the run.
          pair: returns the shapes of what a step takes from the host.

        Raises:
          DamagedFile: if there are checkpoints, and all of them are damaged.
          ValueError: if they are of another problem or optimizer, or a run with other settings.
        """
        # The folder is ours alone: whoever was writing these is dead.
        names = self._files.names()
        self._files.remove([n for n in names if n.endswith(UNFINISHED) or n.startswith(PROBE)])
        found = self._newest()
        if found is None:
            return None
        arrays, about = found
        if tuple(about["runs"]) != key.shape:
            had = tuple(about["runs"])
            raise ValueError(f"{self.name} is of a run with keys of shape {had}, got {key.shape}")
        for name, before in about["kind"].items():
            now = self._kind.get(name)
            if now != before and not (name == "lr_hyper" and about["diverged"]):
                raise ValueError(f"{self.name} is of a run with {name}={before}, got {name}={now}")
        solution = unpacked(arrays, about, templates(program, key, pair()), self.name)
        self.told = about["told"]
        self._saved = _moment(solution, self.told)
        return solution

    def next(self, done: int) -> int:
        """Return the step after which a chunk must end, since a checkpoint is due there."""
        return NEVER if self._every is None else (done // self._every + 1) * self._every

    def due(self, done: int) -> bool:
        """Whether it is time to save, after so many steps."""
        return time.monotonic() >= self._due if self._every is None else done % self._every == 0

    def stop_request(self) -> str | None:
        """Return who asks for the end, which is then obeyed; None where nobody does.

        It is looked for now and then. If it cannot be, a warning says so.
        """
        if time.monotonic() < self._look:
            return None
        self._look = time.monotonic() + LOOK
        try:
            who = stop_request.asked(self._files)
        except OSError as error:
            text = f"{self.name}: whether somebody asks for the end cannot be seen: {error}"
            warn_user(text, RuntimeWarning)
            return None
        if who is not None:
            stop_request.forget(self._files)
        return who

    def save(self, solution: Solution, told: bool) -> None:
        """Write a checkpoint, unless it is there, and remove the older ones but one.

        If the folder or its store refuses, or does not answer, a warning says so, and the run goes
        on.

        Raises:
          StorageInUse: if another process has taken a store over.

        Args:
          solution: what there is.
          told: whether the callback stopped the run there.
        """
        now = _moment(solution, told)
        if solution.steps == 0 or self._saved == now:
            return
        started = time.monotonic()
        arrays, about = packed(solution)
        about = {**about, "kind": self._kind, "told": told, "diverged": any(now[2])}
        try:
            number = max((int(name.split("-")[0]) for name in self._names()), default=0) + 1
            self._files.check_held()
            checkpoints.save(self._files, f"{number:08d}-step-{solution.steps}", arrays, about)
            self._saved = now
            self._files.remove(self._names()[KEPT:])
        except OSError as error:
            what = f"step {solution.steps} could not be saved"
            if self._saved == now:
                what = f"checkpoints before step {solution.steps} could not be removed"
            text = f"{self.name}: {what}, and the run goes on: {error.strerror}"
            warn_user(text, RuntimeWarning)
        ended = time.monotonic()
        self._due = ended + max(SECONDS, SHARE * (ended - started))

    def _names(self) -> list[str]:
        """Return the checkpoints, the newest first."""
        return saved_in(self._files)

    def _newest(self) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
        damaged: dict[str, str] = {}
        for name in self._names():
            try:
                found = checkpoints.load_named(self._files, name)
            except DamagedFile as error:
                damaged[name] = str(error)
                continue
            if damaged:
                told = "; ".join(damaged.values())
                warn_user(
                    f"{self.name} is damaged, and goes on from {name}: {told}",
                    RuntimeWarning,
                )
                self._files.remove(damaged)
            return found
        if damaged:
            told = "; ".join(damaged.values())
            raise DamagedFile(self.address, f"has no whole checkpoint ({told})")
        return None


def saved_in(files: Files) -> list[str]:
    """Return the names of the checkpoints of a run's folder, the newest first."""
    return [name for name in sorted(files.names(), reverse=True) if SAVED.match(name)]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _moment(solution: Solution, told: bool) -> tuple[int, bool, list[int]]:
    return solution.steps, told, np.ravel(solution.diverged_at).tolist()


def open_folder(
    folder: Any, every: int | None, problem: Problem, kind: Callable[[], dict[str, Any]]
) -> RunFolder | None:
    """Return a run's folder; None for None.

    Raises:
      ValueError: for `every` without a folder.
    """
    if folder is not None:
        return RunFolder(folder, every, problem, kind())
    if every is not None:
        raise ValueError("every needs checkpoint: it is the number of steps between checkpoints")
    return None


def run_kind(
    lr_hyper: Any, episode_length: int | None, lr_reptile: float, episode_init: str
) -> Callable[[], dict[str, Any]]:
    """Return what gives, as JSON, what else makes a run: in a folder it stays as it is."""

    def kind() -> dict[str, Any]:
        rate = lr_hyper
        if callable(rate):
            with tracing("lr_hyper, a function of the step,", step=np.int32(0)):
                rate = f"a function ({checksum(jax.make_jaxpr(rate)(np.int32(0)))[:12]})"
        made = {"lr_hyper": rate, "episode_length": episode_length}
        if episode_length is not None:
            made |= {"lr_reptile": lr_reptile, "episode_init": episode_init}
        return made

    return kind
