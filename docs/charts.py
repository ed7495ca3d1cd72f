"""Draw the figures in docs/ as SVG: panels of rows with a common horizontal axis, dots and words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

GREY, RULE = "#555", "#ddd"


@dataclass(frozen=True)
class Panel:
    """A chart with one horizontal axis.

    Attributes:
        left: Its left edge.
        width: Its width.
        title: What it shows.
        ticks: Values of its vertical lines.
        place: Function from a value to a horizontal position between 0 and 1.
        text: Function from a tick to its label.
    """

    left: int
    width: int
    title: str
    ticks: Sequence[float]
    place: Callable[[float], float]
    text: Callable[[float], str]

    def x(self, value: float) -> float:
        """Return the horizontal position of a value in the figure."""
        return round(self.left + self.width * min(1.0, max(0.0, self.place(value))), 1)

    def axes(self, top: int, bottom: int) -> list[str]:
        """Return the title, the vertical lines and their labels."""
        parts = [words(self.left + self.width / 2, bottom + 38, self.title, text_anchor="middle")]
        for tick in self.ticks:
            x = self.x(tick)
            parts.append(f'<path d="M{x} {top - 8}V{bottom}" stroke="{RULE}"/>')
            parts.append(words(x, bottom + 18, self.text(tick), text_anchor="middle", font_size="12", fill=GREY))
        return parts


def shares(left: int, width: int, title: str, place: Callable[[float], float] = lambda value: value) -> Panel:
    """Return a panel from 0 to 100 %."""
    return Panel(left, width, title, [0.0, 0.25, 0.5, 0.75, 1.0], place, lambda value: f"{100 * value:.0f}")


def dot(x: float, y: float, fill: str, edge: str = "") -> str:
    """Return a dot, with an edge if that has a color."""
    edged = f' stroke="{edge}" stroke-width="2"' if edge else ""
    return f'<circle cx="{x}" cy="{y}" r="5" fill="{fill}"{edged}/>'


def words(x: float, y: float, text: str, **style: str) -> str:
    """Return a text whose attributes are `style`, with a hyphen for each underscore."""
    attributes = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in style.items())
    return f'<text x="{x}" y="{y}"{attributes}>{text}</text>'


def document(width: int, height: int, parts: Sequence[str]) -> str:
    """Return an SVG document on white."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="system-ui, sans-serif" font-size="14">'
    )
    return "\n".join([head, f'<rect width="{width}" height="{height}" fill="#fff"/>', *parts, "</svg>"]) + "\n"
