"""Write the pictures of the documentation: report.png, the first screens of the demo's report, and view.png, three configurations asked one prompt.

python docs/screenshots.py           needs Chromium, and what `make demo` leaves; half a minute
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from worlds.devtools import EXECUTABLE, Browser, browser

from workbench.view.app import application
from workbench.view.pages import Site
from workbench.view.server import Served
from workbench.view.talk import Talk

PROJECT = Path(__file__).resolve().parents[1]
NAMES = ("bricks/starter/base", "starter-ties", "starter-route")
PROMPT = "Now spell k i t c h e n from the end. The letters are"
WIDTH = 1280


def report(page: Browser) -> None:
    """Photograph the demo's report from its top to the end of the summary."""
    page.open(PROJECT / "reports" / "demo.html", WIDTH)
    height = page.js("document.querySelector('#summary-table').getBoundingClientRect().bottom + scrollY + 24")
    clip = {"x": 0, "y": 0, "width": WIDTH, "height": height, "scale": 1}
    shot = page.call("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)
    (PROJECT / "docs" / "report.png").write_bytes(base64.b64decode(shot["data"]))


def ask(page: Browser) -> None:
    """Fill in the chat page, ask, and wait for the last answer."""
    page.js(
        f"(() => {{ {json.dumps(NAMES)}.forEach((name, i) => {{ document.querySelectorAll('[name=name]')[i].value = name; }});"
        f"document.querySelector('[name=prompt]').value = {json.dumps(PROMPT)};"
        "document.querySelector('[name=tokens]').value = 8; document.querySelector('[name=plain]').checked = true;"
        "document.getElementById('chat').requestSubmit(); })()"
    )
    page.until("!document.getElementById('chat-ask').disabled")


def main() -> None:
    """Photograph the report; serve the project, and photograph its chat page."""
    assert EXECUTABLE, "there is no chromium, chromium-browser or google-chrome"
    os.chdir(PROJECT)
    with Served(application(Site(), talk=Talk("cpu"))) as served, browser(EXECUTABLE) as started, started.new_page() as page:
        report(page)
        page.resize(WIDTH)
        for address in (served.url, served.url.partition("?")[0] + "chat"):
            page.call("Page.navigate", url=address)
            with contextlib.suppress(RuntimeError):  # what is evaluated ends with the page before
                page.until("document.readyState === 'complete'")
        page.until("location.pathname === '/chat' && document.readyState === 'complete'")
        ask(page)
        page.js("document.querySelector('.eyebrow').textContent = 'brick-workbench'")  # no path of this machine
        page.js(
            "document.getElementById('chat-note').textContent = document.getElementById('chat-note').textContent.replace(/of \\S*bricks/, 'of bricks')"
        )
        page.screenshot(PROJECT / "docs" / "view.png")
        assert page.complaints() == []


if __name__ == "__main__":
    main()
