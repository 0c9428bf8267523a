"""Headless Chromium, driven by its DevTools protocol over two pipes: no driver, no port."""

import base64
import contextlib
import itertools
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time

BROWSERS = ("chromium", "chromium-headless-shell", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
ALONE = ("gpu", "quic", "background-networking", "component-update", "sync", "extensions")
SECONDS = 60
START = """
import fcntl, os, sys
away = [fcntl.fcntl(int(one), fcntl.F_DUPFD, 10) for one in sys.argv[1:3]]
for number, one in zip((3, 4), away):
    os.dup2(one, number)
os.execv(sys.argv[3], sys.argv[3:])
"""
"""Chromium reads commands from 3, and writes answers to 4."""


class Page:
    """One page of a browser, as the protocol sees it; `requests` has what it asked for."""

    def __init__(self, read, write):
        self._read, self._write, self._left = read, write, b""
        self._numbers, self.session = itertools.count(1), None
        self.requests, self.errors = [], []

    def call(self, method, **params):
        """Send a command, and return what it gives; events that come before are taken in."""
        number = next(self._numbers)
        about = {"id": number, "method": method, "params": params}
        about |= {"sessionId": self.session} if self.session else {}
        os.write(self._write, json.dumps(about).encode() + b"\0")
        end = time.monotonic() + SECONDS
        while (found := self._next(end)).get("id") != number:
            self._heard(found)
        assert "error" not in found, (method, found)
        return found["result"]

    def _heard(self, event):
        match event.get("method"):
            case "Network.requestWillBeSent":
                self.requests.append(event["params"]["request"]["url"])
            case "Runtime.exceptionThrown":
                details = event["params"]["exceptionDetails"]
                self.errors.append(details.get("exception", {}).get("description") or str(details))
            case "Log.entryAdded" if event["params"]["entry"]["level"] == "error":
                self.errors.append(event["params"]["entry"]["text"])

    def _next(self, end):
        while b"\0" not in self._left:
            ready, _, _ = select.select([self._read], [], [], max(0, end - time.monotonic()))
            assert ready, "the browser does not answer"
            part = os.read(self._read, 1 << 20)
            assert part, "the browser has ended"
            self._left += part
        text, _, self._left = self._left.partition(b"\0")
        return json.loads(text)

    def open(self, url, *, width=1280, height=900, dark=False):
        """Open a page at a size; return the seconds until its script has drawn it."""
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)
        about = {"deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, **about)
        began = time.monotonic()
        self.call("Page.navigate", url=url)
        self.until("document.documentElement?.dataset.ready === 'yes'")
        return time.monotonic() - began

    def value(self, expression):
        """Return what JavaScript gives, as JSON."""
        about = {"returnByValue": True, "awaitPromise": True}
        found = self.call("Runtime.evaluate", expression=expression, **about)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, expression):
        """Wait until it holds."""
        end = time.monotonic() + SECONDS
        while not self.value(f"!!({expression})"):
            assert time.monotonic() < end, f"{expression} does not come true; {self.errors}"
            time.sleep(0.02)

    def click(self, selector):
        """Press the mouse in the middle of an element, and let it go."""
        quoted = json.dumps(selector)
        where = f"document.querySelector({quoted})"
        self.value(f"{where}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
        middle = "({x, y, width, height}) => [x + width / 2, y + height / 2]"
        box = self.value(f"({middle})({where}.getBoundingClientRect())")
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self.mouse(kind, *box)

    def mouse(self, kind, x, y):
        """Let the mouse do something."""
        about = {"type": kind, "x": x, "y": y, "button": "left", "clickCount": 1}
        self.call("Input.dispatchMouseEvent", **about, buttons=int(kind != "mouseReleased"))

    def picture(self, path):
        """Write all of the page as a PNG."""
        found = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(found["data"]))


@contextlib.contextmanager
def browser():
    """Start one with a new profile, and give its page."""
    (theirs, write), (read, back) = os.pipe(), os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        arguments = ["--headless", "--no-sandbox", "--no-first-run", "--remote-debugging-pipe"]
        arguments += [f"--user-data-dir={folder}", *(f"--disable-{what}" for what in ALONE)]
        start = [sys.executable, "-ISc", START, str(theirs), str(back), BROWSER]
        process = subprocess.Popen(
            [*start, *arguments, "about:blank"], pass_fds=(theirs, back),
            stderr=subprocess.DEVNULL, env={**os.environ, "HOME": folder},
        )  # fmt: skip
        os.close(theirs)
        os.close(back)
        try:
            page = Page(read, write)
            target = page.call("Target.createTarget", url="about:blank")["targetId"]
            attached = page.call("Target.attachToTarget", targetId=target, flatten=True)
            page.session = attached["sessionId"]
            for domain in ("Page", "Network", "Runtime", "Log"):
                page.call(f"{domain}.enable")
            yield page
        finally:
            process.kill()
            process.wait()
            os.close(read)
            os.close(write)
