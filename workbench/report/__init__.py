"""Reports of comparisons and searches: one offline HTML page, Markdown, and the document as JSON."""

from __future__ import annotations

from workbench.report.page import render

__all__ = ["render"]
