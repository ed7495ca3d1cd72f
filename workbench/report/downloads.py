"""Tables of a page as CSV and LaTeX, its figures as SVG: packed into the page for its buttons, and as files of `workbench report`."""

from __future__ import annotations

import base64
import gzip
import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from workbench.files import gunzip
from workbench.report.figures import figure_of
from workbench.report.markup import Node, Styles, parsed
from workbench.report.numbers import MINUS, MISSING
from workbench.tables import csv_text, latex_table

PLACE = '<script type="text/plain" id="download-data"></script>'
"""Element of the templates that takes the packed files."""
LONGEST = 80


@dataclass(frozen=True)
class Saved:
    """A table or a figure of a page.

    Attributes:
        name: Name of its files, without a suffix; only small letters, digits and hyphens.
        files: Suffix -> content: csv and tex of a table, svg of a figure.
    """

    name: str
    files: Mapping[str, str]


@dataclass(frozen=True)
class _Cell:
    """A cell of a table: its shown text, its numbers in full precision with their unit, and the numbers of a cell that has several."""

    text: str = ""
    value: str = ""
    low: str = ""
    high: str = ""
    unit: str = ""
    values: tuple[str, ...] = ()


def saved_tables(page: Node) -> list[Saved | None]:
    """Return the tables in the order of the page; None for a table without rows."""
    taken: set[str] = set()
    return [_table(node, taken) for node in page.each("table")]


def saved_figures(page: Node, css: str) -> list[Saved | None]:
    """Return the elements with `data-figure` in the order of the page; None for one without a drawing."""
    styles, marks, taken = Styles(css), {n.attributes["id"]: n for n in page.each() if "id" in n.attributes}, set[str]()
    found: list[Saved | None] = []
    for node in (n for n in page.each() if "data-figure" in n.attributes):
        figure = figure_of(node, styles, marks)
        found.append(Saved(_free(figure.title, taken), {"svg": figure.svg}) if figure else None)
    return found


def with_downloads(text: str, css: str) -> str:
    """Return a page whose tables and figures can be saved; a page without the place for them is returned as it is."""
    if PLACE not in text:
        return text
    tree = parsed(text)
    files = {"tables": saved_tables(tree), "figures": saved_figures(tree, css)}
    shown = {kind: [one and {"name": one.name, **one.files} for one in entries] for kind, entries in files.items()}
    data = gzip.compress(json.dumps(shown, ensure_ascii=False, separators=(",", ":")).encode(), 9, mtime=0)
    return text.replace(PLACE, PLACE.replace("></", f">{base64.b64encode(data).decode('ascii')}</"))


def packed_in(text: str) -> list[Saved]:
    """Return the tables and figures that are packed into a page."""
    found = re.search(PLACE.replace("></", r">([\w+/=]+)</"), text)
    shown = json.loads(gunzip(base64.b64decode(found.group(1)), "the page")) if found else {}
    entries = [entry for kind in ("tables", "figures") for entry in shown.get(kind, ()) if entry]
    return [Saved(entry["name"], {kind: entry[kind] for kind in entry if kind != "name"}) for entry in entries]


