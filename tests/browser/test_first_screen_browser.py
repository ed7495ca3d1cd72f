"""The first screen of the report in headless Chromium, at 2, 10 and 24 configurations and with curves of sweeps: what stands on it, its length, the filter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from worlds.decided import many, situation
from worlds.devtools import Browser, show, skip_without_browser
from worlds.report_page import render
from worlds.swept import LAMBDA, METHOD, SEED, swept

pytestmark = [pytest.mark.browser, pytest.mark.slow]  # its fixture decides six comparisons: 16 s
skip_without_browser()

ROWS = "[...document.querySelectorAll('#summary-table tbody tr:not(.group)')]"


@pytest.fixture(scope="module")
def documents() -> dict[str, Any]:
    found = {str(n): many(n).to_dict() for n in (2, 10)}
    found["24"] = many(24, ("dates", "triage", "units")).to_dict()
    found |= {"methods": swept(LAMBDA, METHOD).to_dict(), "seeds": swept(LAMBDA, METHOD, SEED).to_dict()}
    return found | {name: situation(name).to_dict() for name in ("winner", "alike", "unsafe")}


@pytest.fixture(scope="module")
def pages(documents: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: render(document, tmp_path_factory.mktemp("page") / "report")[0] for name, document in documents.items()}


@pytest.mark.parametrize("name", ["winner", "alike", "unsafe", "2", "10", "24"])
def test_the_decision_stands_on_the_first_screen(
    name: str, opened: Browser, documents: dict[str, Any], pages: dict[str, Path], tmp_path: Path
) -> None:
    """At 1280 by 900, the sentence, the table of leaders and the scatter are seen without scrolling."""
    show(opened, pages[name], tmp_path)
    found = documents[name]["recommendation"]
    assert opened.js("document.querySelector('.decision').textContent") == found["text"]
    for selector in (".decision", "#leaders-table", "#decide svg.scatter"):
        bottom = opened.js(f"document.querySelector({selector!r}).getBoundingClientRect().bottom")
        assert 0 < bottom <= 900, selector
    assert opened.js("document.querySelectorAll('#decide .ring').length") == 2  # of the point and in the legend
    named = opened.js("[...document.querySelectorAll('#decide .scatter text.name')].map((t) => t.textContent)")
    assert (found["configuration"] or found["closest"])[:27] in [n[:27] for n in named]


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", ["2", "24", "methods"])
def test_nothing_overflows(name: str, width: int, dark: bool, opened: Browser, pages: dict[str, Path], tmp_path: Path) -> None:
    path = show(opened, pages[name], tmp_path, width, dark)
    assert opened.js("document.documentElement.scrollWidth") <= width
    curves = "[...document.querySelectorAll('#sweeps svg.curves')].map((c) => c.getBoundingClientRect().right)"
    assert max(opened.js(curves), default=0) <= width
    assert opened.requests()[-1] == path.resolve().as_uri()


@pytest.mark.parametrize("name", ["24", "winner", "methods"])
def test_a_phone_shows_guarded_tasks_and_cost_and_no_small_label(
    name: str, opened: Browser, pages: dict[str, Path], tmp_path: Path
) -> None:
    """At 390 px, every cell of the leaders stands within the window; a drawing's letters shrink with it, to 11 px at least."""
    show(opened, pages[name], tmp_path, 390)
    cells = opened.js("""[...document.querySelectorAll('#leaders-table tbody td')].map((d) => {
        const r = d.getBoundingClientRect(); return [r.left >= 0 && r.right <= 390 && r.height > 0, d.dataset.label]; })""")
    assert all(seen for seen, _ in cells)
    assert [label for _, label in cells[:4]] == ["Mean", "Below the best", "Guarded tasks", "Cost"]
    sizes = opened.js("""[...document.querySelectorAll('svg text')].map((t) => {
        const svg = t.ownerSVGElement, box = svg.viewBox.baseVal;
        return parseFloat(getComputedStyle(t).fontSize) * (box.width ? svg.getBoundingClientRect().width / box.width : 1); })""")
    assert min(sizes) >= 11
    for width in range(320, 400, 10):
        opened.resize(width)
        lines = opened.js("[...document.querySelectorAll('.decision .whole')].map((e) => e.getClientRects().length)")
        assert lines == [1], "the interval is not broken"


def test_how_leads_to_the_provenance(opened: Browser, pages: dict[str, Path], tmp_path: Path) -> None:
    show(opened, pages["24"], tmp_path)
    opened.js("document.querySelector('#decide a[href=\"#how\"]').click()")
    opened.until("document.querySelector('#how').getBoundingClientRect().top < innerHeight")
    assert "max-T" in opened.js("document.querySelector('#how + dd').textContent")
    assert opened.js("document.querySelector('#how').closest('details').open")


