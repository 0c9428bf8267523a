"""A folder that one process at a time may write to."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from pathlib import Path

LOCK, ALIVE = "driver.lock", "driver.alive"


class StorageInUse(RuntimeError):  # noqa: N818
    """Another process holds the folder."""


def in_use(argument: str, address: str, user: str, holder: str) -> StorageInUse:
    """Return the error that says who holds what an argument named, and what to do."""
    return StorageInUse(
        f"{argument} {address!r} is in use by another {user}: {holder}. Wait for it, "
        f"stop it, or give another {argument}"
    )


class FolderLock:
    """Held by the one process that may write to a folder, until that process ends, however.

    It is a lock of the operating system (`flock`) on a file, which says who holds it. A forked
    child shares such a lock, and would hold it on when its parent is killed: it therefore closes
    its copy at once. (`lockf`, which is not inherited, would be lost as soon as anything else in
    the process opens and closes the file; a lock that is taken over from a process that seems dead
    can be taken by two.)

    Args:
      folder: what is held; it exists.
      name: the argument that gave the folder, for messages.
      user: what writes to it: "sweep", "run".

    Raises:
      StorageInUse: if another process holds it, with its host and number.
      OSError: if the file system has no locks, or cannot be written; it is then not held.
    """

    took_over: str | None = None
    """Nobody: such a lock ends with its holder."""

    def __init__(self, folder: Path, name: str, user: str) -> None:
        self._descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            self._lock()
            self._say_who()
        except BlockingIOError:
            text = os.read(self._descriptor, 4096).decode(errors="replace")
            os.close(self._descriptor)
            raise in_use(name, str(folder), user, holder_of(text)) from None
        except _NotWritten as error:
            self.release()
            raise OSError(
                error.errno, f"{name} {str(folder)!r} cannot be written: {error.strerror}"
            ) from None
        except OSError as error:
            os.close(self._descriptor)
            raise type(error)(
                error.errno,
                f"{name} {str(folder)!r} is on a file system without locks (flock), which keep a "
                f"second {user} away: {error.strerror}",
            ) from None
        _HELD.add(self)

    def _lock(self, tries: int = 3) -> None:
        import fcntl  # Windows has none

        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if tries == 1:
                raise
            time.sleep(0.1)  # `holder` may be looking
            self._lock(tries - 1)

    def _say_who(self) -> None:
        about = {"host": socket.gethostname(), "pid": os.getpid(), "since": int(time.time())}
        try:
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, json.dumps(about).encode(), 0)
        except OSError as error:  # a full disk
            raise _NotWritten(error.errno, error.strerror) from None

    def release(self) -> None:
        """Let another process have the folder; twice is once."""
        _HELD.discard(self)
        with contextlib.suppress(OSError):
            os.ftruncate(self._descriptor, 0)
        self.forget()

    def forget(self) -> None:
        """Close this process's copy; another process that shares the lock still holds it."""
        descriptor, self._descriptor = self._descriptor, -1
        with contextlib.suppress(OSError):
            os.close(descriptor)


class _NotWritten(OSError):  # noqa: N818
    """The lock is held, and its file cannot say by whom."""


_HELD: set[FolderLock] = set()


def _forget_all() -> None:
    for lock in list(_HELD):
        lock.forget()
    _HELD.clear()


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_forget_all)


def holder(folder: Path) -> str | None:
    """Return who holds a folder, as text; None where nobody does."""
    import fcntl

    path = folder / LOCK
    if not path.exists():
        return None
    with open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return holder_of(file.read().decode(errors="replace"))
    return None


def holder_of(text: str) -> str:
    """Return the lock file's text as a person reads it."""
    try:
        about = json.loads(text)
        return f"process {about['pid']} on host {about['host']}"
    except (ValueError, KeyError, TypeError):
        return "a process that did not leave its name"
