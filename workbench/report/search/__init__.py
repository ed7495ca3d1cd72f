"""Reports of searches: one offline HTML page, Markdown, and the search's document as JSON."""

from __future__ import annotations

from workbench.report.search.page import page_text, render

__all__ = ["page_text", "render"]
