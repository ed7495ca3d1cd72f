"""Reports of comparisons and searches: one offline HTML page, Markdown, and the document as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from workbench.compare.comparison import Comparison
    from workbench.report.page import Viewer
    from workbench.search.result import SearchState

SUFFIXES = (".html", ".md", ".json")


def render(document: Comparison | SearchState, out: Path) -> list[Path]:
    """Write <out>.html, <out>.md and <out>.json and return their paths in that order.

    Each file is replaced as a whole. The HTML page needs no other file and makes no request.

    Args:
        document: The comparison or the search.
        out: Path of the files; it may end in one of the three suffixes.
    """
    from workbench.compare.comparison import Comparison
    from workbench.ground.files import write_bytes
    from workbench.report import markdown
    from workbench.report.search import markdown as search_markdown

    text = markdown.markdown(document) if isinstance(document, Comparison) else search_markdown.markdown(document)
    texts = (page_text(document), text, json.dumps(document.to_dict(), ensure_ascii=False, indent=1) + "\n")
    paths = [out.with_name(stem(out) + suffix) for suffix in SUFFIXES]
    for path, content in zip(paths, texts, strict=True):
        write_bytes(path, content.encode())
    return paths


def page_text(document: Comparison | SearchState, viewer: Viewer | None = None) -> str:
    """Return the HTML page of a comparison, or of a search, finished or in progress.

    Args:
        document: The comparison or the search.
        viewer: The viewer that shows the page; None for a file.
    """
    from workbench.compare.comparison import Comparison
    from workbench.report import page
    from workbench.report.search import page as search_page

    return page.html(document, viewer) if isinstance(document, Comparison) else search_page.html(document, viewer)


def stem(out: Path) -> str:
    """Return the name that the three files share."""
    return out.name.removesuffix(out.suffix) if out.suffix in SUFFIXES else out.name
