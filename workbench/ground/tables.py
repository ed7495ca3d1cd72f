"""One writer for each format of text and tables: CSV, LaTeX, Markdown and HTML. Each escapes what the files of others can hold."""

from __future__ import annotations

import csv
import html
import importlib
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from workbench.ground.errors import UsageError, WorkbenchError, printable

_FORMULAS = "=+-@\t\r\n\N{FULLWIDTH EQUALS SIGN}\N{FULLWIDTH PLUS SIGN}\N{FULLWIDTH HYPHEN-MINUS}\N{FULLWIDTH COMMERCIAL AT}"
_MISSING = "\N{EN DASH}"
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?|[-+]?(inf|nan)")
_LATEX = {
    "\\": r"\textbackslash{}",
    **{c: "\\" + c for c in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "\N{MINUS SIGN}": "$-$",
    "\N{EN DASH}": "--",
    "\N{PLUS-MINUS SIGN}": r"$\pm$",
    "\N{ALMOST EQUAL TO}": r"$\approx$",
    "\N{MULTIPLICATION SIGN}": r"$\times$",
    "\N{MIDDLE DOT}": r"$\cdot$",
    "\N{HORIZONTAL ELLIPSIS}": r"\ldots{}",
    "\N{RIGHTWARDS ARROW}": r"$\rightarrow$",
    "\N{NO-BREAK SPACE}": "~",
    "\N{NARROW NO-BREAK SPACE}": "~",
}


class Cell(str):
    """The text of a table's cell with the numbers behind it, which CSV files get in full precision.

    Attributes:
        numbers: The numbers by the words that a CSV file adds to the column's head: "" for the value, "low" and "high" for an interval.
        unit: Their unit.
    """

    numbers: Mapping[str, float | str | None]
    unit: str

    def __new__(cls, text: str, numbers: Mapping[str, float | str | None], unit: str = "") -> Self:
        """Return the cell."""
        cell = super().__new__(cls, text)
        cell.numbers, cell.unit = numbers, unit
        return cell


@dataclass(frozen=True)
class Table:
    """A table that is written as Markdown, CSV and LaTeX.

    Attributes:
        name: Name of its files.
        header: Heads of the columns.
        rows: Cells of each row.
        left: Number of columns at the left that are left-aligned; the others are right-aligned.
    """

    name: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1

    def markdown(self) -> str:
        """Return the table as Markdown."""
        return markdown_table(self.header, self.rows, self.left)

    def latex(self) -> str:
        """Return the table for the package booktabs."""
        columns = "".join("l" if i < self.left else "r" for i in range(len(self.header)))
        head, *lines = (" & ".join(map(as_latex, row)) + r" \\" for row in (self.header, *self.rows))
        return "\n".join(
            [r"% \usepackage{booktabs}", rf"\begin{{tabular}}{{{columns}}}", r"\toprule", head, r"\midrule", *lines, r"\bottomrule", r"\end{tabular}", ""]
        )  # fmt: skip

    def csv(self) -> str:
        """Return the table as CSV: a column for each number of a cell, whose head names the unit; a missing value is empty."""
        columns: list[tuple[str, list[Any]]] = []
        for i, name in enumerate(self.header):
            cells = [row[i] for row in self.rows]
            numbered = [cell if isinstance(cell, Cell) else Cell(cell, {}) for cell in cells]
            units = {cell.unit for cell in numbered if any(v is not None for v in cell.numbers.values())}
            unit = "" if units <= {""} else f" ({units.pop()})" if len(units) == 1 else " (fraction, or the metric's unit)"
            kinds = dict.fromkeys(kind for cell in numbered for kind in cell.numbers)
            if not kinds:
                columns.append((name, ["" if cell == _MISSING else cell for cell in cells]))
            for kind in kinds:
                columns.append(
                    (f"{name.removesuffix(', %')} {kind}".rstrip() + unit, [cell.numbers.get(kind) for cell in numbered])
                )
        return csv_text([name for name, _ in columns], zip(*(cells for _, cells in columns), strict=True))


def csv_text(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table as CSV. A text that a spreadsheet would run as a formula gets an apostrophe in front; numbers stay numbers."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([[_csv(cell) for cell in row] for row in (header, *rows)])
    return out.getvalue()


def csv_records(rows: Sequence[Mapping[str, object]]) -> str:
    """Return rows of equal keys, at least one, as CSV."""
    return csv_text(list(rows[0]), ([row[key] for key in rows[0]] for row in rows))


def _csv(cell: Any) -> Any:
    if not isinstance(cell, str):
        return cell
    text = printable(cell)
    return f"'{text}" if text[:1] in tuple(_FORMULAS) and not _NUMBER.fullmatch(text) else text


def as_latex(text: str) -> str:
    """Return a text for LaTeX, on one line."""
    return "".join(_LATEX.get(letter, letter) for letter in _line(text))


def as_markdown(text: str) -> str:
    """Return a text that Markdown shows literally, on one line."""
    text = _line(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_|\[\]#])", r"\\\1", text)


def prose(text: str) -> str:
    """Return a sentence as Markdown, in which words between backticks are code, unless they look like HTML; the rest is literal."""
    parts = re.split(r"(`[^`]+`)", _line(text))
    return "".join(part if i % 2 and not set("<>&|") & set(part) else as_markdown(part) for i, part in enumerate(parts))


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Return a table of escaped cells; the first `left` columns are left-aligned, the others right-aligned."""
    rule = [":--" if i < left else "--:" for i in range(len(header))]
    head, *lines = ([as_markdown(cell) for cell in row] for row in (header, *rows))
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *lines))


def markdown_rows(header: Sequence[str], rows: Iterable[Sequence[str]], left: int | None = None) -> list[str]:
    """Return the lines of a table whose cells are Markdown already; bars in them are escaped.

    Args:
        header: Heads of the columns.
        rows: Cells of each row.
        left: Number of columns at the left that are left-aligned, the others right-aligned; None for all.
    """
    rule = ["---" if left is None or i < left else "--:" for i in range(len(header))]
    cells = ([re.sub(r"(?<!\\)\|", r"\\|", " ".join(cell.split())) for cell in row] for row in (header, rule, *rows))
    return ["| " + " | ".join(row) + " |" for row in cells]


def fence(text: str, language: str = "") -> str:
    """Return a Markdown code block whose fence is longer than any run of backticks in the text."""
    ticks = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return f"{ticks}{language}\n{printable(text).rstrip()}\n{ticks}"


def as_html(text: str) -> str:
    """Return a text for HTML, in elements and in quoted attributes."""
    return html.escape(printable(text))


def _line(text: str) -> str:
    return re.sub(r"\s+", " ", printable(text))


def data_frame(tables: Mapping[str, Sequence[Mapping[str, object]]], name: str) -> Any:
    """Return one of some flat tables as a pandas data frame.

    Args:
        tables: Tables by name; a table is one mapping per row.
        name: Name of the table.

    Raises:
        WorkbenchError: If there is no such table, or pandas is not installed.
    """
    if name not in tables:
        raise UsageError(f"to_pandas({name!r}): no such table", f"Tables: {', '.join(tables)}.")
    try:
        pandas = importlib.import_module("pandas")
    except ModuleNotFoundError:
        raise WorkbenchError("to_pandas needs pandas, which is not installed", "Run `pip install pandas`.") from None
    return pandas.DataFrame(list(tables[name]))
