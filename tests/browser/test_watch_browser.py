"""The pages of `eval --watch` and `search --watch` in headless Chromium: they tell the progress, reload for new scores, and stay at the end."""

from __future__ import annotations

import contextlib
import time

import pytest
from workbench.report.watch import Pages, Watched

from worlds.decided import situation
from worlds.devtools import LIMIT, Browser, skip_without_browser
from worlds.search_document import make_search, unfinished

from workbench.report.search import page_text
from workbench.search.result import GrowingSearch, SearchResult

pytestmark = pytest.mark.browser
skip_without_browser()

TEXT = "document.getElementById('watch-text').textContent"


def until(page: Browser, expression: str) -> None:
    """Wait until an expression is true, also over a reload, which ends what is evaluated."""
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        with contextlib.suppress(RuntimeError):
            if page.js(expression):
                return
        time.sleep(0.05)
    raise TimeoutError(expression)


def test_the_page_grows_and_stays(started: Browser) -> None:
    document = situation("winner")
    with started.new_page() as page:
        with Watched() as watched:
            watched.say("1 of 5 configurations are scored.")
            page.resize(390)
            page.call("Page.navigate", url=watched.url)
            until(page, f"{TEXT} === '1 of 5 configurations are scored.'")
            assert page.js("document.querySelector('h1').textContent") == "Nothing can be compared yet"
            watched.say("3 of 5 configurations are scored.")
            watched.show(document)
            until(page, f"document.querySelector('.decision') !== null && {TEXT} === '3 of 5 configurations are scored.'")
            assert page.js("document.querySelector('.decision').textContent") == document.recommendation.text  # type: ignore[union-attr]
            assert page.js("document.documentElement.scrollWidth") <= 390
            assert {url for url in page.requests() if not url.startswith("data:")} == {watched.url, f"{watched.url}state"}
            assert page.complaints() == []
        until(page, "document.getElementById('watch-head').textContent === 'The command has ended.'")
        assert page.js("document.querySelector('.decision').textContent") == document.recommendation.text  # type: ignore[union-attr]


def test_the_page_of_a_search_grows_and_ends_with_its_test(started: Browser) -> None:
    pages = Pages(page_text, "Search in progress", "No candidate is scored yet", "It appears here.")
    headline = "document.querySelector('.headline').textContent"
    with started.new_page() as page:
        with Watched(0, pages) as watched:
            watched.say("Control 1/7: base.")
            page.resize(390)
            page.call("Page.navigate", url=watched.url)
            until(page, f"{TEXT} === 'Control 1/7: base.'")
            assert page.js("document.querySelector('h1').textContent") == "No candidate is scored yet"
            watched.say("12 of 40 candidates are finished; 3 min left.")
            watched.show(GrowingSearch.of(unfinished(make_search(12), 40), "search"))
            until(page, f"document.querySelector('#history g.candidate') !== null && {TEXT}.startsWith('12 of 40')")
            assert page.js(headline).startswith("12 of 40 candidates are finished. The best so far, trial-")
            assert page.js("document.getElementById('tested-table')") is None
            assert page.js("document.documentElement.scrollWidth") <= 390
            page.resize(1280)
            watched.show(SearchResult.of(make_search(40), "search"))
            until(page, "document.getElementById('tested-table') !== null")
            assert page.js(headline).startswith("On 230 test items that the search did not use")
            assert {url for url in page.requests() if not url.startswith("data:")} == {watched.url, f"{watched.url}state"}
            assert page.complaints() == []
        until(page, "document.getElementById('watch-head').textContent === 'The command has ended.'")
