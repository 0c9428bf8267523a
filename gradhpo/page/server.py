"""A server for one page and its data: on this machine's loopback only, and only to be read."""

from __future__ import annotations

import functools
import json
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

LOOPBACK = "127.0.0.1"
MOST_PORT = 65535
NAMES = (LOOPBACK, "localhost")
"""As which a browser may have asked; another one's name that resolves to here is refused."""
HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
}

Since = Callable[[int, int], Any]
"""Returns what there is to show, plain, after so many generations of an epoch that is known."""


class PageServer:
    """Serves a page at "/", and at "/data" what is new; a context that ends with it.

    Args:
      page: the HTML.
      since: asked for the data, by one thread at a time.
      port: 0 for a free one.

    Raises:
      ValueError: if no port has such a number.
      OSError: if the port cannot be had.
    """

    def __init__(self, page: str, since: Since, port: int = 0) -> None:
        if not 0 <= port <= MOST_PORT:
            raise ValueError(f"port must be from 0 (a free one) to {MOST_PORT}, got {port}")
        try:
            self._server = _Server((LOOPBACK, port), _handler(page.encode(), since))
        except OSError as error:
            said = f"port {port} of {LOOPBACK} cannot be had: {error.strerror}; 0 is a free one"
            told = OSError(said)  # with the number beside the text, and not before it
            told.errno = error.errno
            raise told from None

    @property
    def port(self) -> int:
        """Where it listens."""
        return self._server.server_port

    @property
    def address(self) -> str:
        """What a person opens."""
        return f"http://{LOOPBACK}:{self.port}/"

    def __enter__(self) -> PageServer:
        serve = functools.partial(self._server.serve_forever, poll_interval=0.1)
        self._thread = threading.Thread(target=serve, name="gradhpo-page", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a browser that went away before it had its answer."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


def _handler(page: bytes, since: Since) -> type[BaseHTTPRequestHandler]:
    asking = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        server_version, sys_version = "gradhpo", ""

        def do_GET(self) -> None:
            host, port = self.headers.get("Host", ""), self.server.server_port  # pyright: ignore
            if host not in [f"{name}:{port}" for name in NAMES]:
                self._answer(403, b"asked by another name\n", "text/plain")
                return
            try:
                asked = urlsplit(self.path)
            except ValueError as error:
                self._answer(400, f"{error}\n".encode(), "text/plain")
                return
            if asked.path == "/":
                self._answer(200, page, "text/html; charset=utf-8")
            elif asked.path == "/data":
                self._data(parse_qs(asked.query))
            else:
                self._answer(404, b"there is / and /data\n", "text/plain")

        def _data(self, query: dict[str, list[str]]) -> None:
            try:
                after, epoch = (int(query.get(n, ["0"])[0]) for n in ("after", "epoch"))
            except ValueError:
                self._answer(400, b"after and epoch are whole numbers\n", "text/plain")
                return
            try:
                with asking:
                    made = since(after, epoch)
            except Exception as error:  # the page says so, and asks again
                made = {"error": f"{type(error).__name__}: {error}"}
            text = json.dumps(made, separators=(",", ":"), allow_nan=False).encode()
            self._answer(200, text, "application/json")

        def _answer(self, status: int, content: bytes, kind: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Type": kind, **HEADERS}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            del format, args

    return Handler
