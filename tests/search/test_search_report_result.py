"""The page of a search names its result: a winner, a control under another name, no item changed, a control that no candidate beats."""

from __future__ import annotations

from pathlib import Path

import pytest

from worlds.report_page import Page
from worlds.search_document import CONTROLS, all_given_up, make_search
from worlds.search_page import Document, control, handmade, rendered, scored_row, view_of

from workbench.search.pages.wording import headline, sentences, tried


def test_winner_with_the_weights_of_a_control() -> None:
    document = handmade()
    document["test"]["rows"][1]["same_as"] = "base"
    view = view_of(document)
    assert headline(view).endswith(
        "50.0 %. The winner has the same weights as the best control, base.".replace(" %", "\N{NO-BREAK SPACE}%")
    )
    assert sentences(view) == [tried(view)]


def test_winner_with_the_weights_of_another_control() -> None:
    document = handmade()
    document["controls"].append(control("average", 0.1))
    document["test"]["rows"].insert(1, scored_row("average", "control", 0.1, 0.1, 0.0))
    document["test"]["rows"][2]["same_as"] = "average"
    assert headline(view_of(document)).endswith("cannot tell. The winner has the same weights as the control average.")


def test_no_item_changed(tmp_path: Path) -> None:
    document = handmade()
    document["test"]["rows"][1]["test"] = [0.25]
    line = document["test"]["against"]["trial-2"][0]
    line |= {"test": {"diff": 0.0, "low": 0.0, "high": 0.0, "p": 1.0, "clusters": 8}, "verdict": "no item changed"}
    text, markdown = rendered(document, tmp_path)
    told = "trial-2 scores 25.0\N{NO-BREAK SPACE}% and the best control, base, 25.0\N{NO-BREAK SPACE}%: no item changed."
    assert told in text
    assert told.replace("\N{NO-BREAK SPACE}", " ") in markdown
    assert 'class="word v-same">no item changed</span>' in text
    front = view_of(two_objectives_unchanged())
    assert "; with no item changed from task-arithmetic-1: " in sentences(front)[0]


def two_objectives_unchanged() -> Document:
    document = make_search(40, objectives=2)
    line = document["test"]["against"][document["front"][0]][0]
    line |= {
        "test": {"diff": 0.0, "low": 0.0, "high": 0.0, "p": 1.0, "clusters": 8},
        "verdict": "no item changed",
        "reason": None,
    }
    return document


def test_too_few_clusters_are_named() -> None:
    document = handmade()
    line = document["test"]["against"]["trial-2"][0]
    line |= {"reason": "too few clusters: 5, at least 8 needed"}
    assert headline(view_of(document)).endswith("cannot tell (too few clusters: 5, at least 8 needed).")
    line |= {"reason": "the interval includes 0"}
    assert headline(view_of(document)).endswith("cannot tell.")


def test_the_headline_counts_items_of_its_objective(one: Document) -> None:
    assert headline(view_of(one)).startswith("On 230 test items that the search did not use, ")


ROLES = {
    "brick": "brick triage",
    "base": "the base triage",
    "average": "the control triage",
    "configuration": "the untuned recipe triage",
    "random": "the random candidate triage",
}


@pytest.mark.parametrize("role", ROLES)
def test_no_candidate_beats_a_control(role: str, tmp_path: Path) -> None:
    """A finding with a page: scores of all controls, the history of the candidates, no winner."""
    document = all_given_up()
    document["unbeaten"][0]["role"] = role
    told = f"No candidate beats {ROLES[role]}, which scores 90.0 % on search items and 88.0 % on 230 test items that the search did not use."
    text, markdown = rendered(document, tmp_path)
    view = view_of(document)
    assert headline(view).replace("\N{NO-BREAK SPACE}", " ") == told
    assert told in markdown
    page = Page(text)
    assert {"result", "forest", "history", "importances", "parallel", "dimensions", "repeat"} - {"importances"} <= set(page.ids)
    _, best, *others = page.tables["tested-table"]
    assert best[:3] == ["triagebest control", "90.0", "88.0"]
    assert len(others) == len(CONTROLS) - 1
    assert sentences(view) == [
        "Of 10 candidates of the sampler tpe, 0 were scored on all 450 search items and 10 were stopped early."
    ]
    assert "winner" not in text.partition("<main>")[2].partition("<script>")[0]


def test_no_candidate_beats_the_front_of_the_controls(tmp_path: Path) -> None:
    document = all_given_up(objectives=2)
    document["unbeaten"].append({"name": "base", "role": "base", "search": [0.08, 0.95], "test": [0.07, 0.94]})
    text, _ = rendered(document, tmp_path)
    assert (
        "No candidate beats brick triage and the base: on search items, each scored candidate fell behind a control or a random candidate under every objective."
    ) in text


def test_warnings_of_the_search_stand_on_the_page(one: Document, tmp_path: Path) -> None:
    document = {**one, "warnings": ["task 'add' has <5> of its 10 clusters (`drawn: items`)"]}
    text, markdown = rendered(document, tmp_path)
    assert "<li>task &#39;add&#39; has &lt;5&gt; of its 10 clusters (<code>drawn: items</code>)</li>" in text
    assert "## Warnings" in markdown
    assert "of its 10 clusters (`drawn: items`)" in markdown
