"""Tables and figures of a page as files: full precision, escaped, self-contained, and never over files of others."""

from __future__ import annotations

import csv
import io
import os
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from worlds.decided import situation
from worlds.report_additions import add_own_units
from worlds.report_document import TASKS, make_document
from worlds.report_page import page_text, render

from workbench.errors import UsageError, WorkbenchError
from workbench.report.downloads import _plain, packed_in, slug
from workbench.report.markup import Styles, parsed
from workbench.report.saving import RECORD, check_folders, save
from workbench.tables import as_latex

OWN = " (fraction, or the metric's unit)"
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    document = make_document()
    add_own_units(document)
    return document


@pytest.fixture(scope="module")
def page(document: dict[str, Any]) -> str:
    return page_text(document)


@pytest.fixture(scope="module")
def files(page: str) -> dict[str, str]:
    return {f"{one.name}.{suffix}": text for one in packed_in(page) for suffix, text in one.files.items()}


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_every_table_and_figure_has_files(page: str, files: dict[str, str]) -> None:
    names = {name.rpartition(".")[0] for name in files}
    assert {"summary", "undecided", "differences", "difference-matrix", "interference", "kept", "forgetting"} <= names
    assert {"configurations", "check", "changed-items", "skills-and-retention", "skills-and-size"} <= names
    assert {f"{slug(task)}-against-base" for task in TASKS} <= names
    kinds = [name.rpartition(".")[2] for name in files]
    assert kinds.count("csv") == kinds.count("tex") == page.count("<table")
    assert kinds.count("svg") == page.count("data-figure=")
    assert all(re.fullmatch(r"[a-z0-9-]+\.(csv|tex|svg)", name) for name in files)


def test_a_csv_has_full_precision_and_intervals_in_columns_of_their_own(document: dict[str, Any], files: dict[str, str]) -> None:
    primary = {t["task"]: t["metric"] for t in document["tasks"]}
    stored = {(r["configuration"], r["task"], r["metric"]): r for r in document["rows"]}
    table = rows(files["differences.csv"])
    assert len(table) == len(stored)
    for row in table:
        r = stored[row["Configuration"], row["Task"], row["Metric"].removesuffix(", lower is better")]
        assert float(row[f"Difference{OWN}"]) == r["diff"]
        for column, key in (("95 % interval", ""), ("Adjusted interval", "_adj")):
            ends = [row[f"{column} {end}{OWN}"] for end in ("low", "high")]
            assert [float(e) if e else None for e in ends] == [r[f"low{key}"], r[f"high{key}"]]
            assert column not in row
    means = {c["name"]: c["mean"] for c in document["configurations"] if c.get("mean")}
    for row in rows(files["summary.csv"]):
        mean = means[row["Configuration"]]
        found = [float(row[f"Mean over skills{end} (fraction)"]) for end in ("", " low", " high")]
        assert found == [mean["value"], mean["low"], mean["high"]]
    interference = {row["Brick alone"]: row for row in rows(files["interference.csv"])}
    matrix = document["interference"]
    for b, brick in enumerate(matrix["bricks"]):
        for t, task in enumerate(matrix["tasks"]):
            heads = [h for h in interference[brick] if h.split()[0] == task and " low" not in h and " high" not in h]
            assert float(interference[brick][heads[0]]) == matrix["diff"][b][t], (brick, task, primary[task])
    kept = next(row for row in rows(files["kept.csv"]) if row["Configuration"] == "starter-ties")
    assert not [head for head in kept if " to " in head], "columns that only draw are left out"


def test_numbers_have_one_unit_and_a_column_each(document: dict[str, Any], files: dict[str, str]) -> None:
    stored = {(r["configuration"], r["task"], r["metric"]): r for r in document["rows"]}
    for row in rows(files["differences.csv"]):
        r = stored[row["Configuration"], row["Task"], row["Metric"].removesuffix(", lower is better")]
        assert [row["Gained"], row["Lost"]] == ["" if r[key] is None else str(r[key]) for key in ("wins", "losses")]
    changed = {row["Configuration"]: row for row in rows(files["changed-items.csv"])}
    for name, flips in document["flips"].items():
        for task in {flip["task"] for flip in flips}:
            counts = [int(changed[name][f"{task} {word}"]) for word in ("gained", "lost", "same score")]
            assert sum(counts) == sum(flip["task"] == task for flip in flips)
    for name, text in files.items():
        if name.endswith(".csv"):
            shares = [head for head in rows(text)[0] if head.endswith("(fraction)")]
            values = [float(row[head]) for row in rows(text) for head in shares if row[head]]
            assert all(abs(value) < 1.5 for value in values), name
            assert "%" not in text.partition("\n")[0].replace("95 % interval", ""), name


def test_leaders_have_the_units_of_the_summary(tmp_path: Path) -> None:
    document = situation("alike", tmp_path).to_dict()
    files = {one.name: one.files["csv"] for one in packed_in(page_text(document)) if "csv" in one.files}
    means = {row["Configuration"]: float(row["Mean over skills (fraction)"]) for row in rows(files["summary"])}
    leaders = rows(files["leaders"])
    assert leaders
    for row in leaders:
        assert float(row["Mean (fraction)"]) == means[next(iter(row.values()))]


