"""The report without a browser: what stands in the three files, escaping, size, no outside resource."""

from __future__ import annotations

import base64
import contextlib
import copy
import csv
import gzip
import html
import io
import json
import locale
import re
from pathlib import Path

import pytest

from worlds.report_document import TASKS, make_document, make_large
from worlds.report_page import Document, Page, render, rendered, view_of

from workbench.ground.errors import WorkbenchError, printable
from workbench.ground.numbers import MINUS, MISSING, about, fixed, p_value, seconds, signed
from workbench.ground.tables import as_markdown, fence
from workbench.report.files import packed_in
from workbench.report.forest import axis
from workbench.report.numbers import POINTS, Unit, unit_of
from workbench.report.wording import missing_controls, without_average

SECTIONS = ("summary", "forest", "differences", "interference", "flips", "configurations", "provenance", "warnings")
EVIL = "=1+1\x1b[31m\x9b2J</script><img src=x onerror=alert(1)>\"'`|{{7*7}}\N{RIGHT-TO-LEFT OVERRIDE}\N{SNOWMAN}&amp;"


def packed(text: str) -> Document:
    found = re.search(r'id="flip-data">([^<]*)</script>', text)
    assert found
    payload: Document = json.loads(gzip.decompress(base64.b64decode(found[1])))
    return payload


@pytest.mark.parametrize("name", ["starter", "starter.html", "v0.5", "deep/er/starter"])
def test_writes_three_files_beside_each_other(name: str, document: Document, tmp_path: Path) -> None:
    paths = render(document, tmp_path / name)
    stem = name.removesuffix(".html").split("/")[-1]
    assert [p.name for p in paths] == [f"{stem}.html", f"{stem}.md", f"{stem}.json"]
    assert sorted(p.name for p in paths[0].parent.iterdir()) == sorted(p.name for p in paths)  # nothing left over
    assert json.loads(paths[2].read_text("utf-8")) == view_of(document).to_dict()


def test_same_document_gives_the_same_bytes(document: Document, text: str, tmp_path: Path) -> None:
    assert rendered(document, tmp_path)[0] == text


def test_page_has_every_section_and_one_panel_a_task(text: str) -> None:
    page = Page(text)
    assert set(SECTIONS) <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert text.count('class="plot"') == len(TASKS)


def test_differences_table_holds_the_documents_numbers(document: Document, text: str) -> None:
    _, *rows = Page(text).tables["rows-table"]
    assert len(rows) == len(document["rows"])
    for row, d in zip(rows, document["rows"], strict=True):
        assert row[:2] == [d["configuration"], d["task"]]
        assert row[2] == signed(100 * d["diff"], 1)
        assert row[3] == f"[{signed(100 * d['low'], 1)}, {signed(100 * d['high'], 1)}]"
        assert row[4] == f"[{signed(100 * d['low_adj'], 1)}, {signed(100 * d['high_adj'], 1)}]"
        assert row[5].strip() == d["verdict"]
        assert row[6] == (f"≈ {about(d['needs'])}" if d["needs"] else "")
        assert row[9:11] == [fixed(100 * d["value"], 1), fixed(100 * d["baseline_value"], 1)]
        assert row[11:13] == [str(d["n"]), str(d["clusters"])]


def test_summary_sets_controls_apart_and_shows_scores_and_kept(document: Document, text: str) -> None:
    rows = Page(text).tables["summary-table"]
    names = [row[0] for row in rows]
    heads = [names.index("Configurations"), names.index("Controls, tested separately")]
    by_name = {c["name"]: c for c in document["configurations"]}
    for i, row in enumerate(rows):
        if i in (0, *heads):
            continue
        found = max((n for n in by_name if row[0].startswith(n)), key=len)
        c = by_name[found]
        assert (i < heads[1]) == (c["role"] == "configuration")
        assert row[1].startswith(fixed(100 * c["mean"]["value"], 1))
        assert [cell.strip() for cell in row[3 : 3 + len(TASKS)]] == [fixed(100 * c["scores"][t]["value"], 1) for t in TASKS]
        assert row[3 + len(TASKS)].startswith(f"{100 * c['kept_mean']['value']:.0f} [" if c["kept_mean"] else MISSING)


