"""Debian's Chromium without a window, driven by its DevTools protocol over a pair of pipes: pages as a person sees them."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

TIME_S = 60


def find() -> str | None:
    """The program; None where there is none."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class BrowserError(Exception):
    """The browser has ended, or refuses something."""


class Browser:
    """One page. What goes wrong in it is noted in ``errors``."""

    def __init__(self, program: str, folder: str) -> None:
        """``folder``: for its profile."""
        self._number = 0
        self._rest = b""
        self.errors: list[str] = []
        self.requests: list[str] = []
        """What it has asked for, the page itself left out."""
        to_it, self._out = os.pipe()
        self._in, from_it = os.pipe()
        # Its end of the protocol is to be at descriptors 3 and 4, whatever they are here.
        command = [
            *("bash", "-c", f'exec "$@" 3<&{to_it} 4>&{from_it}', "browser", program, "--headless=new", "--no-sandbox"),
            *(
                "--remote-debugging-pipe",
                f"--user-data-dir={folder}",
                "--disable-gpu",
                "--disable-dev-shm-usage",
                "--hide-scrollbars",
            ),
            *("--no-first-run", "--disable-extensions", "--disable-background-networking", "--disable-component-update"),
        ]
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, pass_fds=(to_it, from_it)
        )
        os.close(to_it)
        os.close(from_it)
        target = self._ask("Target.createTarget", {"url": "about:blank"}, session=None)["targetId"]
        attached = self._ask("Target.attachToTarget", {"targetId": target, "flatten": True}, session=None)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._ask(f"{domain}.enable", {})

    def close(self) -> None:
        """Ends it."""
        with contextlib.suppress(BrowserError, OSError):
            self._ask("Browser.close", {}, session=None)
        os.close(self._out)
        os.close(self._in)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _ask(self, method: str, parameters: dict[str, Any], session: str | None = "page") -> Any:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise BrowserError(f"{method}: {answer['error']}")
                return answer["result"]
            self._note(answer)

    def _next(self) -> Any:
        deadline = time.monotonic() + TIME_S
        while b"\0" not in self._rest:
            if not select.select([self._in], [], [], max(0, deadline - time.monotonic()))[0]:
                raise BrowserError(f"no answer within {TIME_S} s")
            data = os.read(self._in, 1 << 20)
            if not data:
                raise BrowserError("the browser has ended")
            self._rest += data
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def _note(self, event: Any) -> None:
        match event.get("method"):
            case "Runtime.exceptionThrown":
                details = event["params"]["exceptionDetails"]
                self.errors.append(details.get("exception", {}).get("description") or details["text"])
            case "Log.entryAdded" if event["params"]["entry"]["level"] == "error":
                self.errors.append(event["params"]["entry"]["text"])
            case "Runtime.consoleAPICalled" if event["params"]["type"] in ("error", "assert"):
                self.errors.append(str(event["params"]["args"]))
            case "Network.requestWillBeSent":
                url = event["params"]["request"]["url"]
                if event["params"]["type"] != "Document" and not url.startswith("data:"):
                    self.requests.append(url)

    # ---- a person ----

    def look(self, width: int, height: int, *, dark: bool = False, scale: float = 1) -> None:
        """Gives the window this size, and the person this taste."""
        mobile = width < 500
        size = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": mobile}
        self._ask("Emulation.setDeviceMetricsOverride", size)
        feature = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._ask("Emulation.setEmulatedMedia", {"features": [feature]})

    def open(self, page: Path) -> None:
        """Opens a file, and waits until its scripts have run."""
        self._ask("Page.navigate", {"url": page.absolute().as_uri()})
        deadline = time.monotonic() + TIME_S
        while self.value("document.readyState") != "complete" or not self.value("location.href").startswith("file:"):
            if time.monotonic() > deadline:
                raise BrowserError("the page does not come to its end")
            time.sleep(0.02)
        self.settle()

    def settle(self) -> None:
        """Waits until what was to be drawn is drawn."""
        self.value("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def value(self, script: str) -> Any:
        """What an expression of JavaScript comes to; of a promise what it brings."""
        result = self._ask("Runtime.evaluate", {"expression": script, "returnByValue": True, "awaitPromise": True})
        if "exceptionDetails" in result:
            raise BrowserError(f"{script}: {result['exceptionDetails']}")
        return result["result"].get("value")

    def press(self, *keys: str) -> None:
        """Presses keys, by their names or what they type."""
        codes = {"Tab": 9, "Enter": 13, " ": 32, "ArrowLeft": 37, "ArrowRight": 39, "ArrowDown": 40, "Home": 36}
        for key in keys:
            code = codes.get(key, ord(key[0].upper()))
            text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
            what = {"key": key, "windowsVirtualKeyCode": code}
            self._ask("Input.dispatchKeyEvent", {"type": "keyDown" if text else "rawKeyDown", "text": text, **what})
            self._ask("Input.dispatchKeyEvent", {"type": "keyUp", **what})

    def drag(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """Presses the mouse's button at a place of the window, moves, and releases it."""
        (x, y), (to_x, to_y) = start, end
        mouse = {"button": "left", "clickCount": 1}
        self._ask("Input.dispatchMouseEvent", {"type": "mousePressed", "x": x, "y": y, **mouse})
        self._ask("Input.dispatchMouseEvent", {"type": "mouseMoved", "x": to_x, "y": to_y, **mouse})
        self._ask("Input.dispatchMouseEvent", {"type": "mouseReleased", "x": to_x, "y": to_y, **mouse})

    def move(self, x: float, y: float) -> None:
        """Moves the mouse there."""
        self._ask("Input.dispatchMouseEvent", {"type": "mouseMoved", "x": x, "y": y})

    def picture(self, *, whole: bool = False) -> bytes:
        """What is in the window, or of the ``whole`` page, as PNG."""
        return base64.b64decode(self._ask("Page.captureScreenshot", {"format": "png", "captureBeyondViewport": whole})["data"])


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """A browser with an empty page. Skips the test where there is none."""
    program = find()
    if program is None:
        pytest.skip("no chromium here (Debian: apt install chromium)")
    with tempfile.TemporaryDirectory(prefix="vmexit-browser-", ignore_cleanup_errors=True) as folder:
        opened = Browser(program, folder)
        try:
            yield opened
        finally:
            opened.close()