def test_a_page_of_24_configurations_is_short(opened: Browser, pages: dict[str, Path], tmp_path: Path) -> None:
    show(opened, pages["24"], tmp_path)
    assert opened.js("document.documentElement.scrollHeight") < 6000
    opened.js("dispatchEvent(new Event('beforeprint'))")  # nothing is lost: what is folded is there
    assert opened.js("document.querySelectorAll('#differences .matrix tbody tr').length") >= 24
    assert opened.js("document.querySelector('#configurations-table').getBoundingClientRect().height") > 24 * 20


def test_rows_are_sorted_by_mean_and_a_click_turns_them(opened: Browser, pages: dict[str, Path], tmp_path: Path) -> None:
    show(opened, pages["24"], tmp_path)
    means = "[...document.querySelectorAll('#summary-table .named tr:not(.group)')].map((r) => Number(r.cells[1].dataset.v))"
    found = opened.js(means)
    assert found == sorted(found, reverse=True)
    opened.js("document.querySelector('#summary-table th[aria-sort]').click()")
    assert opened.js(means) == sorted(found)


def test_rows_are_filtered_by_name_and_brick(
    opened: Browser, documents: dict[str, Any], pages: dict[str, Path], tmp_path: Path
) -> None:
    show(opened, pages["24"], tmp_path)
    configurations = documents["24"]["configurations"]
    total = len(configurations)
    assert opened.js("document.getElementById('filter-count').textContent") == f"{total} rows"

    def chosen(name: str, brick: str) -> list[str]:
        opened.js(f"""(() => {{ for (const [id, value] of [['name', {name!r}], ['brick', {brick!r}]]) {{
            const e = document.getElementById('filter-' + id); e.value = value; e.dispatchEvent(new Event('input')); }} }})()""")
        shown: list[str] = opened.js(
            f"{ROWS}.filter((r) => r.getBoundingClientRect().height > 0).map((r) => r.cells[0].title.split(':')[0])"
        )
        return sorted(shown)

    by_name = sorted(c["name"] for c in configurations if "ties" in c["name"])
    assert chosen("TIES", "") == by_name
    with_brick = sorted(c["name"] for c in configurations if "dates" in c["parents"])
    assert 0 < len(with_brick) < total
    assert chosen("", "dates") == with_brick
    assert opened.js("document.getElementById('filter-count').textContent") == f"{len(with_brick)} of {total} rows"
    assert chosen("ties", "dates") == sorted(set(by_name) & set(with_brick))
    assert chosen("no such name", "") == []
    assert len(chosen("", "")) == total


def test_a_point_says_its_values(opened: Browser, pages: dict[str, Path], tmp_path: Path) -> None:
    show(opened, pages["alike"], tmp_path)
    opened.hover("#decide .scatter g.named .point")
    opened.until("!document.getElementById('tip').hidden")
    assert "Mean over skills" in opened.js("document.getElementById('tip').textContent")
    opened.hover("h1")


@pytest.mark.parametrize("name", ["methods", "seeds"])
def test_the_curves_begin_on_the_first_screen(
    name: str, opened: Browser, documents: dict[str, Any], pages: dict[str, Path], tmp_path: Path
) -> None:
    show(opened, pages[name], tmp_path)
    charts = "[...document.querySelectorAll('#sweeps svg.curves')]"
    assert opened.js(f"{charts}.map((c) => c.getAttribute('aria-label'))") == ["ties", "dare", "task_arithmetic"] * 2
    assert opened.js(f"{charts}.map((c) => c.querySelectorAll('.dot').length)") == [4] * 6
    assert opened.js(f"{charts}.map((c) => c.querySelectorAll('.ends').length)") == [4] * 6
    assert opened.js("document.querySelectorAll('#sweeps .multiples .ring').length") == 2, "the recommended point in each measure"
    assert 0 < opened.js("document.querySelector('.decision').getBoundingClientRect().bottom") <= 900
    assert opened.js("document.querySelector('#sweeps h3.measure').getBoundingClientRect().bottom") <= 900
    assert opened.js("document.querySelectorAll('#leaders-table tbody tr').length") <= 3
    rows = opened.js("document.querySelectorAll('#summary-table .named tr:not(.group)').length")
    assert rows == len([c for c in documents[name]["configurations"] if c["role"] == "configuration"]), (
        "the rows stay in the table"
    )


def test_a_point_of_a_curve_says_its_values(
    opened: Browser, documents: dict[str, Any], pages: dict[str, Path], tmp_path: Path
) -> None:
    show(opened, pages["methods"], tmp_path)
    (sweep,) = documents["methods"]["sweeps"]
    first = next(p for p in sweep["points"] if p["values"] == {"mix.lambda": 0.25, "mix.merge": "ties"})["levels"]["mean"]
    said = opened.js("document.querySelector('#sweeps svg.curves .hit title').textContent")
    assert said == f"lambda 0.25, ties\n{100 * first['value']:.1f} [{100 * first['low']:.1f}, {100 * first['high']:.1f}]"