def test_interference_matrix_and_losing_pair(document: Document, text: str) -> None:
    _, *rows = Page(text).tables["Each brick alone minus the base, by task"]
    diffs = document["interference"]["diff"]
    assert [row[0] for row in rows] == document["interference"]["bricks"]
    for row, line in zip(rows, diffs, strict=True):
        assert all(c.startswith(signed(100 * v, 1)) for c, v in zip(row[1:], line, strict=True))
    assert "dates-eu on dates-us" in text
    assert "dates-us on dates-eu" in text


def test_forest_marks_say_their_values(document: Document, text: str) -> None:
    titles = Page(text).titles
    for d in document["rows"]:
        said = next(t for t in titles if t.startswith(f"{d['configuration']} on {d['task']}: {d['verdict']}"))
        assert f"Difference {signed(100 * d['diff'], 1)} points" in said
        assert f"{d['wins']} gained, {d['losses']} lost" in said


def test_changed_items_are_packed_without_loss(document: Document, text: str) -> None:
    payload = packed(text)
    assert len(payload["flips"]) == sum(len(rows) for rows in document["flips"].values())
    wanted = {(c, f["task"], f["id"]): f for c, rows in document["flips"].items() for f in rows}
    for c, i, direction, answer in payload["flips"]:
        task, name, cluster, prompt, gold, choices, before = payload["items"][i]
        flip = wanted[payload["configurations"][c], task, name]
        assert [cluster, prompt, gold, choices] == [flip[k] for k in ("cluster", "prompt", "gold", "choices")]
        assert answer[:2] == [flip["configuration"]["response"], flip["configuration"]["metrics"]]
        assert before[:2] == [flip["baseline"]["response"], flip["baseline"]["metrics"]]
        metric = TASKS[task][0]
        gained = flip["configuration"]["metrics"][metric] > flip["baseline"]["metrics"][metric]
        assert direction == ("gained" if gained else "lost")


def test_nothing_is_requested(text: str) -> None:
    page = Page(text)
    assert all(r.startswith("#") or r == "data:," for r in page.resources), page.resources
    assert not {"img", "iframe", "object", "embed", "audio", "video", "base", "form"} & set(page.tags)
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    script = text[text.rindex("<script>") :]
    assert not re.search(r"\b(fetch|XMLHttpRequest|WebSocket|EventSource|sendBeacon|import)\b", script)
    assert "default-src 'none'" in text
    assert "http" not in re.sub(r"http-equiv|http://www\.w3\.org/2000/svg", "", text)


def test_axes_of_bricks_stand_below_the_configurations(document: Document, tmp_path: Path) -> None:
    """One row a brick, in the page and in Markdown; a brick that states another axis gets its column."""
    known = json.loads(json.dumps(document))
    known["configurations"][0]["axes"] = {
        "add": {"origin": "customized", "computation": "low_rank_update"},
        "math": {"origin": "emergent", "routing": "token"},
    }
    text, markdown = rendered(known, tmp_path)
    assert Page(text).tables["axes-table"] == [
        ["Brick", "origin", "computation", "routing"],
        ["add", "customized", "low rank update", "–"],
        ["math", "emergent", "–", "token"],
    ]
    assert "| math | emergent |" in markdown
    assert "axes-table" not in rendered(document, tmp_path)[0]


