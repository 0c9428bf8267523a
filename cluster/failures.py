"""What can go wrong with a sweep beside its files, which `DamagedFile` names."""

from __future__ import annotations

import os
import traceback

LINES, FRAMES = 2, 2
"""Of a worker's exception: how much of its text and of its traceback an error repeats."""


class SweepError(RuntimeError):
    """The sweep cannot go on; what is saved stays, and a resumed sweep continues from it."""


class StorageFailed(OSError):  # noqa: N818
    """A checkpoint cannot be written: a full disk, say."""


class StateGone(RuntimeError):  # noqa: N818
    """Nobody holds a shard's state any more that is in no checkpoint: it is computed again."""


class Superseded(RuntimeError):  # noqa: N818
    """This worker's shard belongs to a later incarnation; what it computed is not used."""


class WorkerFailed(RuntimeError):  # noqa: N818
    """An exception of a worker's, in words that every process can read."""

    def __init__(self, summary: str, frames: tuple[str, ...] = ()) -> None:
        super().__init__(summary, frames)
        self.summary, self.frames = summary, frames

    @classmethod
    def of(cls, error: BaseException) -> WorkerFailed:
        """Return an exception in short: what it says, and the last places that it passed."""
        lines = [line for line in str(error).splitlines() if line.strip()]
        more = " …" if len(lines) > LINES else ""
        summary = "\n".join([f"{type(error).__name__}: {(lines or [''])[0]}", *lines[1:LINES]])
        passed = [f for f in traceback.extract_tb(error.__traceback__) if _is_of_interest(f)]
        frames = (
            f'  File "{f.filename}", line {f.lineno}, in {f.name}\n    {f.line}'
            for f in passed[-FRAMES:]
        )
        return cls(summary + more, tuple(frames))

    def __str__(self) -> str:
        return self.summary


def _is_of_interest(frame: traceback.FrameSummary) -> bool:
    others = ("<frozen", f"{os.sep}site-packages{os.sep}jax{os.sep}")
    return not any(part in frame.filename for part in others)
