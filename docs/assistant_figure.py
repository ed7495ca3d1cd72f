"""Draw the figure of docs/assistant.md: the score of each task by the base, the assistant, and the assistant with a brick more and one less."""

from __future__ import annotations

from typing import Any

from charts import GREY, document, dot, shares, words

RESULTS, FIGURE = "benchmarks/results/assistant.json", "assistant.svg"
LEFT, PANEL, ROW, TOP, MARGIN = 170, 420, 28, 62, 14
STATES = {"base": ("base", GREY), "before": ("assistant", "#b45309"), "after": ("changed", "#1d4ed8")}


def figure(found: dict[str, Any]) -> str:
    """Return the figure as an SVG document.

    Args:
        found: The results file of benchmarks/assistant.py.
    """
    tasks = list(found["before"])
    bottom = TOP + ROW * len(tasks)
    panel = shares(LEFT, PANEL, "% right")
    parts, x = panel.axes(TOP, bottom), MARGIN + 6
    for text, color in STATES.values():
        parts.append(dot(x, 21, color) + words(x + 12, 26, text))
        x += 40 + 8 * len(text)
    marks = {found["added"]: " (added)", found["removed"]: " (removed)"}
    for number, task in enumerate(tasks):
        y = TOP + ROW * number + ROW // 2
        parts.append(words(LEFT - 14, y + 5, task + marks.get(task, ""), text_anchor="end"))
        places = [panel.x(found[state][task]["value"]) for state in STATES]
        parts.append(f'<path d="M{min(places)} {y}H{max(places)}" stroke="{GREY}" stroke-opacity=".4"/>')
        # Equal scores lie side by side, one above the other.
        parts += [
            dot(place, y + 6 * (k - 1) * (places.count(place) > 1), STATES[s][1])
            for k, (s, place) in enumerate(zip(STATES, places, strict=True))
        ]
    return document(LEFT + PANEL + 2 * MARGIN, bottom + 50, parts)
