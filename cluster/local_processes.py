"""Workers that are plain processes of this machine, each at the other end of a socket.

Whatever blocks (sending to a process that is stopped, receiving half of an answer) is done by two
threads for each worker, so that one that hangs costs itself alone. A worker dies with its driver.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any

from gradhpo.cluster import importing
from gradhpo.cluster.commands import Event, Gone, Heard
from gradhpo.cluster.orders import Spec
from gradhpo.cluster.processes import ProcessSettings, event_of, log_file
from gradhpo.cluster.worker import Answer, Worker, environment, readable

BOOT = """
import json, sys
about = json.loads(sys.argv[1])
sys.path[:] = about.pop("path")
from gradhpo.cluster.local_processes import serve
serve(**about)
"""
BEAT = 0
"""In the place of a call's number: a sign of life."""


def check_settings(settings: ProcessSettings) -> None:
    """Raise for what only Ray can give a worker.

    Raises:
      ValueError: naming it.
    """
    for name, given in (
        ("resources", {k: v for k, v in settings.resources.items() if k != "num_cpus"}),
        ("runtime_env", settings.runtime_env),
        ("address", settings.address),
    ):
        if given:
            only = " other than num_cpus" if name == "resources" else ""
            raise ValueError(f'{name}{only} is for Ray, not executor="processes"; got {given!r}')


def check_sendable(given: Mapping[str, Any]) -> None:
    """Raise unless other processes can make these objects again.

    Raises:
      TypeError: naming the first that they cannot.
    """
    for name, thing in given.items():
        try:
            text = pickle.dumps(thing)
            reason = "it belongs to the program itself" if b"__main__" in text else None
        except Exception as error:
            reason = str(error)
        if reason is not None:
            raise TypeError(
                f'{name}: executor="processes" sends it to other processes, and {thing!r:.80} '
                f"cannot be sent ({reason:.200}); give a reference, {importing.ACCEPTED}"
            )


class LocalProcesses:
    """Workers of one process each; see `Processes`."""

    def __init__(self, spec: Spec, data: Any, settings: ProcessSettings) -> None:
        self._spec, self._data, self._settings = spec, data, settings
        own = environment(settings.resources, settings.env)
        self._env = {**os.environ, "PYTHONUNBUFFERED": "1", **own}
        self._processes: dict[int, _Process] = {}
        self._news: queue.SimpleQueue[Event | None] = queue.SimpleQueue()

    def start(self, worker: int, call: int) -> None:
        """Start a process, and send it the sweep and the data."""
        beat = min(1.0, self._settings.heartbeat / 8)
        with _opened(log_file(self._spec.storage, worker)) as output:
            self._processes[worker] = _Process(worker, self._env, output, beat, self._news)
        self.send(worker, call, "start", (self._spec, self._data, None))

    def send(self, worker: int, call: int, what: str, arguments: tuple[Any, ...]) -> None:
        """Call a worker; what it exports comes here, and goes on from here."""
        self._processes[worker].tell(pickle.dumps((call, what, pickle.dumps(arguments))))

    def poll(self, timeout: float) -> list[Event]:
        """Return answers, signs of life, and who is dead."""
        news: list[Event] = []
        with contextlib.suppress(queue.Empty):
            first = self._news.get(timeout=timeout)
            news += [] if first is None else [first]
        gone = [(n, p) for n, p in self._processes.items() if p.status() is not None]
        for _, process in gone:
            process.join()  # what it said before it died counts
        with contextlib.suppress(queue.Empty):
            while True:
                news += [event for event in [self._news.get_nowait()] if event is not None]
        for number, process in gone:
            news.append(Gone(number, f"died ({process.status()})"))
        heard = [Heard(number) for number, process in self._processes.items() if process.heard()]
        return [*heard, *news]

    def kill(self, worker: int) -> None:
        """End a process, and those that it started."""
        self._processes.pop(worker).end()

    def share(self, value: Any) -> Any:
        """Return the value itself: it is sent to each worker."""
        return value

    def room(self) -> int | None:
        """Return that a machine holds as many as are asked for."""
        return None

    def shortage(self) -> str:
        """Say what keeps processes from starting."""
        return "a process of this machine needs longer than that to import JAX and the problem"

    def close(self) -> None:
        """End all processes."""
        for worker in list(self._processes):
            self.kill(worker)


