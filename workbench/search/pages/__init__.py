"""Reports of searches: their page and their Markdown."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from workbench.report.page import Viewer
    from workbench.search.result import SearchState


def render(found: SearchState, out: Path) -> list[Path]:
    """Write the report of a search as <out>.html, <out>.md and <out>.json and return their paths in that order.

    Args:
        found: The search.
        out: Path of the files; it may end in one of the three suffixes.
    """
    from workbench.report import write_report
    from workbench.search.pages.markdown import markdown

    return write_report(out, page_text(found), markdown(found), found)


def page_text(found: SearchState, viewer: Viewer | None = None) -> str:
    """Return the HTML page of a search, finished or in progress.

    Args:
        found: The search.
        viewer: The viewer that shows the page; None for a file.
    """
    from workbench.search.pages import page

    return page.html(found, viewer)