def test_latex_uses_booktabs_and_escapes(files: dict[str, str]) -> None:
    text = files["summary.tex"]
    rules = [line for line in text.splitlines() if line in ("\\toprule", "\\midrule", "\\bottomrule")]
    assert rules == ["\\toprule", "\\midrule", "\\bottomrule"]
    columns = re.search(r"\\begin\{tabular\}\{([lr]+)\}", text)
    assert columns
    body = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert {len(re.findall(r"(?<!\\)&", line)) + 1 for line in body} == {len(columns.group(1))}
    assert r"85 \% [74, 96]" in text
    assert "$-$0.310" in text
    assert not re.search(r"(?<!\\)[%_#](?!.*booktabs)", text.partition("\n")[2])
    assert as_latex(r"a_b & c%~^\{x}−1") == r"a\_b \& c\%\textasciitilde{}\textasciicircum{}\textbackslash{}\{x\}$-$1"


def test_a_figure_needs_no_style_sheet(files: dict[str, str]) -> None:
    for name, text in files.items():
        if not name.endswith(".svg"):
            continue
        root = ElementTree.fromstring(text)
        assert root.tag == f"{SVG}svg"
        for node in root.iter():
            assert not {"class", "style"} & set(node.attrib), name
            assert not any("var(" in v or "%" in v for k, v in node.attrib.items() if node is not root[0]), (name, node.attrib)
            assert node.tag != f"{SVG}use"
    forest = ElementTree.fromstring(files["retention-against-base.svg"])
    texts = ["".join(t.itertext()) for t in forest.iter(f"{SVG}text")]
    assert {"over-scaled", "starter-ties", "−23.8"} <= set(texts), "names and numbers stand beside the plot"
    number = next(t for t in forest.iter(f"{SVG}text") if t.text == "−23.8")
    assert number.get("fill") == "#be4d00", "the color of worse"
    bands = [r for r in forest.iter(f"{SVG}rect") if r.get("fill-opacity") == ".22"]
    assert {r.get("fill") for r in bands} >= {"#be4d00", "#007668"}


def test_styles_follow_weights_and_variables() -> None:
    styles = Styles(
        ":root { --red: 200 0 0; } @media (x) { .a { fill: green; } } .b { --c: var(--red); } .a { fill: rgb(var(--c) / .5); }"
        " p .a { stroke: var(--none, black); } .b.a { fill: blue; } .a:hover { fill: pink; }"
    )
    first, second = parsed('<p class="b"><i class="a"></i></p><i class="b a"></i>').each("i")
    around = [first, *first.above()]
    assert styles.presentation(first, around) == {"fill": "#c80000", "fill-opacity": ".5", "stroke": "black"}
    assert styles.presentation(second, [second]) == {"fill": "blue"}


def test_shown_numbers_are_plain_in_a_csv() -> None:
    shown = ("−1,234.5", "+3.0", "1,2", "–", "12 kB", "3 / 4", "1,234,567")
    assert [_plain(text) for text in shown] == ["-1234.5", "+3.0", "1,2", "", "12 kB", "3 / 4", "1234567"]


def test_names_that_are_alike_stay_apart() -> None:
    document = make_document()
    for c in document["configurations"]:
        c["aliases"] = []
    names = [one.name for one in packed_in(page_text(document))]
    assert len({(n, i) for i, n in enumerate(names)}) == len(names)
    assert (slug("Größe / Δ: ../../x"), slug("日本")) == ("groe-x", "unnamed")
    assert len(slug("a" * 300)) == 80


def test_files_are_written_again_but_never_those_of_others(document: dict[str, Any], tmp_path: Path) -> None:
    pages = [p for p in render(document, tmp_path / "report") if p.suffix == ".html"]
    folders: dict[str, Path | None] = {"csv": tmp_path / "t", "tex": tmp_path / "t", "svg": None}
    written = save(pages, folders)
    assert {p.suffix for p in written} == {".csv", ".tex"}
    assert save(pages, folders) == written
    (tmp_path / "t" / "summary.csv").write_text("mine\n")
    before = (tmp_path / "t" / "kept.csv").stat().st_mtime_ns
    with pytest.raises(
        WorkbenchError, match=r"summary\.csv: the file exists, and was not written by this command or was changed"
    ):
        save(pages, folders)
    assert (tmp_path / "t" / "summary.csv").read_text() == "mine\n"
    assert (tmp_path / "t" / "kept.csv").stat().st_mtime_ns == before, "nothing was written"
    (tmp_path / "t" / RECORD).write_text("{ damaged")
    (tmp_path / "t" / "summary.csv").unlink()
    save(pages, folders)  # equal files are its own without a record
    second = save([*pages, pages[0]], {**folders, "csv": tmp_path / "u"})
    assert (tmp_path / "u" / "report-summary.csv") in second, "further pages have their name in front"


def test_folders_are_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match=r"--csv .*file: expected a folder, but .*file is a file"):
        check_folders({"--csv": tmp_path / "file", "--latex": None})
    with pytest.raises(UsageError, match="expected a folder"):
        check_folders({"--figures": tmp_path / "file" / "below"})
    if os.getuid():
        (tmp_path / "closed").mkdir(mode=0o500)
        with pytest.raises(UsageError, match="not writable"):
            check_folders({"--csv": tmp_path / "closed" / "new"})
    check_folders({"--csv": tmp_path / "new" / "below"})
    assert not (tmp_path / "new").exists()
