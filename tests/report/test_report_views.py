"""The report's views of newer keys: metrics in their own unit, what cannot be told, forgetting, sizes, fronts, self-check."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from worlds.report_additions import BRICK_BYTES, add_own_units
from worlds.report_document import make_document
from worlds.report_page import Document, Page, rendered, view_of

from workbench.compare.comparison import ChangedItem, StoredAnswer
from workbench.ground.numbers import MISSING, about, amount, fixed, signed, size, small
from workbench.report.items import direction
from workbench.report.numbers import Unit, raw, unit_of
from workbench.report.provenance import self_check
from workbench.report.scatter import front, scatters
from workbench.report.wording import diff_pair, what


@pytest.fixture(scope="module")
def own_units() -> Document:
    document = make_document()
    add_own_units(document)
    return document


def test_lower_ratio_and_contrast_are_drawn_in_their_own_units(own_units: Document, tmp_path: Path) -> None:
    view = view_of(own_units)
    assert unit_of(view, "curve") == Unit(1.0, 3, "")
    assert unit_of(view, "prose") == Unit(1.0, 3, "bits per byte")
    text, markdown = rendered(own_units, tmp_path)
    page = Page(text)
    by_name = {(d["configuration"], d["task"]): d for d in own_units["rows"]}
    for task in ("curve", "prose", "gain"):
        d = by_name["add", task]
        said = next(t for t in page.titles if t.startswith(f"add on {task}: better"))
        assert f"Difference {signed(d['diff'], 3)}" in said
        assert ("Lower is better" in said) == (task != "gain")
        assert f"Score {fixed(d['value'], 3)}, base {fixed(d['baseline_value'], 3)}" in said
    assert "curve \N{MINUS SIGN} curve-told" in text
    assert "gain is curve minus curve-told" in text
    assert "670 items in total" in text  # a contrast has no items of its own
    rows = {(r[0], r[1]): r for r in page.tables["rows-table"][1:]}
    assert rows["dates-conflict", "prose"][5].strip() == "worse"
    assert rows["dates-conflict", "prose"][2] == signed(by_name["dates-conflict", "prose"]["diff"], 3)
    assert "prose (lower is better)" in markdown


@pytest.mark.parametrize(
    ("task", "before", "after", "expected"),
    [
        ("add", 0.0, 1.0, "gained"),
        ("curve", 0.5, 0.2, "gained"),
        ("curve", 0.2, 0.5, "lost"),
        ("prose", [-30.0, 20], [-24.0, 20], "gained"),
        ("prose", [-30.0, 20], [-33.0, 20], "lost"),
        ("prose", [-30.0, 20], [-30.0, 20], "other"),
        ("add", None, 1.0, "other"),
    ],
)
def test_direction_of_a_change(task: str, before: Any, after: Any, expected: str, own_units: Document) -> None:
    named = view_of(own_units).task(task)
    assert named
    answers = {
        k: StoredAnswer(response=None, metrics={} if v is None else {named.metric: v}, loglikelihoods=None)
        for k, v in (("baseline", before), ("configuration", after))
    }
    item = ChangedItem(task=task, id="1", cluster="1", prompt="", gold=None, choices=None, **answers)
    assert direction(item, named) == expected


def test_undecided_differences_say_what_would_show_and_how_many_items(document: Document, text: str) -> None:
    _, *rows = Page(text).tables["undecided-table"]
    named = {c["name"] for c in document["configurations"] if c["role"] == "configuration"}
    found = [d for d in document["rows"] if d["configuration"] in named and d["verdict"] in ("cannot tell", "not shown safe")]
    assert len(found) > 5
    by_name = {(r[0], r[1]): r for r in rows}
    assert len(by_name) == len(rows) == len(found)
    for d in found:
        row = by_name[d["configuration"], d["task"]]
        assert row[2].strip() == d["verdict"]
        assert row[4] == f"±{fixed(100 * d['mde'], 1)} points"
        assert row[5:7] == [str(d["n"]), f"≈ {about(d['needs'])}"]
        margin = d["companion"]
        ends = f"[{signed(margin['low'], 2)}, {signed(margin['high'], 2)}] nats" if margin else ""
        assert row[7] == (f"{signed(margin['diff'], 2)} {ends}" if margin else MISSING)


def test_forgetting_stands_beside_the_retention_tasks(document: Document, text: str) -> None:
    _, *rows = Page(text).tables["forgetting-table"]
    by_name = {row[0]: row for row in rows}
    forgotten = {c["name"]: c["forgetting"] for c in document["configurations"] if c["forgetting"]}
    assert set(by_name) == set(forgotten)
    for name, f in forgotten.items():
        assert by_name[name][1].startswith(f"{signed(100 * f['diff'], 1)} [{signed(100 * f['low'], 1)}, ")
        assert by_name[name][3].strip() == f["verdict"]
        diff = next(d["diff"] for d in document["rows"] if (d["configuration"], d["task"]) == (name, "retention"))
        assert by_name[name][4].startswith(signed(100 * diff, 1))


def test_configurations_with_their_sizes(document: Document, text: str) -> None:
    _, *rows = Page(text).tables["configurations-table"]
    by_name = {row[0]: row for row in rows}
    assert by_name["starter-ties"][3:6] == ["3.36\N{NO-BREAK SPACE}M", "6.71\N{NO-BREAK SPACE}MB", "25 s"]
    assert by_name["dates-conflict"][2] == "".join(f"{b} {size(BRICK_BYTES)}" for b in ("dates-eu", "dates-us"))
    assert [row[0] for row in rows[:4]] == [c["name"] for c in document["configurations"] if c["role"] == "configuration"]
    assert by_name["base"][2] == MISSING


def test_front_is_what_no_other_point_beats() -> None:
    rng = np.random.default_rng(3)
    points = [(float(x), float(y)) for x, y in rng.integers(0, 12, (40, 2))]
    best, expected = float("-inf"), set()
    for x in sorted({p[0] for p in points}, reverse=True):  # a sweep from the right: each new height is on the front
        height = max(y for a, y in points if a == x)
        if height > best:
            best = height
            expected.add((x, height))
    assert {p for p, on in zip(points, front(points), strict=True) if on} == expected
    assert front([(1.0, 1.0), (1.0, 1.0)]) == [True, True]


def test_scatter_plots_place_what_is_better_higher_and_know_the_direction(document: Document) -> None:
    skills, sizes = scatters(view_of(document))
    means = {c["name"]: c["mean"]["value"] for c in document["configurations"]}
    retention = {c["name"]: c["scores"]["retention"]["value"] for c in document["configurations"]}
    marks = re.findall(
        r'<g class="mark[^"]*"><title>([^\n]+)\n.*?<circle class="point" cx="([\d.]+)" cy="([\d.]+)"', skills.drawing, re.DOTALL
    )
    assert {name for name, *_ in marks} == set(means)
    assert sorted(means, key=means.__getitem__) == [n for n, *_ in sorted(marks, key=lambda m: -float(m[2]))]
    assert float(np.corrcoef([retention[n] for n, *_ in marks], [float(x) for _, x, _ in marks])[0, 1]) > 0.9999
    beaten = {a for a in means for b in means if means[b] > means[a] and retention[b] > retention[a]}
    assert not beaten & set(skills.front)
    assert max(means, key=means.__getitem__) in skills.front
    assert "over-scaled" not in sizes.front  # the largest, and the lowest mean
    same = copy.deepcopy(document)
    for c in same["configurations"]:
        c["parameters"] = 7
    assert [s.title for s in scatters(view_of(same))] == [skills.title]


def test_retention_where_lower_is_better_is_drawn_the_other_way_round(own_units: Document) -> None:
    other = copy.deepcopy(own_units)
    other["tasks"] = [
        t | {"role": {"prose": "retention", "retention": "other"}.get(t["task"], t["role"])} for t in other["tasks"]
    ]
    found = scatters(view_of(other))[0]
    assert "prose, bits per byte (lower is better)" in found.drawing
    lowest = min(other["configurations"], key=lambda c: c["scores"]["prose"]["value"])
    assert lowest["name"] in found.front


def test_self_check(document: Document, text: str) -> None:
    _, *rows = Page(text).tables["check-table"]
    checks = {c["name"]: c["check"][0] for c in document["configurations"]}
    assert {row[0] for row in rows} == set(checks)
    for row in rows:
        assert row[1:6] == ["starter", "packed", row[0], "8", small(checks[row[0]]["max_difference"])]
        assert row[8] == "within tolerance"
    assert "starter: packed" in text
    failing = copy.deepcopy(document)
    failing["configurations"][3]["check"][0]["max_difference"] = 0.5
    failing["configurations"][4]["check"] = [None]
    said = self_check(view_of(failing))
    assert f"Above the tolerance: {failing['configurations'][3]['name']}." in said
    assert f"Not checked: {failing['configurations'][4]['name']}." in said
    assert "largest difference is 0.5" in said
    assert "The whole check ran on" not in said
    failing["configurations"][2]["check"][0]["whole"] = "base"
    assert "The whole check ran on base;" in self_check(view_of(failing))
    for c in failing["configurations"]:
        c["check"] = [None]
    failing["provenance"]["scorers"] = {"starter": "hflm"}
    assert "no check is needed" in self_check(view_of(failing))


def test_partial_scores_are_said_at_the_top(document: Document, tmp_path: Path) -> None:
    partial = copy.deepcopy(document)
    partial["warnings"] = ["Partial: --limit cut the number of items; these scores are for a quick look only."]
    text, _ = rendered(partial, tmp_path)
    assert text.index('id="partial"') < text.index('id="summary"')


def test_which_recipes_are_compared_first(document: Document) -> None:
    assert diff_pair(view_of(document)) == ("starter-task-arithmetic", "starter-ties")
    assert diff_pair(view_of({**document, "baseline": "over-scaled"})) == ("over-scaled", "starter-task-arithmetic")
    words = {c.name: what(c) for c in view_of(document).configurations}
    assert words["base"] == "the base without bricks"
    assert words["add"] == "the brick add alone on the base"
    assert words["average"] == "the plain average of add, reverse and triage"


def test_how_sizes_are_written() -> None:
    space = "\N{NO-BREAK SPACE}"
    assert [amount(v) for v in (None, 0, 512, 999_600, 3_148_800, 12_340_000, 7_241_000_000)] == [
        MISSING, "0", "512", f"1.00{space}M", f"3.15{space}M", f"12.3{space}M", f"7.24{space}B",
    ]  # fmt: skip
    bounds = (999.4, 999.5, 9_994, 9_995, 99_940, 99_950, 999_400, 1e12, 1e15)
    assert [amount(v).replace(space, " ") for v in bounds] == [
        "999", "1.00 K", "9.99 K", "10.0 K", "99.9 K", "100 K", "999 K", "1.00 T", "1000 T",
    ]  # fmt: skip
    assert [size(v) for v in (96, 412_160, 16_100_000_000)] == [f"96{space}B", f"412{space}kB", f"16.1{space}GB"]
    assert [raw(v).decimals for v in (0.0, 1e-7, 0.004, 0.1, 0.25, 1.0, 1.3, 10.0, 12.0, 1e3, 12e3)] == [
        3,
        6,
        5,
        3,
        3,
        3,
        3,
        2,
        2,
        0,
        0,
    ]
