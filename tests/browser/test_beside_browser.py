"""Two configurations side by side in headless Chromium: any two, filters, texts and choices, width, colors, no request."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from worlds.devtools import Browser, show, skip_without_browser
from worlds.report_document import make_document

pytestmark = pytest.mark.browser
skip_without_browser()

EVIL = "<img src=x onerror=\"document.title='run'\"></script>"
ROWS = "[...document.querySelectorAll('#beside-list .flip')]"
COUNT = "document.getElementById('beside-count').textContent"
READY = "document.getElementById('beside-list').dataset.ready === 'yes'"
ITEMS = 14


def answered(i: int, name: str) -> list[Any]:
    """Item i of the task `write`: `ties` wins 0 to 4, `dare` wins 3 to 6; of 7 only the texts differ."""
    right = {"base": i >= 10, "ties": i < 5 or i >= 10, "dare": 3 <= i < 7 or i >= 10}[name]
    text = "right text" if right else EVIL if i == 7 and name == "dare" else "wrong"
    return [float(right), text, None]


def chosen(name: str) -> list[Any]:
    """The item of the task `pick`, which `dare` alone gets right."""
    return [float(name == "dare"), None, [-1.0, -2.0 if name != "dare" else -0.5]]


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    names = ("base", "ties", "dare")
    question = {"cluster": "c", "prompt": "a long prompt " * 30, "gold": "right text", "choices": None}
    items = [{"task": "write", "id": f"write-{i}", **question} for i in range(ITEMS)]
    items.append({"task": "pick", "id": "pick-0", "cluster": "c", "prompt": EVIL, "gold": 1, "choices": ["one", "two"]})
    answers = {name: [*(answered(i, name) for i in range(ITEMS)), chosen(name)] for name in names}
    made = make_document()
    configuration, task = {**made["configurations"][0], "scores": {}, "kept": {}}, made["tasks"][0]
    return {
        **made,
        "rows": [],
        "interference": {key: [] for key in made["interference"]},
        "flips": {"ties": [], "dare": []},
        "configurations": [{**configuration, "name": n, "role": "base" if n == "base" else "configuration"} for n in names],
        "tasks": [{**task, "task": "write", "metric": "em"}, {**task, "task": "pick", "metric": "acc"}],
        "side_by_side": {"items": items, "answers": answers, "differing": 40, "left_out": 25},
    }


def choose(page: Browser, **values: str) -> None:
    for name, value in values.items():
        page.js(
            f"(() => {{ const e = document.getElementById('beside-{name}'); e.value = {value!r};"
            "e.dispatchEvent(new Event('input')); })()"
        )


def opened_at(page: Browser, document: dict[str, Any], folder: Path, width: int = 1280, dark: bool = False) -> Path:
    path = show(page, document, folder, width, dark)
    page.until(READY)
    return path


def test_any_two_configurations_are_compared(opened: Browser, document: dict[str, Any], tmp_path: Path) -> None:
    path = opened_at(opened, document, tmp_path)
    assert opened.js(COUNT) == "5 of 15 items: ties against base, 5 won, 0 lost, 0 with the same score"
    choose(opened, first="1", second="2")
    # against ties, dare wins 5, 6 and the choice, and loses 0, 1 and 2; the text of 7 differs
    names = opened.js("[...document.getElementById('beside-first').options].map((o) => o.textContent)")
    assert names == ["ties", "dare", "base"]
    choose(opened, first="0", second="1")
    assert opened.js(COUNT) == "7 of 15 items: dare against ties, 3 won, 3 lost, 1 with the same score"
    opened.js("document.getElementById('beside-swap').click()")
    assert opened.js(COUNT) == "7 of 15 items: ties against dare, 3 won, 3 lost, 1 with the same score"
    choose(opened, first="1", second="1")
    assert opened.js(COUNT) == "Choose two different configurations."
    assert "workbench scores items" in opened.js("document.querySelector('#beside .caption').textContent")
    assert opened.requests()[-1] == path.resolve().as_uri()


def test_items_are_filtered(opened: Browser, document: dict[str, Any], tmp_path: Path) -> None:
    opened_at(opened, document, tmp_path)
    choose(opened, first="0", second="1", only="lost")
    assert opened.js(f"{ROWS}.map((r) => r.querySelector('.id').textContent)") == ["write-0", "write-1", "write-2"]
    choose(opened, only="all", task="pick")
    assert opened.js(f"{ROWS}.map((r) => r.dataset.change)") == ["won"]
    choose(opened, task="", text="ONERROR")
    assert sorted(opened.js(f"{ROWS}.map((r) => r.dataset.task)")) == ["pick", "write"]
    choose(opened, text="")
    assert opened.js(f"{ROWS}.length") == 10
    opened.js("document.getElementById('beside-more').click()")
    assert opened.js(f"{ROWS}.length") == 15
    assert opened.js("document.getElementById('beside-more').hidden")


def test_both_answers_stand_beside_each_other(opened: Browser, document: dict[str, Any], tmp_path: Path) -> None:
    opened_at(opened, document, tmp_path)
    choose(opened, first="0", second="1", text="onerror", only="all")
    opened.js(f"{ROWS}.forEach((r) => {{ r.open = true; }})")
    opened.until(f"{ROWS}.every((r) => r.querySelector('.body'))")
    panes = opened.js(
        "[...document.querySelectorAll('#beside-list .pane')].map((p) => [p.querySelector('h4').textContent, p.querySelector('pre').textContent])"
    )
    assert panes == [["tiesem 0", "wrong"], ["dareem 0", EVIL]]
    tops = opened.js("[...document.querySelectorAll('#beside-list .pane')].map((p) => p.getBoundingClientRect().top)")
    assert tops[0] == tops[1]
    cells = opened.js(
        "[...document.querySelectorAll('#beside-list table tr')].map((r) => [...r.cells].map((c) => c.textContent))"
    )
    assert cells == [
        ["Choice", "ties", "dare"],
        ["one", "\N{MINUS SIGN}1.00\N{BLACK LEFT-POINTING SMALL TRIANGLE}", "\N{MINUS SIGN}1.00"],
        ["two  (right answer)", "\N{MINUS SIGN}2.00", "\N{MINUS SIGN}0.50\N{BLACK LEFT-POINTING SMALL TRIANGLE}"],
    ]
    assert "run" not in opened.js("document.title")


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_nothing_overflows(width: int, dark: bool, opened: Browser, document: dict[str, Any], tmp_path: Path) -> None:
    opened_at(opened, document, tmp_path, width, dark)
    opened.js(f"{ROWS}.forEach((r) => {{ r.open = true; }})")
    opened.until(f"{ROWS}.every((r) => r.querySelector('.body'))")
    assert opened.js("document.documentElement.scrollWidth") <= width
    lefts = opened.js(
        "[...document.querySelectorAll('#beside-list .pane')].slice(0, 2).map((p) => p.getBoundingClientRect().left)"
    )
    assert (lefts[0] == lefts[1]) == (width < 760)


def test_without_answers_there_is_no_such_section(opened: Browser, document: dict[str, Any], tmp_path: Path) -> None:
    show(opened, {key: value for key, value in document.items() if key != "side_by_side"}, tmp_path)
    assert opened.js("document.getElementById('beside')") is None
    assert opened.js("document.querySelector('nav a[href=\"#beside\"]')") is None
