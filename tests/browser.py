"""A headless Chromium for tests, spoken to by its DevTools protocol over two pipes, so that no driver is needed."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "chrome")
PATIENCE = 60.0
# The protocol wants its pipes as descriptors 3 and 4, whatever these are by now.
_LAUNCH = """
import fcntl, os, sys
pipes = [fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3]]
for number, pipe in zip((3, 4), pipes):
    os.dup2(pipe, number)
os.execvp(sys.argv[3], sys.argv[3:])
"""


def program() -> str | None:
    """Chromium's path, or $DDVI_CHROMIUM's; None where there is none."""
    return os.environ.get("DDVI_CHROMIUM") or next(filter(None, map(shutil.which, PROGRAMS)), None)


class Page:
    """One tab, with everything that went wrong in it."""

    def __init__(self, requests: int, answers: int) -> None:
        self._requests, self._answers = requests, answers
        self._buffer = b""
        self._number = 0
        self._session: str | None = None
        self.errors: list[str] = []
        self.addresses: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and return its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._requests, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def _read(self) -> dict[str, Any]:
        """The next message; what it tells of errors and addresses is kept."""
        deadline = time.monotonic() + PATIENCE
        while b"\0" not in self._buffer:
            if not select.select([self._answers], [], [], max(0, deadline - time.monotonic()))[0]:
                raise TimeoutError("the browser doesn't answer")
            read = os.read(self._answers, 1 << 20)
            if not read:
                raise RuntimeError("the browser has ended")
            self._buffer += read
        text, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(text)
        told = message.get("params", {})
        match message.get("method"):
            case "Runtime.exceptionThrown":
                details = told["exceptionDetails"]
                self.errors.append(details.get("exception", {}).get("description") or details["text"])
            case "Runtime.consoleAPICalled" if told["type"] in ("error", "warning", "assert"):
                self.errors.append(" ".join(str(part.get("value", part)) for part in told["args"]))
            case "Log.entryAdded" if told["entry"]["level"] in ("error", "warning"):
                self.errors.append(told["entry"]["text"])
            case "Network.requestWillBeSent":
                self.addresses.append(told["request"]["url"])
        return message

    def evaluate(self, expression: str) -> Any:
        """A JavaScript expression's value, awaited."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"].get("exception", {}).get("description", "failed"))
        return answer["result"].get("value")

    def wait(self, expression: str) -> None:
        """Until an expression holds."""
        deadline = time.monotonic() + PATIENCE
        while not self.evaluate(expression):
            if time.monotonic() > deadline:
                raise TimeoutError(f"never came true: {expression}; errors: {self.errors}")
            time.sleep(0.05)

    def open(
        self,
        path: Path,
        width: int = 1280,
        height: int = 900,
        scheme: str = "light",
        touch: bool = False,
        ready: str = "document.documentElement.dataset.ready === 'true'",
    ) -> None:
        """Open a file at a window's size and in a colour scheme, and wait until it says that it is ready."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=touch)
        self.call("Emulation.setTouchEmulationEnabled", enabled=touch)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=features)
        self.call("Page.navigate", url=path.absolute().as_uri())
        self.wait(f"document.readyState === 'complete' && {ready}")

    def key(self, name: str, times: int = 1) -> None:
        """Press a key, such as Tab, ArrowRight or Enter."""
        codes = {"Tab": 9, "Enter": 13, "Escape": 27, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}
        for _ in range(times):
            press = {"key": name, "code": name, "windowsVirtualKeyCode": codes[name]}
            text = {"text": "\r"} if name == "Enter" else {}
            self.call("Input.dispatchKeyEvent", type="keyDown", **press, **text)
            self.call("Input.dispatchKeyEvent", type="keyUp", **press)

    def mouse(self, kind: str, x: float, y: float, pressed: bool = False) -> None:
        """mouseMoved, mousePressed or mouseReleased, in the window's coordinates."""
        button = "left" if pressed or kind != "mouseMoved" else "none"
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button=button, buttons=int(pressed), clickCount=1)

    def picture(self, path: Path, whole: bool = False) -> Path:
        """Write what the window shows, or the whole page, as PNG."""
        content = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(content["data"]))
        return path


@contextlib.contextmanager
def browser() -> Iterator[Page]:
    """A page of a Chromium of its own, without a network."""
    to_read, requests = os.pipe()
    answers, to_write = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        words = [
            program() or "chromium",
            "--headless=new",
            "--remote-debugging-pipe",
            f"--user-data-dir={profile}",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--disable-background-networking",
            "--host-resolver-rules=MAP * ~NOTFOUND",
            "about:blank",
        ]
        launch = [sys.executable, "-c", _LAUNCH, str(to_read), str(to_write), *words]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(launch, pass_fds=(to_read, to_write), **quiet)
        os.close(to_read)
        os.close(to_write)
        try:
            yield Page(requests, answers)
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            os.close(requests)
            os.close(answers)