def test_user_text_is_escaped_everywhere(document: Document, tmp_path: Path) -> None:
    evil: Document = json.loads(json.dumps(document).replace("starter-ties", "NAME"))
    evil = json.loads(json.dumps(evil).replace('"triage"', '"TASK"'))
    evil = json.loads(json.dumps(evil).replace("NAME", json.dumps(EVIL)[1:-1]).replace("TASK", json.dumps(EVIL)[1:-1]))
    for c in evil["configurations"]:
        c["recipe_text"] = EVIL if c["recipe_text"] else None
        c["bricks"] = {EVIL: 3}
        c["axes"] = {EVIL: {"origin": EVIL, EVIL: EVIL}}
        c["check"] = [{"scorer": EVIL, "documents": 8, "max_difference": 1e-6, "tolerance": 1e-4, "spread": None}]
        c["forgetting"] = {"diff": -0.1, "low": -0.2, "high": 0.0, "verdict": "worse"}
    for row in evil["rows"]:
        row["companion"] = {
            "metric": EVIL,
            "unit": EVIL,
            "value": 1,
            "baseline_value": 0.5,
            "diff": 0.5,
            "low": 0.1,
            "high": 0.9,
            "p": 1,
        }
    evil["tasks"][0]["contrast"] = {"of": EVIL, "minus": EVIL}
    for rows in evil["flips"].values():
        for flip in rows:
            flip["prompt"], flip["gold"] = EVIL, EVIL
    evil["warnings"] = [EVIL]
    evil["provenance"] |= {"command": EVIL, "scorers": {EVIL: EVIL}, "suites": [EVIL], "versions": {EVIL: EVIL}, "device": EVIL}
    evil["provenance"]["plans"] = [EVIL]
    text, markdown = rendered(evil, tmp_path)
    page = Page(text)  # also refuses event attributes
    assert page.tags.count("script") == 3  # the changed items and the files of the buttons are packed texts
    assert "img" not in page.tags
    assert html.escape(printable(EVIL), quote=False).split("&gt;")[0] in text
    files = {f"{name}.{kind}": content for name, of in packed_in(text).items() for kind, content in of.items()}
    assert not [name for name, content in {**files, "html": text, "md": markdown}.items() if printable(content) != content]
    cells = [cell for name in files if name.endswith(".csv") for row in csv.reader(io.StringIO(files[name])) for cell in row]
    assert not [cell for cell in cells if cell[:1] in tuple("=+-@") and not re.fullmatch(r"-?[\d.]+(e-?\d+)?", cell)]
    assert f"'{printable(EVIL)}" in cells
    assert packed(text)["items"][0][3] == EVIL
    plain = re.sub(r"(?ms)^(`{3,}).*?^\1$", "", markdown)  # code blocks show text as it is
    assert "<img" not in plain
    assert "</script" not in plain
    rows = [line for line in plain.splitlines() if line.startswith("| ")]
    widths = {len(re.findall(r"(?<!\\)\|", line)) for line in rows}
    assert len(widths) <= 7  # one width a table: no cell opens another column


def test_size_when_ten_configurations_change_each_of_two_thousand_items(tmp_path: Path) -> None:
    big = make_large()
    assert [len(rows) for rows in big["flips"].values()] == [2000] * 10
    page, *_ = render(big, tmp_path / "big")
    assert page.stat().st_size < 2_000_000


def test_markdown_holds_the_same_tables(document: Document, tmp_path: Path) -> None:
    before = locale.setlocale(locale.LC_TIME)
    with contextlib.suppress(locale.Error):  # where it is not installed, the date alone is checked
        locale.setlocale(locale.LC_TIME, "tr_TR.utf8")
    try:
        _, markdown = rendered(document, tmp_path)
    finally:
        locale.setlocale(locale.LC_TIME, before)
    assert "24 November 2026, 09:30 UTC" in markdown
    rows = [[c.strip() for c in line.strip("| ").split("|")] for line in markdown.splitlines() if line[:2] == "| "]
    found = {(r[0], r[1]): r for r in rows if len(r) == 17}
    for d in document["rows"]:
        row = found[as_markdown(d["configuration"]), as_markdown(d["task"])]
        assert row[5] == signed(100 * d["diff"], 1)
        assert row[14].startswith(d["verdict"])
        assert row[15] == (MISSING if d.get("stands_up_to") is None else fixed(100 * d["stands_up_to"], 1))
        assert row[16].split(",")[0] == {"controls": "control"}.get(d["family"], d["family"])
    assert "## Provenance" in markdown
    assert document["provenance"]["command"] in markdown


@pytest.mark.parametrize("role", ["base", "brick", "average"])
def test_a_missing_control_is_said_loudly(role: str, document: Document, tmp_path: Path) -> None:
    lacking = copy.deepcopy(document)
    lacking["configurations"] = [c for c in lacking["configurations"] if c["role"] != role]
    text, markdown = rendered(lacking, tmp_path)
    assert 'id="missing"' in text
    assert "**Control missing.**" in markdown


def test_controls_that_are_there_are_not_missed(document: Document, text: str) -> None:
    view = view_of(document)
    assert missing_controls(view) == []
    assert without_average(view) == ["dates-eu and dates-us"]
    assert 'id="missing"' not in text
    renamed = copy.deepcopy(document)
    for c in renamed["configurations"]:
        if c["name"] == "add":
            c["name"], c["aliases"] = "addition", ["add"]
    assert missing_controls(view_of(renamed)) == [], "a parent is known by its alias"


