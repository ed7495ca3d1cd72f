"""The report's verdicts of guarded tasks, its families, and rows on which no verdict can fall."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest

from worlds.report_additions import add_own_units
from worlds.report_document import TOLERANCE
from worlds.report_page import Document, Page, rendered, view_of

from workbench.compare.differences import VERDICTS
from workbench.ground.numbers import MINUS, fixed, signed
from workbench.report import wording
from workbench.report.marks import CLASSES
from workbench.report.numbers import POINTS
from workbench.report.provenance import glossary

REASON = (
    "no difference can be significant: even if all 10 changed clusters had changed in the same direction, the adjusted p would be 0.13; "
    "more clusters or fewer comparisons are needed"
)
SPACE = "\N{NO-BREAK SPACE}"


def row_of(document: Document, name: str, task: str = "retention") -> dict[str, Any]:
    found: dict[str, Any] = next(d for d in document["rows"] if (d["configuration"], d["task"]) == (name, task))
    return found


def closed(document: Document, task: str = "dates-us") -> Document:
    """The document where no verdict can fall on one task's open rows."""
    found = copy.deepcopy(document)
    for row in found["rows"]:
        if row["task"] == task and row["verdict"] == "cannot tell":
            row |= {"reason": REASON, "needs": None, "clusters": 10}
    return found


def test_a_loss_is_said_first_with_its_plain_interval(document: Document, text: str, tmp_path: Path) -> None:
    d = row_of(document, "over-scaled")
    d_text = f"over-scaled loses {fixed(-100 * d['diff'], 1)} points on retention"
    (told,) = wording.harm(view_of(document))
    assert told == f"{d_text} [{signed(100 * d['low'], 1)},{SPACE}{signed(100 * d['high'], 1)}]: worse than base."
    assert text.index(d_text) < text.index("Scored on")
    markdown = rendered(document, tmp_path)[1]
    assert markdown.index(d_text) < markdown.index("Scored on")


def test_losses_are_ranked_and_all_are_named(document: Document) -> None:
    many = copy.deepcopy(document)
    names = [c["name"] for c in many["configurations"] if c["role"] == "configuration"]
    for i, name in enumerate(names):
        row_of(many, name).update(verdict="worse", diff=-0.05 * (i + 1))
    told = wording.harm(view_of(many))
    assert [line.split()[0] for line in told] == [*reversed(names)][:3] + names[:1]
    assert told[3] == f"{names[0]} is worse than base on retention too."
    other = copy.deepcopy(document)
    row_of(other, "reverse")["verdict"] = "worse"
    assert [line.split()[0] for line in wording.harm(view_of(other))] == ["over-scaled"], "a control that lost is no headline"


def test_a_loss_where_lower_is_better(document: Document) -> None:
    other = copy.deepcopy(document)
    add_own_units(other)
    for t in other["tasks"]:
        if t["task"] == "prose":
            t |= {"role": "guarded", "tolerance": 0.01}
    for d in other["rows"]:
        if d["task"] == "prose":
            d |= {"family": "guarded", "tolerance": 0.01}
    view = view_of(other)
    told = " ".join(wording.harm(view))
    d = row_of(other, "dates-conflict", "prose")
    assert f"dates-conflict is {fixed(d['diff'], 3)} bits per byte above base on prose [" in told
    assert "], where lower is better: worse than base." in told
    row = next(r for r in view.rows if (r.configuration, r.task) == ("dates-conflict", "prose"))
    assert row.worst == d["high_adj"]


def test_on_a_guarded_task_the_summary_says_who_is_safe_and_what_would_help(document: Document) -> None:
    view = view_of(document)
    first = wording.sentences(view)[0]
    assert first.startswith("On retention (tolerance 5.0 points), over-scaled is worse than base; ")
    safe = [d["configuration"] for d in document["rows"] if d["verdict"] == "safe" and d["role"] == "configuration"]
    assert f"{' and '.join(safe)} are safe" in first
    d = row_of(document, "dates-conflict")
    assert (
        f"dates-conflict (a loss of up to {fixed(-100 * d['low_adj'], 1)} is possible; about {d['needs']} items needed) is not shown safe"
        in first
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"reason": "too few clusters: 6, at least 8 needed", "needs": 900}, "too few clusters: 6; about 900 items needed"),
        (
            {"reason": "the suite gives no tolerance for this metric", "tolerance": None, "needs": None},
            "the suite gives no tolerance",
        ),
        ({"low_adj": -0.07, "needs": 200}, "a loss of up to 7.0 is possible"),
        ({"low_adj": None, "needs": None}, "no loss can be ruled out"),
        (
            {"low_adj": 0.0, "reason": "no item changed, but 4 items say little", "needs": 9},
            "no item changed, but 4 items say little",
        ),
    ],
)
def test_why_a_row_is_not_shown_safe(change: dict[str, Any], said: str, document: Document) -> None:
    other = copy.deepcopy(document)
    row_of(other, "dates-conflict").update(change)
    view = view_of(other)
    (found,) = [d for d in view.rows if (d.configuration, d.task) == ("dates-conflict", "retention")]
    assert wording.lacking(view, found) == said


