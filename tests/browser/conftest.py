"""A browser for all tests of a file."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from worlds.devtools import EXECUTABLE, Browser, browser


@pytest.fixture(scope="module")
def opened() -> Iterator[Browser]:
    """A browser whose pages may neither complain nor ask the network."""
    assert EXECUTABLE
    with browser(EXECUTABLE) as page:
        yield page
        assert page.complaints() == []