class _Process:
    """The driver's side of one worker."""

    def __init__(
        self,
        worker: int,
        env: Mapping[str, str],
        output: IO[bytes],
        beat: float,
        news: queue.SimpleQueue[Event | None],
    ) -> None:
        self._worker, self._news, self._heard = worker, news, False
        ours, theirs = socket.socketpair()
        about = {"path": sys.path, "descriptor": theirs.fileno(), "beat": beat}
        with theirs:
            self._popen = subprocess.Popen(
                [sys.executable, "-c", BOOT, json.dumps({**about, "parent": os.getpid()})],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=dict(env),
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is for the driver
            )
        self._connection = Connection(ours.detach())
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=work, name=f"gradhpo worker {worker}", daemon=True)
            for work in (self._receive, self._deliver)
        ]
        for thread in self._threads:
            thread.start()

    def tell(self, message: bytes) -> None:
        """Send a message, some time."""
        self._outbox.put(message)

    def heard(self) -> bool:
        """Whether it gave a sign of life since this was last asked."""
        heard, self._heard = self._heard, False
        return heard

    def status(self) -> str | None:
        """Return how the process ended; None while it has not."""
        code = self._popen.poll()
        if code is None or code >= 0:
            return None if code is None else f"it ended with status {code}"
        try:
            return signal.Signals(-code).name
        except ValueError:
            return f"signal {-code}"

    def join(self) -> None:
        """Wait until all that a dead process has said is read."""
        self._threads[0].join(timeout=1)

    def end(self) -> None:
        """Kill the process and those that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._popen.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # it is in the kernel's hands
            self._popen.wait(timeout=5)
        self._outbox.put(None)
        for thread in self._threads:
            thread.join(timeout=1)
        if not any(thread.is_alive() for thread in self._threads):
            self._connection.close()

    def _receive(self) -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                self._take(self._connection.recv_bytes())
        self._news.put(None)  # let the driver look who died

    def _take(self, message: bytes) -> None:
        call, content = pickle.loads(message)
        self._heard = True
        if call == BEAT:
            return
        try:
            answer: Answer = pickle.loads(content)
        except Exception as error:
            answer = Answer(None, readable(error))
        self._news.put(event_of(self._worker, call, 0, answer))

    def _deliver(self) -> None:
        with contextlib.suppress(OSError):
            while (message := self._outbox.get()) is not None:
                self._connection.send_bytes(message)


def _opened(log: Path) -> IO[bytes]:
    """Open a log to add to it; where that cannot be, what is printed is lost, and nothing else."""
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        return open(log, "ab")
    except OSError:
        return open(os.devnull, "ab")


# --- in the worker's process --------------------------------------------------------------------


def serve(descriptor: int, beat: float, parent: int) -> None:
    """Do what the driver sends, one thing after another, for as long as it lives."""
    _die_with(parent)
    connection, lock = Connection(descriptor), threading.Lock()

    def say(call: int, content: bytes) -> None:
        try:
            with lock:
                connection.send_bytes(pickle.dumps((call, content)))
        except OSError:
            os._exit(1)  # nobody listens any more

    def beat_on() -> None:
        while True:
            say(BEAT, b"")
            time.sleep(beat)

    threading.Thread(target=beat_on, daemon=True).start()
    worker = Worker()
    while True:
        try:
            message = connection.recv_bytes()
        except (EOFError, OSError):
            os._exit(1)
        call, what, arguments = pickle.loads(message)
        say(call, _answered(worker, what, arguments))


def _answered(worker: Worker, what: str, arguments: bytes) -> bytes:
    """Return a call's answer as bytes, also where they cannot be read, or it cannot be sent."""
    try:
        return pickle.dumps(worker.do(what, *pickle.loads(arguments)))
    except Exception as error:
        return pickle.dumps(Answer(None, readable(error)))


def _die_with(parent: int) -> None:
    """Let the kernel end this process when its driver ends, however that happens."""
    if sys.platform == "linux":
        import ctypes

        set_death_signal = 1
        ctypes.CDLL(None).prctl(set_death_signal, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:  # it ended before
        os._exit(1)
