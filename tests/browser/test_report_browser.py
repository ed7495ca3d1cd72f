"""The report in headless Chromium: no request, no console error, sorting, filtering, hovering, colours."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from worlds.devtools import Browser, skip_without_browser
from worlds.report_additions import add_own_units
from worlds.report_document import TASKS, make_document, make_large
from worlds.report_page import render

pytestmark = pytest.mark.browser
skip_without_browser()

EVIL = "<img src=x onerror=\"document.title='run'\"></script>"
DIFF = "[...document.querySelectorAll('#diff-lines .diff > *')].map((d) => [d.className, (d.querySelector('.text') || d).textContent])"
FLIPS = "[...document.querySelectorAll('#flip-list .flip')]"


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    document = make_document()
    evil = document["flips"]["starter-ties"][0]
    for flip in (f for rows in document["flips"].values() for f in rows):
        if (flip["task"], flip["id"]) == (evil["task"], evil["id"]):
            flip["prompt"] = EVIL
    add_own_units(document)
    for c in document["configurations"]:
        if c["name"] == "dates-conflict":
            c["recipe_text"] = "".join(f"line: {i}\n" for i in range(30)) + EVIL + "\n"
        if c["name"] == "over-scaled":
            c["aliases"] = [f"over-scaled-by-{i}-and-equal" for i in range(8)]
            c["recipe_text"] = "".join(f"line: {i if i != 15 else 'fifteen'}\n" for i in range(30)) + EVIL + "\n"
    return document


@pytest.fixture(scope="module")
def path(document: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return render(document, tmp_path_factory.mktemp("report") / "report")[0]


@pytest.fixture
def page(path: Path, started: Browser) -> Iterator[Browser]:
    with started.new_page() as opened:
        opened.open(path)
        opened.until("document.getElementById('flip-list').dataset.ready === 'yes'")
        yield opened
        assert opened.requests() == [path.resolve().as_uri()]
        assert opened.complaints() == []


def test_a_long_list_of_equal_configurations_wraps(page: Browser) -> None:
    """The names below a configuration are as wide as their column at most: none is cut at its edge."""
    names = page.js(
        "[...document.querySelectorAll('.stick tbody th:first-child .sub')].map((e) => [e.textContent, e.scrollWidth - e.clientWidth])"
    )
    long = [over for text, over in names if "over-scaled-by-7-and-equal" in text]
    assert len(long) == 2, "in the summary and in the table of configurations"
    assert max(over for _, over in names) <= 0


def choose(page: Browser, name: str, value: str) -> None:
    page.js(f"(() => {{ const e = document.getElementById('flip-{name}'); e.value = {value!r};"
            "e.dispatchEvent(new Event('input')); })()")  # fmt: skip


def column(page: Browser, table: str, body: str, index: int) -> list[float]:
    cells = f"document.querySelectorAll('#{table} {body} tr:not(.group)')"
    found = page.js(f"[...{cells}].map((r) => r.cells[{index}].dataset.v).filter((v) => v !== '')")
    return [float(v) for v in found]


def test_every_view_is_drawn(page: Browser) -> None:
    for section in ("summary", "forest", "differences", "interference", "flips", "configurations", "provenance", "warnings"):
        assert page.js(f"document.getElementById('{section}').getBoundingClientRect().height") > 60, section
    assert page.js("document.querySelectorAll('#forest svg.plot').length") == len(TASKS) + 3
    dots = "[...document.querySelectorAll('#forest g.mark use')].map((u) => u.getBoundingClientRect().width)"
    assert all(width > 4 for width in page.js(dots))
    assert page.js("document.querySelectorAll('#flip-list .flip').length") == 30
    assert page.js("[...document.querySelectorAll('.scatter')].map((s) => s.getBoundingClientRect().width > 300)") == [True, True]
    for table in ("summary", "undecided", "rows", "kept", "forgetting", "configurations", "check"):
        assert page.js(f"document.querySelector('#{table}-table tbody').rows.length") > 3, table


def test_a_loss_on_a_guarded_task_is_seen_first(page: Browser) -> None:
    """Above what won, in the colour of "worse"; the tolerance is a line over the whole panel, left of zero."""
    assert page.js("document.querySelector('header .headline').textContent.trim().startsWith('over-scaled loses ')")
    colour = page.js("getComputedStyle(document.querySelector('.headline.harm')).color")
    assert colour == "rgb(190, 77, 0)"
    box = page.js(
        "(() => { const b = document.querySelector('#forest .plot line.tolerance').getBoundingClientRect(); return [b.x, b.height]; })()"
    )
    zero = page.js(
        "document.querySelector('#forest .plot line.tolerance').parentNode.querySelector('line.zero').getBoundingClientRect().x"
    )
    assert box[1] > 100
    assert box[0] < zero - 10
    marks = "[...document.querySelectorAll('#forest .plot use')].filter((u) => u.getAttribute('href') === '#m-safe')"
    assert page.js(f"{marks}.length") > 1
    assert page.js(f"{marks}.every((u) => getComputedStyle(u).getPropertyValue('--halo').trim() !== '')")


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1400, 700, 360])
def test_nothing_overflows(page: Browser, width: int, dark: bool) -> None:
    page.until("document.documentElement.dataset.saves === 'ready'")
    page.resize(width, 900, dark)
    assert page.js("document.documentElement.scrollWidth") <= width
    paper, ink = page.js("[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]")
    light = [sum(int(x) for x in c[4:-1].split(",")) > 380 for c in (paper, ink)]
    assert light == ([False, True] if dark else [True, False])
    page.resize(1400)


def test_sorting_keeps_controls_apart(page: Browser) -> None:
    header = "document.querySelectorAll('#summary-table thead th')[1]"
    for direction in (False, True):  # it is sorted by mean from the start
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
    task = document["tasks"][0]["task"]
    rows = [d for d in document["rows"] if (d["role"], d["task"]) == ("configuration", task)]
    first = max(rows, key=lambda d: d["value"])  # named configurations stand above the controls, the best first
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


def middle(page: Browser, selector: str) -> tuple[float, float]:
    """The middle of an element in the window, where it stands now."""
    x, y, width, height = page.js(
        f"(({{x, y, width, height}}) => [x, y, width, height])(document.querySelector({selector!r}).getBoundingClientRect())"
    )
    return x + width / 2, y + height / 2


def test_moving_over_a_mark_brings_its_tooltip_back_after_a_scroll(page: Browser) -> None:
    """A scroll hides the tooltip; the next move of the pointer, on the same mark, shows it again."""
    hit = "#decide .scatter g.named .point"
    page.hover(hit)
    page.until("!document.getElementById('tip').hidden")
    said = page.js("document.getElementById('tip').textContent")
    page.js(
        "new Promise((done) => { addEventListener('scroll', done, {once: true, capture: true}); scrollBy({top: 1, behavior: 'instant'}); })"
    )
    page.until("document.getElementById('tip').hidden")
    page.move(*middle(page, hit))
    page.until("!document.getElementById('tip').hidden")
    assert page.js("document.getElementById('tip').textContent") == said
    page.hover("h2")
    page.until("document.getElementById('tip').hidden")


def test_a_late_scroll_event_leaves_the_tooltip_of_a_mark_that_has_not_moved(page: Browser) -> None:
    """Chromium may send the event of a scroll that is over after the pointer has entered a mark."""
    page.hover("#decide .scatter g.named .point")
    page.until("!document.getElementById('tip').hidden")
    page.js("document.dispatchEvent(new Event('scroll'))")
    assert page.js("document.getElementById('tip').hidden") is False
    page.hover("h2")


def test_scrolling_a_table_sideways_hides_the_tooltip_of_its_cell(page: Browser) -> None:
    """Scroll events of a container do not bubble to the document."""
    page.resize(360)
    cell = "#interference .matrix td"
    page.hover(cell)
    page.until("!document.getElementById('tip').hidden")
    moved = page.js(f"""(() => {{ let box = document.querySelector({cell!r});
        while (box && box.scrollWidth <= box.clientWidth + 8) box = box.parentElement;
        if (!box || box === document.scrollingElement) return false;
        box.scrollBy({{left: box.scrollLeft > 4 ? -4 : 4, behavior: 'instant'}}); return true; }})()""")
    assert moved, "the table is wider than a window of 360 pixels"
    page.until("document.getElementById('tip').hidden")
    page.resize(1400)


def test_copying_the_command(page: Browser, document: dict[str, Any]) -> None:
    page.js("document.querySelector('button[data-copy]').click()")
    page.until("document.querySelector('button[data-copy]').textContent === 'Copied'")
    assert page.js("document.getElementById('command').textContent") == document["provenance"]["command"]


def test_reading_without_scripts(document: dict[str, Any], started: Browser, tmp_path: Path) -> None:
    path = render(document, tmp_path / "report")[0]
    with started.new_page() as page:
        page.call("Emulation.setScriptExecutionDisabled", value=True)
        page.open(path)
        assert page.js("document.querySelector('#summary-table').rows.length") > len(document["configurations"])
        assert page.js("getComputedStyle(document.querySelector('.toolbar')).display") == "none"
        assert page.js("document.querySelector('noscript').getBoundingClientRect().height") > 0
        assert page.js("document.querySelector('#forest g.mark title').textContent")
        assert page.complaints() == []


def pick_recipes(page: Browser, before: str, after: str) -> list[list[str]]:
    """Chooses two recipes by name; returns the kinds and texts of the lines that are shown."""
    for name, value in (("from", before), ("to", after)):
        page.js(f"(() => {{ const e = document.getElementById('diff-{name}');"
                f"e.value = [...e.options].find((o) => o.text === {value!r}).value; e.dispatchEvent(new Event('input')); }})()")  # fmt: skip
    lines: list[list[str]] = page.js(DIFF)
    return lines


def recipe(document: dict[str, Any], name: str) -> list[str]:
    text: str = next(c["recipe_text"] for c in document["configurations"] if c["name"] == name)
    return text.splitlines()


def test_two_recipes_are_compared_line_by_line(page: Browser, document: dict[str, Any]) -> None:
    chosen = page.js("['from', 'to'].map((n) => document.getElementById('diff-' + n).selectedOptions[0].text)")
    assert chosen == ["starter-task-arithmetic", "starter-ties"]
    lines = page.js(DIFF)
    before, after = (recipe(document, name) for name in chosen)
    assert [t for kind, t in lines if kind in ("same", "del")] == before
    assert [t for kind, t in lines if kind in ("same", "add")] == after
    assert [t for kind, t in lines if kind == "del"] == [b for b, a in zip(before, after, strict=True) if a != b]
    marked = page.js("[...document.querySelectorAll('#diff-lines b')].map((b) => b.textContent)")
    assert marked == ["starter-task-arithmetic.yaml", "starter-ties.yaml", "task_arithmetic", "ties"]
    page.js("document.getElementById('diff-swap').click()")
    assert [t for kind, t in page.js(DIFF) if kind in ("same", "add")] == before
    assert "2 lines removed, 2 lines added" in page.js("document.getElementById('diff-count').textContent")


def test_lines_put_in_and_taken_out_are_found(page: Browser, document: dict[str, Any]) -> None:
    lines = pick_recipes(page, "starter-ties", "dates-conflict")
    before, after = (recipe(document, name) for name in ("starter-ties", "dates-conflict"))
    assert not set(before) & set(after)
    assert lines == [*(["del", t] for t in before), *(["add", t] for t in after)]
    assert page.js("document.querySelectorAll('img').length") == 0  # the last line is markup in the recipe


def test_equal_lines_are_folded_and_open(page: Browser, document: dict[str, Any]) -> None:
    lines = pick_recipes(page, "dates-conflict", "over-scaled")
    folds = [t for kind, t in lines if kind == "fold"]
    assert [int(t.split()[1]) for t in folds] == [12, 12]
    assert [kind for kind, _ in lines] == ["fold", *["same"] * 3, "del", "add", *["same"] * 3, "fold"]
    page.js("document.querySelectorAll('#diff-lines .fold').forEach((b) => b.click())")
    opened = page.js(DIFF)
    assert [t for kind, t in opened if kind in ("same", "del")] == recipe(document, "dates-conflict")


def test_what_has_no_recipe_is_named(page: Browser) -> None:
    pick_recipes(page, "base", "starter-ties")
    assert page.js("document.getElementById('diff-count').textContent") == (
        "base has no recipe in this report: it is the base without bricks."
    )
    assert "merge: ties" in page.js("document.getElementById('diff-lines').textContent")
    pick_recipes(page, "starter-ties", "starter-ties")
    assert "have the same text" in page.js("document.getElementById('diff-count').textContent")
    assert page.js(DIFF) == []


def test_hovering_a_point_shows_its_values(page: Browser, document: dict[str, Any]) -> None:
    page.hover("#decide .scatter g.named .point")
    page.until("!document.getElementById('tip').hidden")
    said = page.js("document.getElementById('tip').textContent").split("\n")
    c = next(c for c in document["configurations"] if c["name"] == said[0])
    assert said[1].startswith(f"Retention {100 * c['scores']['retention']['value']:.1f} [")
    assert said[2].startswith(f"Mean over skills {100 * c['mean']['value']:.1f} [")
    page.hover("h2")


def test_sorting_the_undecided(page: Browser) -> None:
    page.js("document.querySelectorAll('#undecided-table thead th')[3].click()")
    values = column(page, "undecided-table", "tbody", 3)
    assert len(values) > 5
    assert values == sorted(values, reverse=True)


def test_printing_opens_what_is_folded(page: Browser) -> None:
    closed = "document.querySelectorAll('details:not([open])').length"
    before = page.js(closed)
    assert before > 3
    pick_recipes(page, "dates-conflict", "over-scaled")
    page.js("dispatchEvent(new Event('beforeprint'))")
    assert page.js(closed) == 0
    page.call("Emulation.setEmulatedMedia", media="print")
    for selector in ("nav", "#flip-list", ".toolbar", "#diff-swap"):
        assert page.js(f"getComputedStyle(document.querySelector({selector!r})).display") == "none", selector
    assert page.js("[...document.querySelectorAll('#recipe-diff .diff > *')].every((d) => d.getBoundingClientRect().height > 8)")
    page.call("Emulation.setEmulatedMedia", media="")
    page.js("dispatchEvent(new Event('afterprint'))")
    assert page.js(closed) == before


def test_a_large_report_opens_and_makes_only_the_rows_that_are_shown(started: Browser, tmp_path: Path) -> None:
    path = render(make_large(), tmp_path / "large")[0]
    assert path.stat().st_size < 2_000_000
    with started.new_page() as page:
        page.open(path)
        page.until("document.getElementById('flip-list').dataset.ready === 'yes'")
        assert page.js("document.getElementById('flip-count').textContent").startswith("2000 of 2000 ")
        assert page.js("document.querySelectorAll('*').length") < 4000
        assert page.requests() == [path.resolve().as_uri()]
        assert page.complaints() == []
