"""A headless Chromium for tests, spoken to by its DevTools protocol over a pipe: no driver, no port, no network.

    with Browser() as browser:
        browser.open(path, width=390, height=844)
        browser.evaluate("document.title");  browser.problems();  browser.requests()

Where none of ``NAMES`` is installed, ``find()`` is None and the tests that need it say so.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, Self

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
#: Seconds that one answer may take on a busy machine.
PATIENCE = 60.0
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-extensions", "--disable-component-update", "--mute-audio",
    "--remote-debugging-pipe", "about:blank",
)  # fmt: skip


def find() -> str | None:
    """The browser's path."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One browser with one page."""

    def __init__(self) -> None:
        program = find()
        assert program is not None, f"none of {NAMES} is installed"
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self._events: list[dict[str, Any]] = []
        self._last, self._buffer = 0, b""
        commands, self._to = os.pipe()
        self._from, answers = os.pipe()
        # The browser reads descriptor 3 and writes descriptor 4; the shell puts ours there, whatever their numbers.
        shell = f'exec "$0" "$@" 3<&{commands} 4>&{answers}'
        self._process = subprocess.Popen(
            ["bash", "-c", shell, program, *_FLAGS[:-1], f"--user-data-dir={self._folder.name}", _FLAGS[-1]],
            pass_fds=(commands, answers),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(answers)
        (page,) = (t for t in self._call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self._session = self._call("Target.attachToTarget", targetId=page["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._to)
        os.close(self._from)
        self._folder.cleanup()

    def open(self, path: Path, *, width: int, height: int, dark: bool = False, media: str = "screen") -> None:
        """Show a file in a window of that size, in CSS pixels."""
        self._events.clear()
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media=media, features=[scheme])
        self.call("Page.navigate", url=path.as_uri())
        self._until(lambda: any(e["method"] == "Page.loadEventFired" for e in self._events))

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def problems(self) -> list[str]:
        """Console errors, warnings and exceptions since ``open``."""
        found = []
        for event in self._events:
            params = event["params"]
            if event["method"] == "Runtime.exceptionThrown":
                found.append(str(params["exceptionDetails"]))
            if event["method"] == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
                found.append(params["entry"]["text"])
            if event["method"] == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
                found.append(str(params["args"]))
        return found

    def requests(self) -> list[str]:
        """Addresses that were asked for since ``open``, but for the file itself and data in the page."""
        asked = [e["params"]["request"]["url"] for e in self._events if e["method"] == "Network.requestWillBeSent"]
        return [url for url in asked[1:] if not url.startswith("data:")]

    def screenshot(self, whole: bool = True) -> bytes:
        """PNG of the window, or of the whole page."""
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        return base64.b64decode(data)

    def pdf(self) -> bytes:
        """What printing gives."""
        return base64.b64decode(self.call("Page.printToPDF")["data"])

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """A command for the page."""
        return self._call(method, session=self._session, **params)

    def _call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        self._last += 1
        command = {"id": self._last, "method": method, "params": params}
        if session is not None:
            command["sessionId"] = session
        os.write(self._to, json.dumps(command).encode() + b"\0")
        answers: list[dict[str, Any]] = []
        self._until(lambda: bool(answers), answers, self._last)
        assert "error" not in answers[0], answers[0]
        result: dict[str, Any] = answers[0]["result"]
        return result

    def _until(self, done: Any, answers: list[dict[str, Any]] | None = None, id: int | None = None) -> None:
        stop = time.monotonic() + PATIENCE
        while not done():
            ready, _, _ = select.select([self._from], [], [], max(0.0, stop - time.monotonic()))
            assert ready, f"{find()} said nothing for {PATIENCE:g} seconds"
            chunk = os.read(self._from, 1 << 20)
            assert chunk, f"{find()} ended with {self._process.wait()}"
            *messages, self._buffer = (self._buffer + chunk).split(b"\0")
            for message in map(json.loads, messages):
                if "method" in message:
                    self._events.append(message)
                elif answers is not None and message.get("id") == id:
                    answers.append(message)
