"""Draw the figure of docs/merging.md: what merges of pools of bricks keep, beside the advice and the best of the grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from charts import GREY, RULE, Panel, document, dot, shares, words

LEFT, PANEL, GAP, ROW, TOP, MARGIN = 190, 290, 40, 25, 66, 14
ARMS = {
    "average": ("average", "#b45309"),
    "sum, auto": ("sum, weights: auto", "#1d4ed8"),
    "tsv, auto": ("tsv, weights: auto", "#15803d"),
}
FAMILIES = {"starter": "starter base", "llama": "small Llamas, far from their base"}
KINDS = {
    "different skills": ("disjoint-3", "disjoint-6", "ranks 4, 16, 64", "modules", "full and adapters", "full-3"),
    "partly one skill": ("partial", "same-2 and another"),
    "one skill": ("same-3", "same, ranks 4, 16, 64", "full-same-3"),
}


def figure(found: dict[str, Any]) -> str:
    """Return the figure as an SVG document.

    Args:
        found: The results file of benchmarks/merge_pools.py.
    """
    rows = found["rows"]
    measured = {row["pool"] for row in rows}
    lines: list[tuple[str, bool]] = []  # text, and whether it is a heading
    for kind, pools in KINDS.items():
        if present := [pool for pool in pools if pool in measured]:
            lines += [(kind, True), *((pool, False) for pool in present)]
    families = [family for family in FAMILIES if any(row["family"] == family for row in rows)]
    bottom = TOP + ROW * len(lines)
    width = LEFT + len(families) * (PANEL + GAP) + MARGIN
    parts = _legend()
    for number, family in enumerate(families):
        panel = shares(LEFT + number * (PANEL + GAP), PANEL, f"{FAMILIES[family]}: % kept", lambda value: (value + 0.04) / 1.18)
        parts += panel.axes(TOP, bottom)
        for place, (line, _) in enumerate(lines):
            same = [row for row in rows if (row["family"], row["pool"]) == (family, line)]
            parts += _marks(panel, TOP + ROW * place + ROW // 2, same, found["grid"]) if same else []
    for place, (line, heading) in enumerate(lines):
        y = TOP + ROW * place + ROW // 2 + 5
        style = {"font_weight": "600"} if heading else {"fill": GREY}
        parts.append(words(LEFT - 14, y, line, text_anchor="end", **style))
        if heading and place:
            parts.append(f'<path d="M{MARGIN} {y - 18}H{width - MARGIN}" stroke="{RULE}"/>')
    return document(width, bottom + 50, parts)


def kept(rows: Sequence[Mapping[str, Any]], arm: str) -> float | None:
    """Return what a merge keeps of the bricks' gain, the mean over the rows of one pool; None if no brick learned its task."""
    values = [row["scores"][arm]["kept"] for row in rows if row["scores"][arm]["kept"] is not None]
    return sum(values) / len(values) if values else None


def advised(row: Mapping[str, Any], grid: Mapping[str, Any]) -> str | None:
    """Return the configuration of the grid that the advice recommends; None if it recommends no merge."""
    return next((name for name, step in grid.items() if step == row["recommended"]), None)


def _marks(panel: Panel, y: int, rows: Sequence[Mapping[str, Any]], grid: Mapping[str, Any]) -> list[str]:
    """Return the dots of a pool, the bar of the grid's best, and the ring around what the advice recommends."""
    values = {arm: value for arm in grid if (value := kept(rows, arm)) is not None}
    if not values:
        return []
    best = panel.x(max(values.values()))
    parts = [f'<path d="M{best} {y - 9}V{y + 9}" stroke="{GREY}" stroke-width="2"/>']
    parts += [dot(panel.x(values[arm]), y, color) for arm, (_, color) in ARMS.items()]
    recommended = dict.fromkeys(advised(row, grid) for row in rows)
    return parts + [_ring(panel.x(values[arm]), y) for arm in recommended if arm is not None]


def _legend() -> list[str]:
    """Return the legend above the panels."""
    parts, x, y = [], MARGIN + 6, 26
    for text, color in ARMS.values():
        parts.append(dot(x, y - 5, color) + words(x + 12, y, text))
        x += 40 + 8 * len(text)
    parts.append(f'<path d="M{x} {y - 14}V{y + 4}" stroke="{GREY}" stroke-width="2"/>' + words(x + 10, y, "best of the grid"))
    x += 140
    return [*parts, _ring(x, y - 5) + words(x + 16, y, "what brick advise recommends")]


def _ring(x: float, y: float) -> str:
    return f'<circle cx="{x}" cy="{y}" r="9" fill="none" stroke="#000" stroke-width="1.5"/>'
