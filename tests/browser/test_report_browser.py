"""The report in headless Chromium: no request, no console error, sorting, filtering, hovering, colours."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from devtools import Browser, browser, find_browser
from report_document import TASKS, make_document

from workbench.report import render

pytestmark = pytest.mark.browser
EXECUTABLE = find_browser()
REQUIRED = os.environ.get("WORKBENCH_REQUIRE_BROWSER") == "1"
if EXECUTABLE is None and not REQUIRED:
    pytest.skip("no Chromium found: install chromium to run the browser tests", allow_module_level=True)

EVIL = "<img src=x onerror=\"document.title='run'\"></script>"
FLIPS = "[...document.querySelectorAll('#flip-list .flip')]"


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    document = make_document()
    evil = document["flips"]["starter-ties"][0]
    for flip in (f for rows in document["flips"].values() for f in rows):
        if (flip["task"], flip["id"]) == (evil["task"], evil["id"]):
            flip["prompt"] = EVIL
    return document


@pytest.fixture(scope="module")
def page(document: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    assert EXECUTABLE, "WORKBENCH_REQUIRE_BROWSER=1, but there is no chromium, chromium-browser or google-chrome"
    path = render(document, tmp_path_factory.mktemp("report") / "report")[0]
    with browser(EXECUTABLE) as opened:
        opened.open(path)
        opened.until("document.getElementById('flip-list').dataset.ready === 'yes'")
        yield opened
        assert opened.requests() == [path.resolve().as_uri()]
        assert opened.complaints() == []


def choose(page: Browser, name: str, value: str) -> None:
    page.js(f"(() => {{ const e = document.getElementById('flip-{name}'); e.value = {value!r};"
            "e.dispatchEvent(new Event('input')); })()")  # fmt: skip


def column(page: Browser, table: str, body: str, index: int) -> list[float]:
    cells = f"document.querySelectorAll('#{table} {body} tr:not(.group)')"
    found = page.js(f"[...{cells}].map((r) => r.cells[{index}].dataset.v).filter((v) => v !== '')")
    return [float(v) for v in found]


def test_every_view_is_drawn(page: Browser) -> None:
    for section in (
        "summary",
        "forest",
        "differences",
        "interference",
        "flips",
        "recipes",
        "provenance",
        "warnings",
    ):
        assert page.js(f"document.getElementById('{section}').getBoundingClientRect().height") > 60, section
    assert page.js("document.querySelectorAll('#forest svg.plot').length") == len(TASKS)
    dots = "[...document.querySelectorAll('#forest g.mark use')].map((u) => u.getBoundingClientRect().width)"
    assert all(width > 4 for width in page.js(dots))
    assert page.js("document.querySelectorAll('#flip-list .flip').length") == 30


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1400, 700, 360])
def test_nothing_overflows(page: Browser, width: int, dark: bool) -> None:
    page.resize(width, 900, dark)
    assert page.js("document.documentElement.scrollWidth") <= width
    paper, ink = page.js("[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]")
    light = [sum(int(x) for x in c[4:-1].split(",")) > 380 for c in (paper, ink)]
    assert light == ([False, True] if dark else [True, False])
    page.resize(1400)


def test_sorting_keeps_controls_apart(page: Browser) -> None:
    header = "document.querySelectorAll('#summary-table thead th')[1]"
    for direction in (True, False):
        page.js(f"{header}.click()")
        assert page.js(f"{header}.getAttribute('aria-sort')") == ("descending" if direction else "ascending")
        for body in (".controls", ".named"):
            values = column(page, "summary-table", body, 1)
            assert values == sorted(values, reverse=direction)
    first = page.js("document.querySelector('#summary-table tbody.controls tr').className")
    assert first == "group"


def test_sorting_differences_puts_empty_cells_last(page: Browser) -> None:
    page.js("document.querySelector('#forest details').open = true")
    page.js("document.querySelectorAll('#rows-table thead th')[6].click()")
    values = page.js("[...document.querySelectorAll('#rows-table tbody tr')].map((r) => r.cells[6].dataset.v)")
    filled = [float(v) for v in values if v]
    assert filled == sorted(filled, reverse=True)
    assert all(v == "" for v in values[len(filled) :])


def test_filtering_changed_items(page: Browser, document: dict[str, Any]) -> None:
    rows = document["flips"]["over-scaled"]
    choose(page, "configuration", page.js("[...document.querySelectorAll('#flip-configuration option')]"
                                          ".find((o) => o.text === 'over-scaled').value"))  # fmt: skip
    assert page.js("document.getElementById('flip-count').textContent").startswith(f"{len(rows)} of {len(rows)} ")
    choose(page, "task", "retention")
    choose(page, "direction", "lost")
    metric = TASKS["retention"][0]
    lost = [r for r in rows if r["task"] == "retention" and r["configuration"]["metrics"][metric] == 0]
    assert page.js("document.getElementById('flip-count').textContent").startswith(f"{len(lost)} of {len(rows)} ")
    shown = page.js(f"{FLIPS}.map((d) => [d.dataset.task, d.dataset.direction])")
    assert shown == [["retention", "lost"]] * min(len(lost), 30)
    page.js("document.getElementById('flip-more').click()")
    assert len(page.js(f"{FLIPS}.map((d) => 1)")) == min(len(lost), 60)
    choose(page, "text", lost[3]["id"])
    assert page.js(f"{FLIPS}.map((d) => d.querySelector('.id').textContent)") == [lost[3]["id"]]
    choose(page, "text", "no such words anywhere")
    assert page.js(f"{FLIPS}.length") == 0
    for name in ("text", "task", "direction"):
        choose(page, name, "")


def test_opening_a_changed_item_shows_both_answers(page: Browser, document: dict[str, Any]) -> None:
    page.js("document.querySelector('button[data-flips=\"starter-ties\"][data-task=triage]').click()")
    flip = next(r for r in document["flips"]["starter-ties"] if r["task"] == "triage")
    assert page.js(f"{FLIPS}[0].children.length") == 1  # the body is made when the row is opened
    page.js(f"{FLIPS}[0].open = true")
    page.until(f"{FLIPS}[0].children.length === 2")
    said = page.js(f"{FLIPS}[0].querySelector('.body').innerText")
    assert all(choice in said for choice in flip["choices"])
    for answer in (flip["baseline"], flip["configuration"]):
        assert all(f"{abs(round(x, 4)):.2f}" in said for x in answer["loglikelihoods"])
    assert page.js(f"{FLIPS}[0].querySelector('tr.gold').innerText").startswith(flip["choices"][flip["gold"]])


def test_user_text_stays_text(page: Browser) -> None:
    page.js("document.querySelector('button[data-flips=\"starter-ties\"][data-task=add]').click()")
    page.js(f"{FLIPS}[0].open = true")
    page.until(f"{FLIPS}[0].children.length === 2")
    assert page.js(f"{FLIPS}[0].querySelector('pre').textContent") == EVIL
    assert page.js("document.querySelectorAll('img').length") == 0
    assert page.js("document.title") != "run"


def test_hovering_shows_the_values(page: Browser, document: dict[str, Any]) -> None:
    mark = "#forest .panel g.mark"
    title = page.js(f"document.querySelector('{mark} title').textContent")
    first = document["rows"][0]
    assert title.startswith(f"{first['configuration']} on {first['task']}: {first['verdict']}")
    page.hover(mark)
    page.until("!document.getElementById('tip').hidden")
    assert page.js("document.getElementById('tip').textContent") == title
    assert page.js(f"document.querySelector('{mark} title').textContent") == ""  # no second, native tooltip
    page.hover("h2")
    page.until("document.getElementById('tip').hidden")
    assert page.js(f"document.querySelector('{mark} title').textContent") == title
    page.hover("#interference .matrix td")
    page.until("!document.getElementById('tip').hidden")
    assert "alone on" in page.js("document.getElementById('tip').textContent")


def test_copying_the_command(page: Browser, document: dict[str, Any]) -> None:
    page.js("document.querySelector('button[data-copy]').click()")
    page.until("document.querySelector('button[data-copy]').textContent === 'Copied'")
    assert page.js("document.getElementById('command').textContent") == document["provenance"]["command"]


def test_reading_without_scripts(document: dict[str, Any], tmp_path: Path) -> None:
    assert EXECUTABLE
    path = render(document, tmp_path / "report")[0]
    with browser(EXECUTABLE) as page:
        page.call("Emulation.setScriptExecutionDisabled", value=True)
        page.open(path)
        assert page.js("document.querySelector('#summary-table').rows.length") > len(document["configurations"])
        assert page.js("getComputedStyle(document.querySelector('.toolbar')).display") == "none"
        assert page.js("document.querySelector('noscript').getBoundingClientRect().height") > 0
        assert page.js("document.querySelector('#forest g.mark title').textContent")
        assert page.complaints() == []
