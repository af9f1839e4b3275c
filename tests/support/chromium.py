"""A headless Chromium driven through its own protocol over a pipe: opens pages, tells what they asked for and said."""

from __future__ import annotations

import base64
import itertools
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BROWSERS = ("google-chrome", "chromium", "chromium-browser")
PATIENCE_SECONDS = 60.0


def find_chromium() -> str | None:
    """The browser of this machine, if it has one."""
    return next((found for name in BROWSERS if (found := shutil.which(name))), None)


@dataclass
class Tab:
    """One page at one width and colour scheme."""

    read_end: int
    write_end: int
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    buffer: bytearray = field(default_factory=bytearray)
    events: list[dict[str, Any]] = field(default_factory=list)
    session: str | None = None

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command's result; events that come meanwhile are kept."""
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write_end, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == number:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result
            self.events.append(answer)

    def open(self, url: str, width: int, height: int, scheme: str = "light") -> None:
        """Open a page anew and wait until it has loaded."""
        self.events.clear()
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call("Page.navigate", url=url)
        while not self.seen("Page.loadEventFired"):
            self.events.append(self._receive())

    def seen(self, method: str) -> list[dict[str, Any]]:
        """The parameters of all events of a kind since the page was opened."""
        return [event["params"] for event in self.events if event.get("method") == method]

    def value(self, expression: str) -> Any:
        """What an expression gives in the page."""
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def screenshot(self, path: Path, whole: bool = True) -> None:
        """A picture of the page, the whole of it or what is seen without scrolling."""
        taken = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole, **self._clip(whole))
        path.write_bytes(base64.b64decode(taken["data"]))

    def _clip(self, whole: bool) -> dict[str, Any]:
        if not whole:
            return {}
        found = self.call("Page.getLayoutMetrics")["cssContentSize"]
        return {"clip": {"x": 0, "y": 0, "width": found["width"], "height": found["height"], "scale": 1}}

    def _receive(self) -> dict[str, Any]:
        until = time.monotonic() + PATIENCE_SECONDS
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.read_end], [], [], max(until - time.monotonic(), 0))
            part = os.read(self.read_end, 1 << 20) if ready else b""
            assert part, "Chromium went away or does not answer"
            self.buffer += part
        message, _, rest = bytes(self.buffer).partition(b"\0")
        self.buffer = bytearray(rest)
        parsed: dict[str, Any] = json.loads(message)
        return parsed


@contextmanager
def chromium(browser: str, profile: Path) -> Iterator[Tab]:
    """A browser with one tab, gone at the end."""
    their_read, write_end = os.pipe()
    read_end, their_write = os.pipe()
    flags = ["--headless", "--remote-debugging-pipe", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    flags += ["--no-sandbox"]  # needs no rights that containers lack; the pages are our own
    # The protocol is spoken on descriptors 3 and 4.
    script = f'exec "$@" 3<&{their_read} 4>&{their_write}'
    process = subprocess.Popen(
        ["bash", "-c", script, "chromium", browser, *flags, f"--user-data-dir={profile}", "about:blank"],
        pass_fds=(their_read, their_write),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(their_read)
    os.close(their_write)
    tab = Tab(read_end, write_end)
    try:
        target = tab.call("Target.createTarget", url="about:blank")["targetId"]
        tab.session = tab.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            tab.call(f"{domain}.enable")
        yield tab
    finally:
        tab.session = None
        with suppress(OSError, AssertionError):
            tab.call("Browser.close")
        process.wait(timeout=PATIENCE_SECONDS)
        os.close(read_end)
        os.close(write_end)
