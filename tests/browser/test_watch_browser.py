"""The page of `eval --watch` in headless Chromium: it tells the progress, reloads for new scores, and stays when the command ends."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import pytest

from worlds.decided import situation
from worlds.devtools import EXECUTABLE, Browser, browser, skip_without_browser

from workbench.report.watch import Watched

pytestmark = pytest.mark.browser
skip_without_browser()

TEXT = "document.getElementById('watch-text').textContent"


def until(page: Browser, expression: str) -> None:
    """Wait until an expression is true, also over a reload, which ends what is evaluated."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        with contextlib.suppress(RuntimeError):
            if page.js(expression):
                return
        time.sleep(0.05)
    raise TimeoutError(expression)


def test_the_page_grows_and_stays(tmp_path: Path) -> None:
    assert EXECUTABLE
    document = situation("winner", tmp_path).document()
    with browser(EXECUTABLE) as page:
        with Watched() as watched:
            watched.say("1 of 5 configurations are scored.")
            page.resize(390)
            page.call("Page.navigate", url=watched.url)
            until(page, f"{TEXT} === '1 of 5 configurations are scored.'")
            assert page.js("document.querySelector('h1').textContent") == "Nothing can be compared yet"
            watched.say("3 of 5 configurations are scored.")
            watched.show(document)
            until(page, f"document.querySelector('.decision') !== null && {TEXT} === '3 of 5 configurations are scored.'")
            assert page.js("document.querySelector('.decision').textContent") == document["recommendation"]["text"]
            assert page.js("document.documentElement.scrollWidth") <= 390
            assert {url for url in page.requests() if not url.startswith("data:")} == {watched.url, f"{watched.url}state"}
            assert page.complaints() == []
        until(page, "document.getElementById('watch-head').textContent === 'The command has ended.'")
        assert page.js("document.querySelector('.decision').textContent") == document["recommendation"]["text"]
