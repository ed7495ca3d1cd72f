"""Draw the figure of docs/architecture.md from the tables of that page: a box for each class, an arrow for each function."""

from __future__ import annotations

import re
from collections.abc import Iterator

from charts import GREY, document, words

ROW = re.compile(r"^\| (?P<source>.+?) \| `workbench\.(?:\w+\.)*(?P<name>\w+)` \| (?P<target>.+?) \|", re.MULTILINE)
# Boxes that are no classes: words of the tables -> title in the figure.
TITLES = {"a YAML file": "recipe.yaml", "a run directory": "run directory", "a live model": "live model", "the page": "page"}
# Column and row of each box.
PLACES = {
    "recipe.yaml": (0, 1),
    "Recipe": (1, 1),
    "Resolved": (2, 1),
    "RunPlan": (3, 0),
    "Composition": (3, 1),
    "run directory": (4, 1),
    "live model": (3, 2),
    "LineupEntry": (1, 3),
    "ScorePlan": (2, 3),
    "Scores": (3, 3),
    "Comparison": (4, 3),
    "page": (5, 3),
}
# Arrows that start elsewhere than the tables say: `execute` composes first, and `evaluate` scores the live model.
STARTS = {"execute": "Composition"}
UNNAMED = (("live model", "", "Scores"),)
WIDE, HIGH, ACROSS, DOWN, MARGIN = 112, 34, 206, 76, 12


def arrows(page: str) -> list[tuple[str, str, str]]:
    """Return source, function and target of every row of the page's tables, as the figure names them."""
    found = []
    for row in ROW.finditer(page):
        source, target = (_title(row[end]) for end in ("source", "target"))
        found.append((STARTS.get(row["name"], source), row["name"], target))
    return [*found, *UNNAMED]


def figure(page: str) -> str:
    """Return the figure as an SVG document. Raises KeyError if a table has a box without a place."""
    width, height = 5 * ACROSS + WIDE + 2 * MARGIN, 3 * DOWN + HIGH + 2 * MARGIN
    parts = [part for arrow in arrows(page) for part in _arrow(*arrow)]
    parts += [part for title in PLACES for part in _box(title)]
    marker = (
        '<defs><marker id="end" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        f'<path d="M0 0L8 4L0 8z" fill="{GREY}"/></marker></defs>'
    )
    return document(width, height, [marker, *parts])


def _title(cell: str) -> str:
    """Return the box that a cell of a table names: the class in it, or its words."""
    named = re.search(r"`(\w+)`", cell)
    return named[1] if named else TITLES[cell]


def _corner(title: str) -> tuple[int, int]:
    column, row = PLACES[title]
    return MARGIN + column * ACROSS, MARGIN + row * DOWN


def _box(title: str) -> Iterator[str]:
    x, y = _corner(title)
    kind = "#f4f4f4" if title in TITLES.values() else "#e3edf9"
    yield f'<rect x="{x}" y="{y}" width="{WIDE}" height="{HIGH}" rx="5" fill="{kind}" stroke="{GREY}"/>'
    yield words(x + WIDE // 2, y + 22, title, text_anchor="middle", fill="#111")


def _arrow(source: str, name: str, target: str) -> Iterator[str]:
    """Yield a line from box to box and the function's name above it or beside it."""
    (x, y), (to_x, to_y) = _corner(source), _corner(target)
    if x == to_x:
        start, end = (x + WIDE // 2, y + HIGH), (to_x + WIDE // 2, to_y)
        place, anchor = (start[0] + 8, (start[1] + end[1]) // 2 + 5), "start"
    elif y == to_y:
        start, end = (x + WIDE, y + HIGH // 2), (to_x, to_y + HIGH // 2)
        place, anchor = ((start[0] + end[0]) // 2, start[1] - 7), "middle"
    else:
        start, end = (x + WIDE // 2, y if to_y < y else y + HIGH), (to_x, to_y + HIGH // 2)
        place, anchor = ((start[0] + end[0]) // 2 - 8, (start[1] + end[1]) // 2 + (-6 if to_y < y else 17)), "end"
    yield f'<line x1="{start[0]}" y1="{start[1]}" x2="{end[0]}" y2="{end[1]}" stroke="{GREY}" marker-end="url(#end)"/>'
    if name:
        yield words(*place, name, text_anchor=anchor, fill="#333", font_size="13")
