"""The section of a merge's sets of neurons beside those of its base and bricks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from workbench.report.chart import Chart, Curve, Level, Scales, chart
from workbench.report.numbers import fixed, listed, plural
from workbench.report.sections import Section
from workbench.report.tints import SHARES, Tints, tinted

NAMED = 5
"""Largest number of models whose names fit below a chart."""
LETTERS = 8


def beside_section(document: Mapping[str, Any]) -> Section:
    """Return the section on what merging did to the functional sets."""
    models, functions, chance = document["models"], document["functions"], document["settings"]["share"]
    names, parents = [model["name"] for model in models], [model["name"] for model in models[:-1]]
    lead = [
        f"Each of {plural(len(models), 'model')} chooses its sets on the same train tasks: the base, each brick alone on it, and the merge. "
        "Sets are judged on the held-out tasks.",
        _claim(document),
    ]
    rows = [
        [
            row["function"],
            *(f"{fixed(m['score'], 2)} → {fixed(m['score_in_merge'], 2)}" for m in row["models"][:-1]),
            fixed(row["models"][-1]["score"], 2),
        ]
        for row in functions
    ]
    overlap = tinted(
        "Sets that survive",
        f"Share of a model's set that is in the merge's set too; {chance:.2f} by chance.",
        "set of",
        parents,
        [(row["function"], [m["in_merge"] for m in row["models"][:-1]]) for row in functions],
        Tints("{:.2f}".format, SHARES, neutral="not above the share by chance", band=lambda row, column: (0.0, chance)),
    )
    scores = tinted(
        "Score of the function",
        "Held-out score that 5 in 1000 neurons of a layer exceed.",
        "function",
        names,
        [(row["function"], [m["top"] for m in row["models"]]) for row in functions],
        Tints("{:.2f}".format, SHARES),
    )
    return Section(
        "beside",
        "What merging did to the functional sets",
        lead,
        ["function", *parents, names[-1]],
        rows,
        dict.fromkeys(parents, "mean held-out score of its set in its own model → of the same neurons in the merge"),
        [_chart(row, names, chance) for row in functions],
        (
            ("main", "score of the model's own set"),
            ("second", "share of the set in the merge's set"),
            ("level", "share by chance"),
        ),
        (overlap, scores),
        [f"Texts: {document['data']['file']}. Below the charts, from left to right: {', '.join(names)}."],
    )


def _claim(document: Mapping[str, Any]) -> str:
    """Return how much of the base's and the bricks' sets the merge keeps, and where it keeps least."""
    functions = document["functions"]
    kept = {row["function"]: row["models"][0]["in_merge"] for row in functions}
    mean = sum(kept.values()) / len(kept)
    least = min(kept, key=lambda name: kept[name])
    bricks = [m["in_merge"] for row in functions for m in row["models"][1:-1]]
    lost = [
        row["function"]
        for row in functions
        if (base := row["models"][0])["score_in_merge"] < base["score"] - 0.05
        and row["models"][-1]["score"] < base["score"] - 0.05
    ]
    text = (
        f"On average {100 * mean:.0f} % of a set of the base and {100 * sum(bricks) / len(bricks):.0f} % of a set of a brick are in the merge's "
        f"set too; least of the base for {least} ({100 * kept[least]:.0f} %)."
    )
    if lost:
        return f"{text} The sets of {listed(lost)} score lower than in the base by more than 0.05."
    return f"{text} No function's set scores lower than in the base by more than 0.05."


def _chart(row: Mapping[str, Any], names: list[str], chance: float) -> Chart:
    places = range(len(names))
    curves = [
        Curve("share in the merge's set", [(i, m["in_merge"]) for i, m in zip(places, row["models"], strict=True)], "second"),
        Curve("score", [(i, m["score"]) for i, m in zip(places, row["models"], strict=True)], "main"),
    ]
    short = [name if len(name) <= LETTERS else f"{name[: LETTERS - 1]}…" for name in names]
    labels = short if len(names) <= NAMED else [str(i + 1) for i in places]
    scales = Scales((-0.3, len(names) - 0.7), (0, 1), (0, 0.5, 1), places, "{:.2f}".format, lambda v: labels[round(v)])
    return chart(row["function"], curves, scales, [Level("share by chance", chance, "")])
