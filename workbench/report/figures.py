"""Figures of a page as SVG files that need no style sheet: light colors, a heading, and the legend."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from workbench.report.markup import Node, Styles, solid

WIDE = 560.0
"""Width in pixels of a drawing that fills its column."""
FONT = "'Segoe UI', Roboto, 'Noto Sans', 'Liberation Sans', Arial, sans-serif"
INK, SOFT = "#1b1f24", "#57606a"
MARGIN, LINE, LETTER = 12.0, 20.0, 6.7
COLUMN = 300.0
ACROSS = ("x", "x1", "x2", "cx", "dx", "width", "rx")
NAMES = {"viewbox": "viewBox", "preserveaspectratio": "preserveAspectRatio"}
DROPPED = ("class", "style", "role", "id")
HEADS = ("h2", "h3", "h4")


@dataclass(frozen=True)
class SavedFigure:
    """A figure as a file.

    Attributes:
        title: Its heading.
        svg: The file's text.
    """

    title: str
    svg: str


def figure_of(node: Node, styles: Styles, marks: Mapping[str, Node]) -> SavedFigure | None:
    """Return the figure of an element that `data-figure` marks, or None if it has no drawing.

    Args:
        node: The element, with headings, drawings and legends inside.
        styles: The page's style sheet.
        marks: Elements that drawings use, by id.
    """
    if not any(True for _ in node.each("svg")):
        return None
    title = node.attributes.get("data-figure") or next((h.text() for h in node.each(*HEADS)), "Figure")
    canvas, top = _Canvas(styles, marks), MARGIN
    if not any(True for _ in node.each(*HEADS)):
        canvas.text(title, MARGIN, top + 14, size=14, weight="600")
        top += LINE + 4
    height = canvas.flow(node, MARGIN, top)
    if note := node.attributes.get("data-note"):
        canvas.text(note, MARGIN, height + 14, size=11, fill=SOFT)
        height += LINE
    width = canvas.right + MARGIN
    size = f'width="{width:g}" height="{height + MARGIN:g}" viewBox="0 0 {width:g} {height + MARGIN:g}"'
    opened = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="{FONT}" font-size="12">'
    return SavedFigure(title, f'{opened}<rect width="100%" height="100%" fill="#ffffff"/>{"".join(canvas.parts)}</svg>\n')


class _Canvas:
    """Elements of a figure that are placed one after another, downwards.

    Attributes:
        parts: SVG elements.
        right: Right end of what was placed, in pixels.
    """

    def __init__(self, styles: Styles, marks: Mapping[str, Node]) -> None:
        self.styles, self.marks = styles, marks
        self.parts: list[str] = []
        self.right = 0.0

    def flow(self, node: Node, x: float, y: float) -> float:
        """Place the headings, legends and drawings of an element, and return the lower end."""
        for child in node.nodes():
            if child.tag in HEADS:
                self.text(child.text(), x, y + 14, size=14 if child.tag == "h2" else 13, weight="600")
                y += LINE + 4
            elif "legend" in child.classes:
                y = self.legend(child, x, y)
            elif child.tag == "svg":
                y += self.drawing(child, x, y)[1] + 6
            elif "rows" in child.classes:
                y = self.rows(child, x, y)
            elif "chart" in child.classes:
                y = self.beside(child, x, y)
            elif {"multiples", "curves"} & set(child.classes):
                y = self.grid(child, x, y)
            elif child.tag in ("div", "details", "figure"):
                padding = re.search(r"padding-left:\s*([\d.]+)px", child.attributes.get("style", ""))
                y = self.flow(child, x + (float(padding.group(1)) if padding else 0.0), y)
        return y

    def text(
        self, text: str, x: float, y: float, *, size: float = 12, fill: str = INK, weight: str = "", anchor: str = ""
    ) -> None:
        """Place a text whose base line begins at a point, or ends there with the anchor "end"."""
        more = (f' font-weight="{weight}"' if weight else "") + (f' text-anchor="{anchor}"' if anchor else "")
        self.parts.append(f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" fill="{fill}"{more}>{escape(text)}</text>')
        if anchor != "end":
            self.right = max(self.right, x + LETTER * size / 12 * len(text))

    def drawing(self, node: Node, x: float, y: float, width: float | None = None) -> tuple[float, float]:
        """Place a drawing, and return its width and height in pixels."""
        box = [float(v) for v in node.attributes.get("viewbox", "").split()]
        wide = width if width is not None else _pixels(node.attributes.get("width"), box[2] if box else _room(node))
        high = _pixels(node.attributes.get("height"), wide * box[3] / box[2] if box else 0.0)
        place = f"translate({x:g} {y:g})"
        if box:
            place += f" scale({wide / box[2]:g}) translate({-box[0]:g} {-box[1]:g})"
        around = [node, *node.above()]
        content = "".join(
            self.element(child, around, box[2] if box else wide) for child in node.children if isinstance(child, Node)
        )
        self.parts.append(f'<g transform="{place}">{content}</g>')
        self.right = max(self.right, x + wide)
        return wide, high

    def element(self, node: Node, outer: Sequence[Node], width: float) -> str:
        """Return an element of a drawing and what is in it, with its look in attributes; shares of the width become pixels."""
        around = [node, *outer]
        if "hit" in node.classes or "halo" in node.classes:
            return ""
        if node.tag == "use":
            return self.used(node, around, width)
        look = self.styles.presentation(node, around)
        if look.get("display") == "none":
            return ""
        inner = _pixels(node.attributes.get("width"), width, width) if node.tag == "svg" else width
        shown = {
            NAMES.get(name, name): f"{_share(value, width):g}" if name in ACROSS and value.endswith("%") else value
            for name, value in node.attributes.items()
            if name not in DROPPED and not name.startswith(("aria-", "data-"))
        }
        attributes = "".join(Markup(' {}="{}"').format(*pair) for pair in (shown | look).items())
        content = "".join(escape(c) if isinstance(c, str) else self.element(c, around, inner) for c in node.children)
        return f"<{node.tag}{attributes}>{content}</{node.tag}>"

    def used(self, node: Node, around: Sequence[Node], width: float) -> str:
        """Return a copy of the element that `use` names, at its place."""
        mark = self.marks.get(node.attributes.get("href", "").removeprefix("#"))
        if mark is None:
            return ""
        x, y = (_share(node.attributes.get(name, "0"), width) for name in ("x", "y"))
        return f'<g transform="translate({x:g} {y:g})">{self.element(mark, around, width)}</g>'

    def rows(self, node: Node, x: float, y: float) -> float:
        """Place a plot with the names of its rows at the left and their numbers at the right."""
        heights = [float(h) for h in re.findall(r"([\d.]+)px", node.attributes.get("style", ""))] or [26.0]
        if "repeat(" in node.attributes.get("style", ""):
            heights *= int(re.findall(r"repeat\((\d+)", node.attributes["style"])[0])
        names = [n for n in node.nodes() if "name" in n.classes]
        numbers = [n for n in node.nodes() if "num" in n.classes]
        left = x + LETTER * max((len(n.text()) for n in names), default=0) + 14
        plot = next(n for n in node.nodes() if n.tag == "svg")
        wide, high = self.drawing(plot, left, y)
        room = LETTER * max((len(n.text()) for n in numbers), default=0) + 14
        for label in (*names, *numbers):
            row = int((re.findall(r"grid-row:\s*(\d+)", label.attributes.get("style", "")) or ["1"])[0])
            middle = y + sum(heights[: row - 1]) + heights[row - 1] / 2 + 4
            if "name" in label.classes:
                self.text(label.text(), x, middle, fill=SOFT if "control" in label.classes else INK)
            else:
                self.text(label.text(), left + wide + room, middle, fill=self.color(label, "color", INK), anchor="end")
        self.right = max(self.right, left + wide + room)
        return y + max(high, sum(heights)) + 6

    def beside(self, node: Node, x: float, y: float) -> float:
        """Place drawings from left to right."""
        high = 0.0
        for drawing in (n for n in node.nodes() if n.tag == "svg"):
            wide, tall = self.drawing(drawing, x, y)
            x, high = x + wide, max(high, tall)
        return y + high + 6

    def grid(self, node: Node, x: float, y: float) -> float:
        """Place small charts in rows of three."""
        low, end = y, y
        for i, chart in enumerate(node.nodes()):
            if i % 3 == 0:
                low = end
            end = max(end, self.flow(chart, x + (i % 3) * COLUMN, low) + 8)
        return end

    def legend(self, node: Node, x: float, y: float) -> float:
        """Place the entries of a legend from left to right, in lines no wider than a drawing."""
        at = x
        for entry in (n for n in node.nodes() if n.tag == "li"):
            if at > x and at - x + LETTER * len(entry.text()) > WIDE:
                at, y = x, y + LINE
            at = self.entry(entry, at, y) + 18
        return y + LINE + 4

    def entry(self, node: Node, x: float, y: float) -> float:
        """Place one entry of a legend, and return its right end."""
        for child in node.children:
            if isinstance(child, str):
                if text := " ".join(child.split()):
                    self.text(text, x, y + 13, fill=SOFT)
                    x += LETTER * len(text) + 5
            elif child.tag == "svg":
                styled = re.search(r"width:\s*([\d.]+)px", child.attributes.get("style", ""))
                fallback = 64.0 if "demo" in child.classes else 11.0
                wide = float(styled.group(1)) if styled else _pixels(child.attributes.get("width"), fallback)
                self.drawing(child, x, y + 3, wide)
                x += wide + 6
            elif {"stop", "swatch", "key"} & set(child.classes):
                text = child.text()
                wide = max(LETTER * len(text) + 12, 22.0)
                fill, opacity = solid(self.raw(child, "border-color" if "key" in child.classes else "background", "none"))
                tall = 2.0 if "key" in child.classes else 16.0
                self.parts.append(
                    f'<rect x="{x:g}" y="{y + (16 - tall) / 2 + 1:g}" width="{wide:g}" height="{tall:g}" rx="1" '
                    f'fill="{escape(fill)}" fill-opacity="{opacity or 1}"/>'
                )
                if text:
                    self.text(text, x + 6, y + 13)
                x += wide + 3
            else:
                x = self.entry(child, x, y)
        return x

    def color(self, node: Node, name: str, default: str) -> str:
        """Return a color of an element as hexadecimal digits."""
        return solid(self.raw(node, name, default))[0]

    def raw(self, node: Node, name: str, default: str) -> str:
        """Return a property of an element with its variables replaced."""
        around = [node, *node.above()]
        value = self.styles.resolved(self.styles.own(node).get(name, default), around)
        return value if value.startswith(("#", "rgb(")) else default if default.startswith("#") else SOFT


def _room(node: Node) -> float:
    """Return the width of a drawing that fills its column: 560 pixels, or the least width that the page gives it."""
    styles = (n.attributes.get("style", "") for n in node.above())
    return max([WIDE, *(float(found.group(1)) for style in styles if (found := re.search(r"min-width:\s*([\d.]+)px", style)))])


def _pixels(value: str | None, whole: float, default: float | None = None) -> float:
    """Return a length in pixels: a number, or a share of `whole`; `whole` without a value, or the default if one is given."""
    if not value:
        return whole if default is None else default
    return _share(value, whole)


def _share(value: str, whole: float) -> float:
    return float(value.removesuffix("%")) * whole / 100 if value.endswith("%") else float(value.removesuffix("px") or 0)
