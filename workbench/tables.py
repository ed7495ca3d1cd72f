"""One writer for each format of text and tables: CSV, LaTeX, Markdown and HTML. Each escapes what the files of others can hold."""

from __future__ import annotations

import csv
import html
import importlib
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from workbench.errors import UsageError, WorkbenchError, printable

_FORMULAS = "=+-@\t\r\n\N{FULLWIDTH EQUALS SIGN}\N{FULLWIDTH PLUS SIGN}\N{FULLWIDTH HYPHEN-MINUS}\N{FULLWIDTH COMMERCIAL AT}"
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


def csv_text(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table as CSV. A text that a spreadsheet would run as a formula gets an apostrophe in front; numbers stay numbers."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([[_csv(cell) for cell in row] for row in (header, *rows)])
    return out.getvalue()


def csv_records(rows: Sequence[Mapping[str, Any]]) -> str:
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


def latex_table(names: Sequence[str], rows: Iterable[Sequence[str]], left: Sequence[bool]) -> str:
    """Return a table of the package booktabs.

    Args:
        names: Heads of the columns.
        rows: Cells of each row.
        left: Whether each column is left-aligned.
    """
    columns = "".join("l" if is_left else "r" for is_left in left)
    head, *lines = (" & ".join(map(as_latex, row)) + r" \\" for row in (names, *rows))
    return "\n".join(
        [r"% \usepackage{booktabs}", rf"\begin{{tabular}}{{{columns}}}", r"\toprule", head, r"\midrule", *lines, r"\bottomrule", r"\end{tabular}", ""]
    )  # fmt: skip


def as_markdown(text: str) -> str:
    """Return a text that Markdown shows literally, on one line."""
    text = _line(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_|\[\]#])", r"\\\1", text)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Return a table of escaped cells; the first `left` columns are left-aligned, the others right-aligned."""
    rule = [":--" if i < left else "--:" for i in range(len(header))]
    head, *lines = ([as_markdown(cell) for cell in row] for row in (header, *rows))
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *lines))


def fence(text: str, language: str = "") -> str:
    """Return a Markdown code block whose fence is longer than any run of backticks in the text."""
    ticks = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return f"{ticks}{language}\n{printable(text).rstrip()}\n{ticks}"


def as_html(text: str) -> str:
    """Return a text for HTML, in elements and in quoted attributes."""
    return html.escape(printable(text))


def _line(text: str) -> str:
    return re.sub(r"\s+", " ", printable(text))


def data_frame(tables: Mapping[str, Sequence[Mapping[str, Any]]], name: str) -> Any:
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
