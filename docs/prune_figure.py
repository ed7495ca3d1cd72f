"""Draw the figure of pruned models in docs/growing-results.md: perplexity and retention of every arm, pruned and trained."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from charts import GREY, Panel, document, dot, shares, words

LEFT, PANEL, GAP, ROW, TOP, MARGIN = 150, 300, 40, 30, 62, 14
BEFORE, AFTER = "#b45309", "#1d4ed8"


def figure(found: dict[str, Any]) -> str:
    """Return the figure as an SVG document.

    Args:
        found: The results file of benchmarks/prune.py.
    """
    rows = found["rows"]
    height = TOP + ROW * len(rows) + 44
    width = LEFT + 2 * PANEL + GAP + 2 * MARGIN
    parts = _legend()
    charts: tuple[tuple[Panel, Callable[[Any], float], Callable[[Any], Any]], ...] = (
        (_perplexities(found), lambda state: state["perplexity"], lambda _state: None),
        (
            shares(LEFT + PANEL + GAP, PANEL, "retention, %"),
            lambda state: state["retention"]["value"],
            lambda state: state["retention"],
        ),
    )
    for panel, value, interval in charts:
        parts += panel.axes(TOP, TOP + ROW * len(rows))
        x = panel.x(value(found["before"]))
        parts.append(f'<path d="M{x} {TOP - 8}V{TOP + ROW * len(rows)}" stroke="{GREY}" stroke-dasharray="4 3"/>')
        for number, row in enumerate(rows):
            parts += _marks(panel, TOP + ROW * number + ROW // 2, row, value, interval)
    for number, row in enumerate(rows):
        y = TOP + ROW * number + ROW // 2 + 5
        parts.append(words(LEFT - 14, y, row["arm"], text_anchor="end"))
    return document(width, height, parts)


def _perplexities(found: dict[str, Any]) -> Panel:
    """Return the panel of perplexities, on a logarithmic scale."""
    values = [state["perplexity"] for row in found["rows"] for state in (row["pruned"], row["trained"])]
    low, high = math.log10(found["before"]["perplexity"]) - 0.05, math.log10(max(values)) + 0.1
    bases, every = ((1, 3) if high - low < 2 else (1,)), math.ceil((high - low) / 5)
    powers = range(math.floor(low), math.ceil(high) + 1, every)
    ticks = [base * 10.0**power for power in powers for base in bases if low <= math.log10(base) + power <= high]
    return Panel(LEFT, PANEL, "perplexity", ticks, lambda value: (math.log10(value) - low) / (high - low), _tick)


def _tick(value: float) -> str:
    """Return the label of a perplexity: "300", "1,000" or "10⁶"."""
    power = str(round(math.log10(value))).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{value:,.0f}" if value < 1e5 else f"10{power}"


def _marks(
    panel: Panel, y: int, row: dict[str, Any], value: Callable[[dict[str, Any]], float], interval: Callable[[dict[str, Any]], Any]
) -> list[str]:
    """Return the two dots of an arm with the line between them, and the interval of the trained model."""
    before, after = (panel.x(value(row[state])) for state in ("pruned", "trained"))
    parts = [f'<path d="M{before} {y}H{after}" stroke="#999" stroke-width="2"/>']
    whisker = interval(row["trained"])
    if whisker is not None and whisker["low"] is not None:
        low, high = panel.x(whisker["low"]), panel.x(whisker["high"])
        parts.append(f'<path d="M{low} {y - 4}V{y + 4}M{high} {y - 4}V{y + 4}M{low} {y}H{high}" stroke="{AFTER}"/>')
    return [*parts, dot(before, y, "#fff", BEFORE), dot(after, y, AFTER)]


def _legend() -> list[str]:
    """Return the legend above the panels."""
    y = 24
    return [
        dot(LEFT + 6, y - 5, "#fff", BEFORE),
        words(LEFT + 18, y, "pruned"),
        dot(LEFT + 96, y - 5, AFTER),
        words(LEFT + 108, y, "pruned, then trained"),
        f'<path d="M{LEFT + 270} {y - 5}h24" stroke="{GREY}" stroke-dasharray="4 3"/>',
        words(LEFT + 300, y, "the model before"),
    ]
