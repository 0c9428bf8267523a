"""One worker in this very process: a sweep without any other."""

from __future__ import annotations

from typing import Any

from gradhpo.cluster.commands import Answered, Event, Failed
from gradhpo.cluster.orders import Spec
from gradhpo.cluster.worker import Worker


class ThisProcess:
    """Does at once what it is sent; errors stay the exceptions that they are. See `Processes`."""

    def __init__(self, spec: Spec, data: Any) -> None:
        self._spec, self._data, self._worker = spec, data, Worker()
        self._news: list[Event] = []

    def start(self, worker: int, call: int) -> None:
        """Make the host of all shards."""
        self.send(worker, call, "start", (self._spec, self._data, None))

    def send(self, worker: int, call: int, what: str, arguments: tuple[Any, ...]) -> None:
        """Do it now."""
        try:
            value = getattr(self._worker, what)(*arguments)
        except Exception as error:
            self._news.append(Failed(worker, call, 0, error))
            return
        self._news.append(Answered(worker, call, 0, value, self._worker.compiles()))

    def poll(self, timeout: float) -> list[Event]:
        """Return what was done; nothing happens while nothing is sent."""
        del timeout
        news, self._news = self._news, []
        return news

    def kill(self, worker: int) -> None:
        """Never needed: whoever asks is alive."""

    def share(self, value: Any) -> Any:
        """Return the value itself."""
        return value

    def room(self) -> int | None:
        """Return that it is there."""
        return 1

    def shortage(self) -> str:
        """Say what cannot be."""
        return "it runs in this process"

    def close(self) -> None:
        """Finish what is being written, and forget the arrays."""
        self._worker.close()
        self._worker = Worker()