def test_nulls_and_infinities(document: Document, tmp_path: Path) -> None:
    bare = copy.deepcopy(document)
    for row in bare["rows"]:
        row |= dict.fromkeys(("low", "high", "low_adj", "high_adj", "p", "p_adj", "mde", "needs"))
    bare["rows"][0] |= {"diff": None, "value": None}
    bare["rows"][1] |= {"low_adj": float("-inf"), "p": float("nan")}
    for c in bare["configurations"]:
        c |= {"mean": None, "kept": {}, "kept_mean": None, "recipe_text": None}
    text, _ = rendered(bare, tmp_path)
    assert "nan" not in re.sub(r"<script.*?</script>|<style.*?</style>", "", text, flags=re.DOTALL).lower().split()
    assert json.loads((tmp_path / "report.json").read_text("utf-8"))["rows"][1]["p"] is None


def test_a_damaged_comparison_is_named_with_its_place(document: Document) -> None:
    damaged = copy.deepcopy(document)
    del damaged["rows"][2]["task"]
    with pytest.raises(WorkbenchError, match=r"made: rows\.2\.task: Field required"):
        view_of(damaged)


def test_metrics_that_are_no_shares_keep_their_own_unit(document: Document, tmp_path: Path) -> None:
    raw = copy.deepcopy(document)
    for row in raw["rows"]:
        if row["task"] == "add":
            row |= {"value": 12.5, "baseline_value": 10.25, "diff": 2.25}
    view = view_of(raw)
    assert unit_of(view, "add") == Unit(1.0, 2, "")
    assert unit_of(view, "reverse") == POINTS
    assert "+2.25<" in rendered(raw, tmp_path)[0]


def test_a_configuration_as_the_baseline_is_not_judged(document: Document, tmp_path: Path) -> None:
    other = copy.deepcopy(document)
    other["baseline"] = "starter-ties"
    other["rows"] = [r for r in other["rows"] if r["configuration"] != "starter-ties"]
    text, _ = rendered(other, tmp_path)
    assert "<h1>3 configurations compared with starter-ties</h1>" in text
    assert "<dt>starter-ties</dt>" not in text


def test_axis_has_zero_and_round_ticks() -> None:
    empty = axis([], POINTS)
    assert 0.0 in empty.ticks(100)
    wide = axis(view_of(make_document()).rows, POINTS)
    assert wide.low >= -1
    assert wide.high <= 1
    assert all(abs(100 * t - round(100 * t)) < 1e-9 for t in wide.ticks(100))


def test_how_numbers_are_written() -> None:
    assert [signed(x, 1) for x in (0.04, -0.04, 1.25, -3.0)] == ["0.0", "0.0", "+1.2", MINUS + "3.0"]
    assert [p_value(p) for p in (None, 0.00099, 0.001, 0.05)] == [MISSING, "<0.001", "0.001", "0.050"]
    thousands = "7\N{NARROW NO-BREAK SPACE}200"
    assert [about(n) for n in (None, 7, 95, 99.6, 101, 712, 7154, 7200)] == [
        MISSING, "7", "95", "100", "110", "720", thousands, thousands,
    ]  # fmt: skip
    assert [seconds(s) for s in (None, 0.84, 9.94, 10, 59.4, 59.6, 65, 3599.4, 3599.6, 7860)] == [
        MISSING, "0.8 s", "9.9 s", "10 s", "59 s", "1 min 00 s", "1 min 05 s", "59 min 59 s", "1 h 00 min", "2 h 11 min",
    ]  # fmt: skip
    assert fence("a ``` b").startswith("````\n")


def test_an_end_of_an_interval_keeps_its_side_of_zero() -> None:
    """A row that is worse has an interval below zero, also where its nearer end rounds to zero."""
    assert POINTS.diffs(-0.103, -0.0001) == f"[{MINUS}10.3, {MINUS}0.0]"
    assert (POINTS.diffs(1e-9, 0.02), POINTS.diffs(0.0, 0.02)) == ("[+0.0, +2.0]", "[0.0, +2.0]")
    assert POINTS.around(-0.103, -0.0001) == f"{MINUS}10.3 to {MINUS}0.0"
    assert (POINTS.diff(-0.0001), POINTS.diffs(None, 0.0)) == ("0.0", "")
