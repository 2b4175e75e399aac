"""A headless Chromium, driven through the pipe of its DevTools protocol. Nothing but the standard library."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import queue
import shutil
import subprocess
import sys
import threading
import time

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
_SECONDS = 60.0
# The protocol speaks through file descriptors 3 and 4.
_START = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execv(sys.argv[3], sys.argv[3:])"
)
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--hide-scrollbars",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--remote-debugging-pipe",
)


class Browser:
    """One process; a context manager, so that it ends."""

    def __init__(self, folder):
        """Keep its profile in `folder`, new and empty."""
        self._folder = folder

    def __enter__(self):
        to_child, commands = _pipe()
        answers, from_child = _pipe()
        start = [sys.executable, "-S", "-E", "-c", _START, str(to_child), str(from_child), CHROMIUM, *_FLAGS]
        self._process = subprocess.Popen(
            [*start, f"--user-data-dir={self._folder}", "about:blank"],
            pass_fds=(to_child, from_child),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_child)
        os.close(from_child)
        self._commands = os.fdopen(commands, "wb", buffering=0)
        self._answers = os.fdopen(answers, "rb", buffering=0)
        self._messages = queue.SimpleQueue()
        self._last = 0
        self.events = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        return self

    def __exit__(self, *_):
        self._process.terminate()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join(timeout=20)
        self._commands.close()
        self._answers.close()

    def call(self, method, session=None, **parameters):
        """The result of a command; events that arrive meanwhile are kept."""
        self._last += 1
        message = {"id": self._last, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        self._commands.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = self._messages.get(timeout=_SECONDS)
            if answer.get("id") == self._last:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self.events.append(answer)

    def wait_for(self, method, session):
        """Until an event of this name has arrived for `session`."""
        end = time.monotonic() + _SECONDS
        while not any(event["method"] == method and event.get("sessionId") == session for event in self.events):
            self.events.append(self._messages.get(timeout=max(0.0, end - time.monotonic())))

    def _read(self):
        rest = b""
        while chunk := self._answers.read(1 << 16):
            *whole, rest = (rest + chunk).split(b"\0")
            for message in whole:
                self._messages.put(json.loads(message))


class Tab:
    """A page at a width, in a colour scheme and a medium."""

    def __init__(self, browser, path, width=1280, *, scheme="light", medium="screen", calm=False):
        """Open the file at `path`.

        Args:
            browser: Where.
            path: Of the file.
            width: Of the viewport, CSS pixels.
            scheme: 'light' or 'dark'.
            medium: 'screen' or 'print'.
            calm: Whether the reader prefers reduced motion.
        """
        self._browser = browser
        self._target = browser.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = browser.call("Target.attachToTarget", targetId=self._target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self.call(f"{domain}.enable")
        features = [
            {"name": "prefers-color-scheme", "value": scheme},
            {"name": "prefers-reduced-motion", "value": "reduce" if calm else "no-preference"},
        ]
        self.call("Emulation.setEmulatedMedia", media=medium, features=features)
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 500
        )
        self.call("Page.navigate", url=path.resolve().as_uri())
        browser.wait_for("Page.loadEventFired", self._session)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._browser.call("Target.closeTarget", targetId=self._target)

    def call(self, method, **parameters):
        """The result of a command to this page."""
        return self._browser.call(method, self._session, **parameters)

    def run(self, script):
        """The value of an expression, which must be plain data."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def events(self, method):
        """What has been reported of this page under a name."""
        self.call("Runtime.evaluate", expression="1")  # what was reported before it has arrived
        mine = (event for event in self._browser.events if event.get("sessionId") == self._session)
        return [event["params"] for event in mine if event["method"] == method]

    def requests(self):
        """Addresses that the page has asked for."""
        return [event["request"]["url"] for event in self.events("Network.requestWillBeSent")]

    def press_tab(self):
        """Move the focus on."""
        key = {"key": "Tab", "code": "Tab", "windowsVirtualKeyCode": 9}
        self.call("Input.dispatchKeyEvent", type="keyDown", **key)
        self.call("Input.dispatchKeyEvent", type="keyUp", **key)

    def screenshot(self):
        """The whole page as PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"])


def _pipe():
    """Both ends, above the numbers that the protocol uses."""
    ends = []
    for end in os.pipe():
        ends.append(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10))
        os.close(end)
    return ends
