"""Tables of a page as files: full precision, escaped, and never over files of others."""

from __future__ import annotations

import csv
import io
import os
import re
from pathlib import Path
from typing import Any

import pytest

from worlds.decided import situation
from worlds.report_additions import add_own_units, with_facts
from worlds.report_document import make_document
from worlds.report_page import page_text, render, view_of

from workbench.ground.errors import UsageError, WorkbenchError
from workbench.ground.tables import Cell, Table, as_latex
from workbench.report.files import RECORD, check_folders, packed_in, save, slug
from workbench.report.markdown import tables

OWN = " (fraction, or the metric's unit)"


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
    return {f"{name}.{suffix}": text for name, of in packed_in(page).items() for suffix, text in of.items()}


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_every_table_of_the_page_has_files(page: str, files: dict[str, str]) -> None:
    names = {name.rpartition(".")[0] for name in files}
    assert {"summary", "undecided", "differences", "difference-matrix", "interference", "kept", "forgetting"} <= names
    assert {"configurations", "check", "changed-items"} <= names
    assert len(names) == page.count("<table")
    assert all(re.fullmatch(r"[a-z0-9-]+\.(csv|tex)", name) for name in files)


def test_a_csv_has_full_precision_and_intervals_in_columns_of_their_own(document: dict[str, Any], files: dict[str, str]) -> None:
    primary = {t["task"]: t["metric"] for t in document["tasks"]}
    stored = {(r["configuration"], r["task"], r["metric"]): r for r in document["rows"]}
    table = rows(files["differences.csv"])
    assert len(table) == len(stored)
    for row in table:
        r = stored[row["Configuration"], row["Task"], row["Metric"].removesuffix(" (lower is better)")]
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
    interference = {row["Brick"]: row for row in rows(files["interference.csv"])}
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
        r = stored[row["Configuration"], row["Task"], row["Metric"].removesuffix(" (lower is better)")]
        assert [row["Items gained"], row["Items lost"]] == ["" if r[key] is None else str(r[key]) for key in ("wins", "losses")]
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
    document = situation("alike")
    files = {name: of["csv"] for name, of in packed_in(page_text(document)).items()}
    means = {row["Configuration"]: float(row["Mean over skills (fraction)"]) for row in rows(files["summary"])}
    leaders = rows(files["leaders"])
    assert leaders
    for row in leaders:
        assert float(row["Mean over skills (fraction)"]) == means[row["Leader"].partition(" (")[0]]


def test_every_number_lies_in_its_own_interval(tmp_path: Path) -> None:
    """The three numbers of a cell are written by hand in each table, so that two of them could change places."""
    documents = (view_of(make_document()), view_of(with_facts(make_document())), situation("alike"))
    seen = set()
    for table in (table for document in documents for table in tables(document)):
        for row in rows(table.csv()):
            for low in (head for head in row if " low (" in head):
                ends = [row.get(low.replace(" low (", word)) for word in (" low (", " (", " high (")]
                if all(ends):
                    assert [float(end or "") for end in ends] == sorted(float(end or "") for end in ends), (table.name, low, row)
                    seen.add(table.name)
    assert seen >= {
        "summary",
        "undecided",
        "interference",
        "kept",
        "forgetting",
        "leaders",
        "facts-towns-facts",
        "survival-towns-facts-1",
    }


def test_latex_uses_booktabs_and_escapes(files: dict[str, str]) -> None:
    text = files["summary.tex"]
    rules = [line for line in text.splitlines() if line in ("\\toprule", "\\midrule", "\\bottomrule")]
    assert rules == ["\\toprule", "\\midrule", "\\bottomrule"]
    columns = re.search(r"\\begin\{tabular\}\{([lr]+)\}", text)
    assert columns
    body = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert {len(re.findall(r"(?<!\\)&", line)) + 1 for line in body} == {len(columns.group(1))}
    assert r"85 [74, 96] \%" in text
    assert "$-$0.310" in text
    assert not re.search(r"(?<!\\)[%_#](?!.*booktabs)", text.partition("\n")[2])
    assert as_latex(r"a_b & c%~^\{x}−1") == r"a\_b \& c\%\textasciitilde{}\textasciicircum{}\textbackslash{}\{x\}$-$1"


def test_numbers_of_a_cell_have_a_column_each() -> None:
    rows = [
        [
            "a",
            Cell("+3 / \u22121", {"gained": 3, "lost": 1}),
            Cell("50 % [40, 60]", {"": 0.5, "low": 0.4, "high": 0.6}, "fraction"),
        ],
        ["=b", "\u2013", Cell("withheld", {"": None}, "fraction")],
    ]
    table = Table("t", ["Name", "Changed", "Kept, %"], rows)
    head, *lines = csv.reader(io.StringIO(table.csv()))
    assert head == ["Name", "Changed gained", "Changed lost", "Kept (fraction)", "Kept low (fraction)", "Kept high (fraction)"]
    assert lines == [["a", "3", "1", "0.5", "0.4", "0.6"], ["'=b", "", "", "", "", ""]]
    assert table.markdown().splitlines()[2] == "| a | +3 / \u22121 | 50 % \\[40, 60\\] |"
    assert list(csv.reader(io.StringIO(Table("t", ["a"], []).csv()))) == [["a"]]


def test_names_of_files_are_plain() -> None:
    assert (slug("Größe / Δ: ../../x"), slug("日本")) == ("groe-x", "unnamed")
    assert len(slug("a" * 300)) == 80


def test_files_are_written_again_but_never_those_of_others(document: dict[str, Any], tmp_path: Path) -> None:
    pages = [p for p in render(document, tmp_path / "report") if p.suffix == ".html"]
    folders: dict[str, Path | None] = {"csv": tmp_path / "t", "tex": tmp_path / "t"}
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
        check_folders({"--latex": tmp_path / "file" / "below"})
    if os.getuid():
        (tmp_path / "closed").mkdir(mode=0o500)
        with pytest.raises(UsageError, match="not writable"):
            check_folders({"--csv": tmp_path / "closed" / "new"})
    check_folders({"--csv": tmp_path / "new" / "below"})
    assert not (tmp_path / "new").exists()
