"""Reports of comparisons and searches: one offline HTML page, Markdown, and the document as JSON."""

from __future__ import annotations

from workbench.report.page import page_text, render

__all__ = ["page_text", "render"]
