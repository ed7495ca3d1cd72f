"""The first screen of the report: the recommendation with its reason, the leaders, the scatter; and how long a page of many is."""

from __future__ import annotations

import copy
import html
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from worlds.decided import SITUATIONS, many, situation
from worlds.report_document import make_document
from worlds.report_page import Document, Page, rendered, view_of

from workbench.report.decision import SENTENCES, SHOWN, leaders, leading
from workbench.report.forest import panels
from workbench.report.provenance import glossary


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Document]:
    return {name: situation(name).to_dict() for name in SITUATIONS}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Document:
    return many().to_dict()


def first_screen(page: str) -> str:
    return page[page.index('<div class="first"') : page.index("<nav")]


@pytest.mark.parametrize("name", SITUATIONS)
def test_page_and_markdown_say_the_recommendation_of_the_comparison(
    name: str, documents: Mapping[str, Document], tmp_path: Path
) -> None:
    document = documents[name]
    found = document["recommendation"]
    page, markdown = rendered(document, tmp_path)
    screen = first_screen(page)
    for sentence in (found["text"], *found["details"], *found["help"]):
        assert re.sub(r"`([^`]+)`", r"<code>\1</code>", sentence) in re.sub(r'<span class="whole">(.*?)</span>', r"\1", screen)
        assert sentence.replace("\N{NARROW NO-BREAK SPACE}", " ").replace("[", "\\[").replace("]", "\\]") in markdown
    assert f'class="decision {"ship" if found["configuration"] else "none"}"' in screen
    assert markdown.index(found["text"][:30]) < markdown.index("## Summary")
    assert bool(found["command"]) == bool(found["configuration"])
    assert ("```sh\n" + "\n".join(found["command"]) in markdown) == bool(found["command"])
    shown = re.findall(r'<pre id="ship-command">(.*?)</pre>', screen) + re.findall(r"<code>(workbench \w+ .*?)</code>", screen)
    assert [html.unescape(line) for line in shown][: len(found["command"])] == found["command"]
    assert "max-T" not in screen
    assert ('<a href="#how">' in screen) == ('<dt id="how">' in page) == bool(found["family"]["pairs"])


def test_forest_plots_are_sorted_by_score(large: Document, tmp_path: Path) -> None:
    """Each task has the named configurations from the best on, then the controls, also where lower is better."""
    view = view_of(large)
    for panel in panels(view):
        own = {
            role: [line.difference for line in panel.lines if (line.difference.role == "configuration") == role]
            for role in (True, False)
        }
        assert [line.difference for line in panel.lines] == own[True] + own[False]
        for rows in own.values():
            values = [row.value or 0.0 for row in rows]
            assert values == sorted(values, reverse=True)
    first = next(t.name for t in view.tasks)
    turned = view_of({**large, "tasks": [{**t, "lower": t["task"] == first} for t in large["tasks"]]})
    values = [line.difference.value or 0.0 for line in panels(turned)[0].lines if line.difference.role == "configuration"]
    assert values == sorted(values)


def test_leaders_stand_in_a_table_with_verdicts_and_cost(documents: Mapping[str, Document], tmp_path: Path) -> None:
    _, *rows = Page(rendered(documents["alike"], tmp_path)[0]).tables["leaders-table"]
    assert [row[0] for row in rows] == ["wide", "lean"]
    assert rows[0][1:3] == ["69.0", "–"]
    assert rows[1][2].startswith("\N{MINUS SIGN}0.5 [")
    assert all("safe facts 0.0" in re.sub(r"\s+", " ", row[3]) for row in rows)
    assert [row[4].replace("\N{NO-BREAK SPACE}", " ") for row in rows] == ["full, 400 MB, 3 bricks", "adapter, 12.0 MB, 2 bricks"]


