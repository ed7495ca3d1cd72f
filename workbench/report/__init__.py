"""Reports of comparisons: one offline HTML page, Markdown, and the document as JSON; parts write their own reports with the same pieces."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from workbench.compare.comparison import Comparison
    from workbench.ground.results import Result
    from workbench.report.page import Viewer

SUFFIXES = (".html", ".md", ".json")


def render(comparison: Comparison, out: Path) -> list[Path]:
    """Write <out>.html, <out>.md and <out>.json and return their paths in that order.

    Each file is replaced as a whole. The HTML page needs no other file and makes no request.

    Args:
        comparison: The comparison.
        out: Path of the files; it may end in one of the three suffixes.
    """
    from workbench.report.markdown import markdown

    return write_report(out, page_text(comparison), markdown(comparison), comparison)


def page_text(comparison: Comparison, viewer: Viewer | None = None) -> str:
    """Return the HTML page of a comparison.

    Args:
        comparison: The comparison.
        viewer: The viewer that shows the page; None for a file.
    """
    from workbench.report import page

    return page.html(comparison, viewer)


def write_report(out: Path, page: str, markdown: str, document: Result) -> list[Path]:
    """Write the three files of a report and return their paths.

    Args:
        out: Path of the files; it may end in one of the three suffixes.
        page: The HTML page.
        markdown: The report as Markdown.
        document: What both show.
    """
    from workbench.ground.files import write_bytes

    texts = (page, markdown, json.dumps(document.to_dict(), ensure_ascii=False, indent=1) + "\n")
    paths = [out.with_name(stem(out) + suffix) for suffix in SUFFIXES]
    for path, content in zip(paths, texts, strict=True):
        write_bytes(path, content.encode())
    return paths


def stem(out: Path) -> str:
    """Return the name that the three files share."""
    return out.name.removesuffix(out.suffix) if out.suffix in SUFFIXES else out.name
