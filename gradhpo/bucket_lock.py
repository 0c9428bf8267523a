"""The lock of an object store: a series of which the last one that was created holds.

"driver.lock/000003" says who made it; whoever wants it creates the next one, of which the store
grants one. Its holder puts a sign of life every few seconds, "driver.alive/000003", and says there
that it has let go. It is taken over where it has let go, at once; where it is a dead process of
this machine, at once; otherwise if it gives no sign of life for `PATIENCE` seconds of looking on,
so that no two clocks are compared. Should it live after all, it can change nothing any more: see
`Bucket`.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradhpo.lock import ALIVE, LOCK, StorageInUse, holder_of, in_use

if TYPE_CHECKING:
    from gradhpo.bucket import Bucket

BEAT = 5.0
"""Seconds between two signs of life."""
PATIENCE = 60.0
"""Seconds without one after which a lock is taken over."""
RELEASED = b'{"released": true}'


class BucketLock:
    """Held by the one process that may write below an address, see the module.

    Args:
      bucket: what is held.
      argument: the one that gave the address, for messages.
      user: what writes: "sweep", "run".
      tell: is told why this waits; without it, nothing is waited for.

    Raises:
      StorageInUse: if another process holds it.
    """

    def __init__(
        self, bucket: Bucket, argument: str, user: str, tell: Callable[[str], None] | None
    ) -> None:
        self.argument, self.user, self._bucket, self._tell = argument, user, bucket, tell
        self.took_over: str | None = None
        self._token = uuid.uuid4().hex
        about = json.dumps({**_this_process(), "token": self._token}).encode()
        while True:
            self.number = bucket.last(LOCK) + 1
            self._wait_for(self.number - 1)
            if bucket.create(LOCK, self.number, about):
                break
        self._end = threading.Event()
        self._beats = 0
        self._beat()
        _HELD.add(self._token)
        self._thread = threading.Thread(target=self._live, name="gradhpo lock", daemon=True)
        self._thread.start()

    def lost(self) -> bool:
        """Whether another process has taken it over."""
        return bool(self._bucket.get(LOCK, self.number + 1))

    def release(self) -> None:
        """Say that it is let go; twice is once."""
        if self._token not in _HELD:
            return
        _HELD.discard(self._token)
        self._end.set()
        self._thread.join()
        self._bucket.forget(self)
        with contextlib.suppress(OSError):  # the next one waits, then
            self._bucket.put(ALIVE, self.number, RELEASED)

    def _live(self) -> None:
        while not self._end.wait(BEAT):
            with contextlib.suppress(OSError):  # the next one may come through
                if self.lost():
                    return
                self._beat()

    def _beat(self) -> None:
        self._beats += 1
        sign = {"beat": self._beats, "time": round(time.time(), 3)}
        self._bucket.put(ALIVE, self.number, json.dumps(sign).encode())

    def _wait_for(self, number: int) -> None:
        """Return when the lock of this number is nobody's any more."""
        about = _parsed(self._bucket.get(LOCK, number))
        seen, told = self._bucket.get(ALIVE, number), False
        since = time.monotonic()
        if number == 0 or seen == RELEASED:
            return
        if _is_mine(about) or (self._tell is None and not _is_dead(about)):
            raise self._in_use(about)
        while not _is_dead(about):
            waited = time.monotonic() - since
            if waited > PATIENCE:
                break
            if waited > 1.2 * BEAT and self._tell and not told:
                told = True
                self._tell(
                    f"{self.argument} {self._bucket.address!r} is held by {_named(about)}, of "
                    f"which nothing was heard for {waited:.0f} s: waiting, and taking it over if "
                    f"that stays so for {PATIENCE:.0f} s"
                )
            time.sleep(BEAT / 5)
            now = self._bucket.get(ALIVE, number)
            if now == RELEASED:
                return
            if now != seen:
                raise self._in_use(about)
        self.took_over = _named(about)

    def _in_use(self, about: dict[str, Any]) -> StorageInUse:
        return in_use(self.argument, self._bucket.address, self.user, _named(about))


_HELD: set[str] = set()
"""The tokens of the locks that this process has."""


def taken_over(bucket: Bucket, held: BucketLock) -> StorageInUse:
    """Return the error of a process whose lock another one has."""
    about = _parsed(bucket.get(LOCK, bucket.last(LOCK)))
    return StorageInUse(
        f"{held.argument} {bucket.address!r} was taken over from this {held.user}, of which "
        f"nothing was heard for {PATIENCE:.0f} s, by another: {_named(about)}. This one ends, and "
        "changes nothing more"
    )


def holder_of_lock(bucket: Bucket) -> str | None:
    """Return who has the lock, and when it was heard of, as text; None where nobody has it."""
    number = bucket.last(LOCK)
    about = _parsed(bucket.get(LOCK, number))
    sign = bucket.get(ALIVE, number)
    if number == 0 or sign == RELEASED or (_is_dead(about) and not _is_mine(about)):
        return None
    return _named(about) + _heard(_parsed(sign).get("time"))


def _heard(seen: Any) -> str:
    """Return when the last sign of life was, by its machine's clock: for people alone."""
    if not isinstance(seen, int | float):
        return ""
    ago = time.time() - seen
    return f", not heard of for {ago:.0f} s" if ago > PATIENCE else f", heard of {ago:.0f} s ago"


def _parsed(content: bytes) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        if isinstance(made := json.loads(content), dict):
            return made
    return {}


def _named(about: dict[str, Any]) -> str:
    return holder_of(json.dumps(about))


def _this_process() -> dict[str, Any]:
    about = {"host": socket.gethostname(), "pid": os.getpid(), "since": int(time.time())}
    return {**about, "machine": _machine(), "started": _started(os.getpid())}


def _is_mine(about: dict[str, Any]) -> bool:
    return about.get("token") in _HELD


def _is_dead(about: dict[str, Any]) -> bool:
    """Whether it surely is: a process of this machine that is not there, or let go unheard."""
    machine = _machine()
    if machine is None or about.get("machine") != machine:
        return False
    if about["pid"] == os.getpid() and about["started"] == _started(os.getpid()):
        return not _is_mine(about)
    return _started(about["pid"]) != about["started"]


def _machine() -> str | None:
    """Return what tells this start of this machine, and this container in it; None if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _started(pid: int) -> str | None:
    """Return when a living process of this machine started, in the kernel's ticks."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]