def test_the_scatter_stands_on_the_first_screen_with_the_recommended_point_marked(
    documents: Mapping[str, Document], tmp_path: Path
) -> None:
    screen = first_screen(rendered(documents["winner"], tmp_path)[0])
    assert screen.count('class="scatter"') == 1
    assert "Skills and retention" in screen
    assert 'class="front"' in screen
    rings = re.findall(
        r"<title>(\w+)\n[^<]*</title><circle[^>]*/?>(?:</circle>)?(?:<line[^>]*/?>(?:</line>)?)*<circle class=\"ring\"", screen
    )
    assert rings == ["ties"]
    labels = re.findall(r'<text class="name[^"]*"[^>]*>([^<]+)<', screen)
    assert "ties" in labels


def test_a_comparison_without_a_recommendation_shows_the_scatter(tmp_path: Path) -> None:
    document = make_document()
    assert "recommendation" not in document
    screen = first_screen(rendered(document, tmp_path)[0])
    assert leaders(view_of(document)) is None
    assert 'class="scatter"' in screen
    assert 'class="decision' not in screen
    assert dict(glossary(view_of(document)))["Not tested"]


def test_the_glossary_knows_the_tested_pairs(documents: Mapping[str, Document]) -> None:
    view = view_of(documents["alike"])
    terms = dict(glossary(view))
    assert "Not tested" not in terms
    assert terms["Leaders"].startswith(
        "The configuration with the highest mean over skills, controls among them, and all that are not shown to be worse"
    )
    assert "(21 pairs of " in terms["Leaders"]


def test_the_summary_is_sorted_by_mean(large: Document, tmp_path: Path) -> None:
    page = rendered(large, tmp_path)[0]
    rows = [row for row in Page(page).tables["summary-table"][2:] if len(row) > 3]
    named = [r for r in large["configurations"] if r["role"] == "configuration"]
    expected = sorted(named, key=lambda c: -c["mean"]["value"])
    found = [row[0] for row in rows[: len(named)]]
    assert all(text.startswith(c["name"]) for text, c in zip(found, expected, strict=True))
    assert page.count('aria-sort="descending"') == 1


def test_of_many_only_the_leaders_get_panels(large: Document, tmp_path: Path) -> None:
    view = view_of(large)
    names = leading(view)
    assert 1 <= len(names) <= SENTENCES
    page, markdown = rendered(large, tmp_path)
    forest = page[page.index('<section id="forest">') : page.index('id="rows-table"')]
    for c in view.judged:
        assert (f'title="{c.name}"' in forest) == (c.name in names)
    assert len(Page(page).tables["leaders-table"]) - 1 <= SHOWN
    assert all(f"| {name} |" in markdown for name in names)
    ids = Page(page).ids
    assert len(ids) == len(set(ids))


def test_the_filter_is_there_from_twenty_rows_on(large: Document, documents: Mapping[str, Document], tmp_path: Path) -> None:
    assert 'id="summary-filter"' in rendered(large, tmp_path / "large")[0]
    small = rendered(documents["winner"], tmp_path / "small")[0]
    assert 'id="summary-filter"' not in small


def test_user_text_in_a_recommendation_is_escaped(documents: Mapping[str, Document], tmp_path: Path) -> None:
    evil = "<img src=x onerror=alert(1)>"
    text = copy.deepcopy(documents["alike"])
    found: dict[str, Any] = text["recommendation"]
    found["text"] = f"Ship {evil}."
    found["details"] = [evil]
    page, markdown = rendered(text, tmp_path)
    assert "<img" not in page
    assert "<img" not in markdown


def test_a_recommended_one_outside_the_shown_leaders_has_a_row(large: Document) -> None:
    document = copy.deepcopy(large)
    found = document["recommendation"]
    last = found["candidates"][-1]["configuration"]
    found |= {"configuration": last, "closest": None, "leaders": [c["configuration"] for c in found["candidates"]]}
    shown = leaders(view_of(document))
    assert shown is not None
    assert [r.name for r in shown.rows][-1] == last
    assert len(shown.rows) == SHOWN
    assert shown.more == len(found["leaders"]) - SHOWN
