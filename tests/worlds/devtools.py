"""Headless Chromium over its DevTools pipe, with the standard library alone (no port, no driver)."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from worlds.report_page import render

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)

LIMIT = 300.0
"""Seconds after which a browser that says nothing has failed. Nothing else waits for time."""
# Every scroller that moves sends `scrollend` after its last `scroll`; one that does not move sends neither.
SCROLLED_BOX = """async (element) => {
  const scrollers = [document.scrollingElement];
  for (let node = element.parentElement; node; node = node.parentElement) scrollers.push(node);
  const places = () => scrollers.map((node) => node.scrollLeft + " " + node.scrollTop);
  const before = places(), ended = new Set();
  let wake = () => {};
  const note = (event) => { ended.add(event.target === document ? document.scrollingElement : event.target); wake(); };
  document.addEventListener("scrollend", note, true);
  element.scrollIntoView({ block: "center", behavior: "instant" });
  const moved = scrollers.filter((node, i) => places()[i] !== before[i]);
  while (!moved.every((node) => ended.has(node))) await new Promise((done) => { wake = done; });
  document.removeEventListener("scrollend", note, true);
  await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
  const { x, y, width, height } = element.getBoundingClientRect();
  return [x, y, width, height];
}"""


def find_browser() -> str | None:
    """Path of the first Chromium on PATH, None without one."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


EXECUTABLE = find_browser()


def skip_without_browser() -> None:
    """Skip the calling module where there is no Chromium and WORKBENCH_REQUIRE_BROWSER=1 does not ask for it."""
    if EXECUTABLE is None and os.environ.get("WORKBENCH_REQUIRE_BROWSER") != "1":
        pytest.skip("no Chromium found: install chromium to run the browser tests", allow_module_level=True)