def slug(text: str) -> str:
    """Return a text as the name of a file: small letters, digits and hyphens, at most 80 letters."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:LONGEST].strip("-") or "unnamed"


def _free(text: str, taken: set[str]) -> str:
    """Return a name that no other table or figure of the page has."""
    name = slug(text)
    number = next(n for n in range(1, len(taken) + 2) if (name if n == 1 else f"{name}-{n}") not in taken)
    name = name if number == 1 else f"{name}-{number}"
    taken.add(name)
    return name


def _table(node: Node, taken: set[str]) -> Saved | None:
    """Return a table's files; columns that only draw are left out."""
    lines = [tr for tr in node.each("tr") if "group" not in tr.classes]
    heads = [tr for tr in lines if tr.parent is not None and tr.parent.tag == "thead"]
    body = [[c for c in tr.nodes() if c.tag in ("th", "td")] for tr in lines if tr not in heads]
    if not heads or not body:
        return None
    columns = [c for c in heads[0].nodes() if c.tag == "th"]
    drawn = [
        any(i < len(row) and any("strip" in s.classes for s in row[i].each("svg")) for row in body) for i in range(len(columns))
    ]
    kept = [i for i, column in enumerate(columns) if not drawn[i] and "data-unsaved" not in column.attributes]
    cells = [[_cell(row[i]) if i < len(row) else _Cell() for i in kept] for row in body]
    names = [columns[i].text() for i in kept]
    parts = [tuple(filter(None, columns[i].attributes.get("data-parts", "").split("|"))) for i in kept]
    ends_only = ["data-ends" in columns[i].attributes for i in kept]
    left = [i == 0 or "left" in columns[i].classes for i in kept]
    title = (
        node.attributes.get("data-name")
        or node.attributes.get("id", "").removesuffix("-table")
        or next((h for a in node.above() if (h := _head(a))), "table")
    )
    return Saved(
        _free(title, taken),
        {
            "csv": _csv(names, cells, ends_only, parts),
            "tex": latex_table(names, [[cell.text for cell in row] for row in cells], left),
        },
    )


def _head(node: Node) -> str:
    """Return the first heading among an element's children, or ""."""
    return next((child.text() for child in node.nodes() if child.tag in ("h1", "h2", "h3", "h4")), "")


def _cell(node: Node) -> _Cell:
    shown = node.text() if node.tag == "td" else node.text(("sub",))
    given = node.attributes
    value, unit = given.get("data-v", ""), given.get("data-unit", "")
    if "data-v" not in given or node.tag != "td":
        value = _plain(node.text(("ci-text", "sub")))
        if share := re.fullmatch(r"([-+]?[\d.]+) %", value.replace(MINUS, "-").replace("\N{NO-BREAK SPACE}", " ")):
            value, unit = share[1], "%"
    if unit == "%":
        value, unit = f"{float(value) / 100:.12g}" if value else "", "fraction"
    values = tuple(filter(None, given.get("data-values", "").split("|")))
    return _Cell(shown, value, given.get("data-low", ""), given.get("data-high", ""), unit, values)


def _plain(text: str) -> str:
    """Return a text for a CSV: empty for a missing value, with a hyphen as the sign of numbers."""
    number = text.replace(MINUS, "-")
    if re.fullmatch(r"[-+]?\d{1,3}(,\d{3})+(\.\d+)?", number):
        number = number.replace(",", "")
    return "" if text == MISSING else number if re.fullmatch(r"[-+]?[\d.]+", number) else text


def _csv(
    names: Sequence[str], rows: Sequence[Sequence[_Cell]], ends_only: Sequence[bool], parts: Sequence[tuple[str, ...]]
) -> str:
    """Return the table with a column for each number of a cell; heads name the unit of the stored numbers."""
    header, table = [], [list[str]() for _ in rows]

    def add(head: str, cells: Iterable[str]) -> None:
        header.append(head)
        for line, cell in zip(table, cells, strict=True):
            line.append(cell)

    for i, name in enumerate(name.removesuffix(", %") for name in names):
        column = [row[i] for row in rows]
        units = {cell.unit for cell in column if cell.value or cell.low}
        unit = "" if units <= {""} else f" ({units.pop()})" if len(units) == 1 else " (fraction, or the metric's unit)"
        for number, part in enumerate(parts[i]):
            add(part if part.istitle() else f"{name} {part}", [(cell.values or ("",) * len(parts[i]))[number] for cell in column])
        if not ends_only[i] and not parts[i]:
            add(f"{name}{unit}", [cell.value for cell in column])
        if any(cell.low or cell.high for cell in column):
            add(f"{name} low{unit}", [cell.low for cell in column])
            add(f"{name} high{unit}", [cell.high for cell in column])
    return csv_text(header, table)
