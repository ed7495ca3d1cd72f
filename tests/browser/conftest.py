"""A browser for all tests, and a page of it for all tests of a file."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from worlds.devtools import EXECUTABLE, Browser, browser


@pytest.fixture(scope="session")
def started() -> Iterator[Browser]:
    """Chromium, started once."""
    assert EXECUTABLE, "WORKBENCH_REQUIRE_BROWSER=1, but there is no chromium, chromium-browser or google-chrome"
    with browser(EXECUTABLE) as page:
        yield page


@pytest.fixture(scope="module")
def opened(started: Browser) -> Iterator[Browser]:
    """A page that may neither complain nor ask the network."""
    with started.new_page() as page:
        yield page
        assert page.complaints() == []