class Browser:
    """One page at a time, the last one opened. Every event that the browser sends of it is kept in `events` in order."""

    def __init__(self, process: subprocess.Popen[bytes], reader: int, writer: int) -> None:
        self.events: list[dict[str, Any]] = []
        self._process, self._reader, self._writer = process, reader, writer
        self._buffer = b""
        self._last = 0
        self._session: str | None = None

    @contextlib.contextmanager
    def new_page(self) -> Iterator[Browser]:
        """Opens a page for the block, with settings and events of its own, and closes it after."""
        outer, self._session, self.events = (self._session, self.events), None, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        self.call("Page.setLifecycleEventsEnabled", enabled=True)
        try:
            yield self
        finally:
            self._session = None
            self.call("Target.closeTarget", targetId=target)
            self._session, self.events = outer

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Sends a command and returns its result; raises RuntimeError with the browser's own error."""
        self._last += 1
        message: dict[str, Any] = {"id": self._last, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._writer, data) :]
        while True:
            answer = self._receive(LIMIT)
            if answer is None:
                raise RuntimeError(f"{method}: no answer from the browser in {LIMIT:g} s")
            if answer.get("id") == self._last:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                result: dict[str, Any] = answer["result"]
                return result

    def open(self, path: Path, width: int = 1400, height: int = 900, dark: bool = False) -> None:
        """Opens a local file and waits for its load event."""
        self.resize(width, height, dark)
        loader = self.call("Page.navigate", url=path.resolve().as_uri())["loaderId"]
        self._wait_for(lambda event: event["method"] == "Page.lifecycleEvent"
                       and (event["params"]["loaderId"], event["params"]["name"]) == (loader, "load"))  # fmt: skip

    def resize(self, width: int, height: int = 900, dark: bool = False) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def js(self, expression: str) -> Any:
        """Value of an expression in the page; promises are awaited, exceptions raised as RuntimeError."""
        got = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True, userGesture=True)
        if "exceptionDetails" in got:
            raise RuntimeError(f"{expression}: {got['exceptionDetails']}")
        return got["result"].get("value")

    def until(self, expression: str, limit: float = LIMIT) -> None:
        """Wait until the expression is true, looking after every frame; raises TimeoutError after `limit` seconds."""
        end = time.monotonic() + limit
        while not self.js(expression):
            if time.monotonic() > end:
                raise TimeoutError(f"not true after {limit:g} s: {expression}")
            self.js("new Promise(requestAnimationFrame)")

    def hover(self, selector: str) -> None:
        """Scroll an element into view, wait until scrolling has ended, and move the mouse to the element's middle."""
        element = f"document.querySelector({json.dumps(selector)})"
        box = self.js(f"({SCROLLED_BOX})({element})")
        self.move(box[0] + box[2] / 2, box[1] + box[3] / 2)

    def move(self, x: float, y: float) -> None:
        """Move the mouse to a point of the window."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def screenshot(self, path: Path, selector: str | None = None) -> None:
        """Writes a PNG of the whole page, or of one element."""
        width, height = self.js("[document.documentElement.clientWidth, document.documentElement.scrollHeight]")
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        if selector:
            box = self.js(
                f"(() => {{ const r = document.querySelector({json.dumps(selector)}).getBoundingClientRect();"
                "return [r.y + scrollY, r.height]; })()"
            )
            clip |= {"y": box[0] - 16, "height": box[1] + 32}
        shot = self.call("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def requests(self) -> list[str]:
        """Addresses of all requests that the page made."""
        sent = [e["params"] for e in self.events if e["method"] == "Network.requestWillBeSent"]
        return [str(p["request"]["url"]) for p in sent]

    def complaints(self) -> list[str]:
        """Console errors and warnings, uncaught exceptions, and entries of the browser's log."""
        kinds = ("Runtime.exceptionThrown", "Log.entryAdded")
        found = [json.dumps(e["params"]) for e in self.events if e["method"] in kinds]
        calls = [e["params"] for e in self.events if e["method"] == "Runtime.consoleAPICalled"]
        return found + [json.dumps(c["args"]) for c in calls if c["type"] in ("error", "warning", "assert")]

    def _wait_for(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        """Read events until one is the wanted one; raises TimeoutError where the browser sends nothing for LIMIT seconds."""
        seen = 0
        while True:
            while seen < len(self.events):
                seen += 1
                if wanted(self.events[seen - 1]):
                    return
            if self._receive(LIMIT) is None:
                raise TimeoutError(f"no event from the browser in {LIMIT:g} s")

    def _receive(self, limit: float) -> dict[str, Any] | None:
        end = time.monotonic() + limit
        while b"\0" not in self._buffer:
            if not select.select([self._reader], [], [], max(0.0, end - time.monotonic()))[0]:
                return None
            chunk = os.read(self._reader, 1 << 20)
            if not chunk:
                raise RuntimeError(f"the browser ended with status {self._process.wait(5)}")
            self._buffer += chunk
        line, self._buffer = self._buffer.split(b"\0", 1)
        message: dict[str, Any] = json.loads(line)
        if "method" in message and message.get("sessionId") == self._session:
            self.events.append(message)
        return message


@contextlib.contextmanager
def browser(executable: str) -> Iterator[Browser]:
    """Starts Chromium with a fresh profile and ends it afterwards."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command_in, command_out = os.pipe()
        answer_in, answer_out = os.pipe()

        def place() -> None:  # Chromium reads commands from descriptor 3 and answers on 4
            high = fcntl.fcntl(command_in, fcntl.F_DUPFD, 20), fcntl.fcntl(answer_out, fcntl.F_DUPFD, 20)
            os.dup2(high[0], 3)
            os.dup2(high[1], 4)

        command = [executable, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            close_fds=False, preexec_fn=place,
        )  # fmt: skip
        os.close(command_in)
        os.close(answer_out)
        try:
            yield Browser(process, answer_in, command_out)
        finally:
            os.close(command_out)
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            os.close(answer_in)


def until(page: Browser, expression: str) -> None:
    """Wait until an expression is true, also over a reload, which ends what is evaluated."""
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        with contextlib.suppress(RuntimeError):
            if page.js(expression):
                return
        time.sleep(0.05)
    raise TimeoutError(expression)


def visit(page: Browser, url: str) -> None:
    """Open an address, and wait until its page is loaded; a token in it is taken out by the server."""
    path = "/" + url.partition("://")[2].partition("/")[2].partition("?token")[0]
    page.call("Page.navigate", url=url)
    until(page, f"document.readyState === 'complete' && location.pathname + location.search === {json.dumps(path)}")


def show(page: Browser, document: dict[str, Any] | Path, folder: Path, width: int = 1280, dark: bool = False) -> Path:
    """Write the report of a comparison document, unless it is a written one; open it, and return its file once its scripts have run."""
    path = document if isinstance(document, Path) else render(document, folder / "report")[0]
    page.open(path, width, 900, dark)
    page.until("document.getElementById('flip-list').dataset.ready === 'yes'")
    return path