def test_every_verdict_has_a_mark_of_its_own(text: str) -> None:
    assert set(CLASSES) == set(VERDICTS)
    shapes = {name: re.search(rf'id="m-{name}"[^>]*>?(?:<path[^>]*>)*', text) for name in CLASSES.values()}
    assert all(shapes.values())
    drawn = [re.sub(r'id="[^"]*"', "", found[0]) for found in shapes.values() if found]
    assert len(set(drawn)) == len(VERDICTS)
    css = text[: text.index("</style>")]
    assert all(f".v-{name} {{ --c: var(--{name});" in css for name in CLASSES.values())


def test_legend_tally_and_matrix_show_the_words(text: str) -> None:
    legend = text[text.index('<section id="summary">') : text.index('id="summary-table"')]
    assert all(f"</svg> {word}</li>" in legend for word in VERDICTS)
    assert 'title="not shown safe: retention"' in text
    matrix = text[text.index('aria-label="Differences by configuration and task"') :]
    matrix = matrix[: matrix.index("</table>")]
    cells = re.findall(
        r'<td class="v-(\w+)[^>]*title="([\w-]+) on retention[^"]*"><b>[^<]*<svg class="glyph v-(\w+) gap"', matrix
    )
    assert len(cells) == 10
    assert all(cell == mark for cell, _, mark in cells)
    assert {mark for *_, mark in cells} == {"safe", "worse", "unshown"}


@pytest.mark.parametrize("lower", [False, True])
def test_the_tolerance_is_a_line_on_the_side_of_losses(lower: bool, document: Document, tmp_path: Path) -> None:
    other = copy.deepcopy(document)
    for t in other["tasks"]:
        t["lower"] = lower and t["task"] == "retention"
    page = rendered(other, tmp_path)[0]
    lines = re.findall(r'<line class="tolerance" x1="([\d.]+)%"', page)
    assert len(lines) == 1  # of one guarded task
    plot = page[page.rindex("<svg", 0, page.index('class="tolerance" x1="' + lines[0])) :]
    plot = plot[: plot.index("</svg>")]
    zero = float(re.findall(r'<line class="zero" x1="([\d.]+)%"', plot)[0])
    ticks = [float(x) for x in re.findall(r'<text class="tick" x="([\d.]+)%"', plot)]
    assert len(ticks) >= 2
    assert (float(lines[0]) > zero) == lower
    values = [float(v.replace(MINUS, "-")) for v in re.findall(r'<text class="tick"[^>]*>([^<]+)<', plot)]
    share = (ticks[-1] - ticks[0]) / (values[-1] - values[0])
    if not lower:  # a share where lower is better is drawn in its own unit
        assert (zero - float(lines[0])) / share == pytest.approx(POINTS.scale * TOLERANCE, abs=0.01)
    assert "tolerance of a guarded task" in page


def test_families_are_told_and_controls_are_apart(document: Document, text: str) -> None:
    family = document["family"]
    told = f"{family['compared']} comparisons in the main family; tested separately: {family['guarded']} on guarded tasks, {family['controls']} of controls"
    assert f"({told}); step-down max-T over sign flips of clusters at 5 % for each family" in text
    assert "Holm" not in text
    page = Page(text)
    head, *rows = page.tables["rows-table"]
    column = head.index("Family")
    words = {(r[0], r[1]): r[column] for r in rows}
    assert words["starter-ties", "add"] == "compared"
    assert words["starter-ties", "retention"] == "guarded"
    assert words["add", "retention"] == "guarded, control"
    assert words["add", "reverse"] == "control"
    apart = [t for t in page.titles if "A control: tested separately" in t]
    assert len(apart) == sum(d["role"] != "configuration" for d in document["rows"])


def test_glossary_explains_the_words(document: Document) -> None:
    terms = dict(glossary(view_of(document)))
    assert {"Safe", "Not shown safe", "Tolerance", "Family", "Adjusted interval"} <= set(terms)
    assert "retention 5.0 points" in terms["Tolerance"]
    assert "step-down max-T" in terms["Adjusted interval"]
    assert "flips the signs of whole clusters" in terms["Adjusted interval"]
    assert not any("Holm" in text for text in terms.values())
    document = copy.deepcopy(document)
    document["family"]["correction"] = "none"
    assert dict(glossary(view_of(document)))["Adjusted interval"].startswith("Not adjusted")


def test_where_no_verdict_can_fall_is_in_the_summary(document: Document, tmp_path: Path) -> None:
    other = closed(document)
    rows = [d for d in other["rows"] if d.get("reason") == REASON]
    named = [d for d in rows if d["role"] == "configuration"]
    assert 0 < len(named) < len(rows)
    view = view_of(other)
    told = wording.sentences(view)
    assert f"No difference can be significant in {len(named)} comparisons, on dates-us (10 clusters): " in told[-2]
    assert (
        f"No difference can be significant in {len(rows) - len(named)} comparisons of controls, on dates-us (10 clusters): "
        in told[-1]
    )
    assert all(line.endswith("More clusters or fewer comparisons are needed.") for line in told[-2:])
    page, markdown = rendered(other, tmp_path)
    for where in (page, markdown):
        assert "No difference can be significant in" in where
    undecided = {(r[0], r[1]): r for r in Page(page).tables["undecided-table"]}
    for d in named:
        row = undecided[d["configuration"], "dates-us"]
        assert [row[4], row[6]] == ["–", "more clusters or fewer comparisons"]
    other["configurations"] = [c for c in other["configurations"] if c["role"] != "configuration"]
    other["rows"] = [d for d in other["rows"] if d["role"] != "configuration"]
    (only,) = wording.sentences(view_of(other))
    assert "of controls" in only, "nothing else is compared"
