"""The rendered report as tests read it."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from workbench import report
from workbench.compare.comparison import Comparison

Document = dict[str, Any]


class Page(HTMLParser):
    """Collects ids, resource attributes, table cells by table id, and texts by tag."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.ids: list[str] = []
        self.resources: list[str] = []
        self.tags: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.titles: list[str] = []
        self._table: str | None = None
        self._cell = self._title = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = dict(attrs)
        self.ids += [values["id"] or ""] if "id" in values else []
        self.resources += [v or "" for k, v in attrs if k in ("src", "href", "srcset", "action", "data", "poster")]
        assert not any(k.startswith("on") for k in values), f"<{tag}> has an event attribute"
        if tag == "table":
            self._table = values.get("id") or values.get("aria-label") or ""
            self.tables[self._table] = []
        elif tag == "tr" and self._table is not None:
            self.tables[self._table].append([])
        elif tag in ("td", "th") and self._table is not None:
            self.tables[self._table][-1].append("")
            self._cell = True
        elif tag == "title":
            self.titles.append("")
            self._title = True

    def handle_endtag(self, tag: str) -> None:
        self._cell = self._cell and tag not in ("td", "th")
        self._title = self._title and tag != "title"
        self._table = None if tag == "table" else self._table

    def handle_data(self, data: str) -> None:
        if self._title:
            self.titles[-1] += data
        elif self._cell and self._table is not None:
            self.tables[self._table][-1][-1] += data


def view_of(document: Document | Comparison) -> Comparison:
    """The comparison of a made-up document."""
    return document if isinstance(document, Comparison) else Comparison.of(document, "made")


def render(document: Document | Comparison, out: Path) -> list[Path]:
    return report.render(view_of(document), out)


def page_text(document: Document | Comparison) -> str:
    return report.page_text(view_of(document))


def rendered(document: Document | Comparison, folder: Path) -> tuple[str, str]:
    page, markdown, _ = render(document, folder / "report")
    return page.read_text("utf-8"), markdown.read_text("utf-8")
