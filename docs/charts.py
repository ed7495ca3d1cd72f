"""Panels of the figures in docs/: rows with a common horizontal axis, as SVG."""

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
        parts = [f'<text x="{self.left + self.width / 2}" y="{bottom + 38}" text-anchor="middle">{self.title}</text>']
        for tick in self.ticks:
            x = self.x(tick)
            parts.append(f'<path d="M{x} {top - 8}V{bottom}" stroke="{RULE}"/>')
            parts.append(
                f'<text x="{x}" y="{bottom + 18}" text-anchor="middle" font-size="12" fill="{GREY}">{self.text(tick)}</text>'
            )
        return parts


def document(width: int, height: int, parts: Sequence[str]) -> str:
    """Return an SVG document on white."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="system-ui, sans-serif" font-size="14">'
    )
    return "\n".join([head, f'<rect width="{width}" height="{height}" fill="#fff"/>', *parts, "</svg>"]) + "\n"
