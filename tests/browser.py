"""A page in a headless Chromium, driven by its DevTools protocol through a pipe: no package is needed.

https://chromedevtools.github.io/devtools-protocol/
"""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --remote-debugging-pipe"
).split()
_PATIENCE = 60.0  # seconds for an answer


class Page:
    """errors: of scripts, of the console, failed requests and dialogs. requests: addresses."""

    def __init__(self, profile: Path) -> None:
        self.errors: list[str] = []
        self.requests: list[str] = []
        self._loaded, self._count, self._session, self._rest = False, 0, "", b""
        reads, self._to = os.pipe()
        self._from, writes = os.pipe()
        words = [str(CHROMIUM), *_FLAGS, f"--user-data-dir={profile}"]
        shell = ["bash", "-c", f'exec "$@" 3<&{reads} 4>&{writes}', "bash", *words]  # where Chromium has its pipe
        quiet = subprocess.DEVNULL
        self._process = subprocess.Popen(shell, pass_fds=(reads, writes), stdout=quiet, stderr=quiet)
        os.close(reads)
        os.close(writes)
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._to)
        os.close(self._from)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        number = self._send(method, params)
        while True:
            message = self._read()
            if message.get("id") == number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                return dict(message["result"])

    def open(self, file: Path, width: int = 1280, height: int = 900) -> str:
        """Returns: its address."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self._loaded = False
        self.call("Page.navigate", url=file.as_uri())
        while not self._loaded:
            self._read()
        return file.as_uri()

    def value(self, script: str) -> Any:
        """What a JavaScript expression gives, as JSON has it."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{script}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def until(self, script: str, holds: Callable[[Any], bool] = bool) -> Any:
        """The expression's value once it holds."""
        end = time.monotonic() + _PATIENCE
        while not holds(found := self.value(script)):
            if time.monotonic() > end:
                raise TimeoutError(f"{script}: still {found!r}")
            time.sleep(0.05)
        return found

    def mouse(self, *points: tuple[float, float], pressed: bool = False) -> None:
        """Move over points; pressed: from the first to the last, one point is a click."""
        steps = [("mouseMoved", point) for point in points]
        if pressed:
            steps = [steps[0], ("mousePressed", points[0]), *steps[1:], ("mouseReleased", points[-1])]
        held = False
        for kind, (x, y) in steps:
            held = kind == "mousePressed" or (held and kind == "mouseMoved")
            button = {"button": "left", "clickCount": 1} if held or kind != "mouseMoved" else {}
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, buttons=int(held), **button)

    def _send(self, method: str, params: dict[str, Any]) -> int:
        self._count += 1
        session = {"sessionId": self._session} if self._session else {}
        said = json.dumps({"id": self._count, "method": method, "params": params, **session}).encode() + b"\0"
        while said:
            said = said[os.write(self._to, said) :]
        return self._count

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            if not select.select([self._from], [], [], _PATIENCE)[0]:
                raise TimeoutError("no answer of Chromium")
            part = os.read(self._from, 1 << 20)
            if not part:
                raise RuntimeError("Chromium has ended")
            self._rest += part
        line, _, self._rest = self._rest.partition(b"\0")
        message = json.loads(line)
        self._note(message.get("method", ""), message.get("params", {}))
        return dict(message)

    def _note(self, method: str, params: dict[str, Any]) -> None:
        if method == "Page.loadEventFired":
            self._loaded = True
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Page.javascriptDialogOpening":
            self.errors.append(f"dialog: {params['message']}")
            self._send("Page.handleJavaScriptDialog", {"accept": True})
        elif method == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(params["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and params["type"] == "error":
            self.errors.append(json.dumps(params["args"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.errors.append(params["entry"]["text"])
