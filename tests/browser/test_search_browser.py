"""The page of a search in headless Chromium: no request, no complaint, nothing wider than the window, sorting, hovering."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from worlds.devtools import Browser, skip_without_browser
from worlds.search_document import make_search
from worlds.search_page import render

pytestmark = [pytest.mark.browser, pytest.mark.part("search")]
skip_without_browser()


@pytest.fixture(scope="module", params=[(4, 1), (40, 2), (300, 1)], ids=["4", "40-two-objectives", "300"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    trials, objectives = request.param
    document = make_search(trials, random=trials // 4, objectives=objectives)
    return render(document, tmp_path_factory.mktemp("search") / "search")[0]


@pytest.fixture
def page(path: Path, started: Browser) -> Iterator[Browser]:
    with started.new_page() as opened:
        opened.open(path)
        opened.until("document.documentElement.classList.contains('js')")
        yield opened
        assert opened.requests() == [path.resolve().as_uri()]
        assert opened.complaints() == []


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_overflows(page: Browser, width: int, dark: bool) -> None:
    page.resize(width, 900, dark)
    assert page.js("document.documentElement.scrollWidth") <= width
    # texts of drawings lie within what scrolls with them
    beyond = (
        "[...document.querySelectorAll('.chart text, .parallel text')].filter((t) => { const b = t.getBoundingClientRect();"
        " const s = t.closest('.scroll') || document.documentElement; const r = s.getBoundingClientRect();"
        " return b.left < r.left - 1 || b.right > r.left + s.scrollWidth + 1; }).map((t) => t.textContent)"
    )
    assert page.js(beyond) == []


def test_marks_are_drawn_and_controls_apart(page: Browser) -> None:
    page.resize(1280)
    widths = page.js("[...document.querySelectorAll('#history g.candidate use')].map((u) => u.getBoundingClientRect().width)")
    assert widths
    assert min(widths) > 5
    labels = "[...document.querySelector('#history .labels').querySelectorAll('text')].map((t) => t.getBoundingClientRect().top)"
    tops = sorted(page.js(labels))
    assert min(b - a for a, b in pairwise(tops)) > 11


def test_hover_and_sort(page: Browser) -> None:
    page.resize(1280)
    page.hover("#history g.candidate:last-of-type .hit")
    page.until("!document.getElementById('tip').hidden")
    assert page.js("document.getElementById('tip').textContent").startswith(("trial-", "random-"))
    page.js("document.querySelector('#tested-table thead th:nth-child(3)').click()")
    column = "[...document.querySelectorAll('#tested-table tbody.controls tr')].map((r) => Number(r.cells[2].dataset.v))"
    found = page.js(column)
    assert found == sorted(found, reverse=True)
