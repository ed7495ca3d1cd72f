"""The section of a decomposition's metrics on the page of a model's neurons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from workbench.report.chart import Chart, Curve, Scales, chart
from workbench.report.numbers import MISSING, fixed, plural
from workbench.report.sections import Section
from workbench.report.tints import CHANGES, SCALES, TintedTable, Tints, tinted


def decomposition_section(document: Mapping[str, Any]) -> Section:
    """Return the section of sparsity, coupling, redundancy and conflict."""
    parts, cosines = document["decompositions"], document["cosines"]
    kept = f"{100 * document['settings']['kept']:g} %"
    least = f"least share for {kept}"
    lead = [
        "Two metrics on one scale for bricks of a recipe and for sets of neurons. Sparsity: the least share of the bricks that keeps "
        f"{kept} of the quality, where 0 is the quality without any brick. Coupling: the damage to other functions over that to the own "
        "function when a brick is left out; 0 is independent, 1 harms all functions alike.",
        *([_claim(cosines)] if cosines else []),
    ]
    rows = []
    for part in parts:
        rows.append([_origin(part), "all", _coupling(part), *_curve_cells(part["curve"])])
        rows += [["", row["function"], _two(row["coupling"]), *_curve_cells(row["curve"])] for row in part["functions"]]
    return Section(
        "decomposition",
        "Decomposition",
        lead,
        ["bricks", "function", "coupling", least, "area"],
        rows,
        {
            "coupling": "mean damage to other functions / damage to the own one; over all functions the median, with its 95 % interval",
            least: "all larger sets keep it too",
            "area": "area under quality against the share kept; 1 is reached at once, 0.5 grows evenly",
        },
        [_chart(part) for part in parts if _curves(part)],
        (("main", "all functions"), ("third", "one function")),
        _matrices(document),
        _details(document),
    )


def _origin(part: Mapping[str, Any]) -> str:
    return f"{part['origin']}: {plural(part['parts'], part['unit'].removesuffix('s'))}"


def _coupling(part: Mapping[str, Any]) -> str:
    low, high = part["interval"]
    return _two(part["coupling"]) + ("" if low is None or high is None else f" [{low:.2f}, {high:.2f}]")


def _curve_cells(curve: Mapping[str, Any] | None) -> list[str]:
    return [MISSING, MISSING] if curve is None else [f"{100 * curve['least_share']:.0f} %", f"{curve['area']:.2f}"]


def _two(value: float | None) -> str:
    return MISSING if value is None else fixed(value, 2)


def _claim(cosines: Mapping[str, Any]) -> str:
    """Return which bricks are nearest to each other, and which are in conflict."""
    function = cosines["function"]
    matrix = function["mean"] if function else cosines["weight"]
    space = "function space" if function else "weight space"
    pairs = [
        (matrix[i][j], f"{cosines['names'][i]} and {cosines['names'][j]}", cosines["weight"][i][j])
        for i, j in combinations(range(len(cosines["names"])), 2)
        if matrix[i][j] is not None
    ]
    if not pairs:
        return "No two bricks change the same places, so that they have no cosines."
    value, names, weight = max(pairs)
    text = f"The nearest bricks in {space} are {names} (cosine {fixed(value, 2)}"
    text += f", in weight space {_two(weight)})" if function else ")"
    if opposed := [f"{names} ({fixed(value, 2)})" for value, names, _ in sorted(pairs) if value < 0]:
        return f"{text}; against each other work {', '.join(opposed)}."
    return f"{text}; no two bricks work against each other."


def _curves(part: Mapping[str, Any]) -> list[Curve]:
    """Return the curves of the functions and of all functions; a dot before the first share stands for no bricks."""
    named = [(row["function"], row["curve"], "third") for row in part["functions"]] + [("all functions", part["curve"], "main")]
    return [
        Curve(name, [(0.0, 0.0), *zip(curve["shares"], curve["quality"], strict=True)], kind)
        for name, curve, kind in named
        if curve is not None
    ]


def _chart(part: Mapping[str, Any]) -> Chart:
    curves = _curves(part)
    top = max(1.0, *(y for curve in curves for _, y in curve.points))
    low = min(0.0, *(y for curve in curves for _, y in curve.points))
    scales = Scales((0, 1), (low, top), (0, 0.5, 1), (0, 0.5, 1), "{:.2f}".format, lambda v: f"{100 * v:.0f} %")
    return chart(f"Quality, {part['origin']}", curves, scales, note=f"share of the {part['unit']} kept")


def _matrices(document: Mapping[str, Any]) -> list[TintedTable]:
    tables = []
    for part in document["decompositions"]:
        if part["origin"] == "customized" and part["changes"]:
            names = [row["function"] for row in part["functions"]]
            values = [(n, [100 * (v or 0.0) for v in row]) for n, row in zip(names, part["changes"], strict=True)]
            tables.append(
                tinted(
                    "One brick left out",
                    "Change of perplexity in percent; a row is left out, a column measured.",
                    "without",
                    names,
                    values,
                    Tints(lambda value: fixed(value, 0), CHANGES, " %", "a change below 1 %"),
                )
            )
    if cosines := document["cosines"]:
        tables.append(_cosine_table("Cosine in weight space", "Of the bricks' deltas.", cosines["names"], cosines["weight"]))
        if function := cosines["function"]:
            caption = f"Of the changes to the layers' outputs on {function['tokens']} tokens, mean over layers."
            tables.append(_cosine_table("Cosine in function space", caption, cosines["names"], function["mean"]))
    return tables


def _cosine_table(title: str, caption: str, names: Sequence[str], matrix: Sequence[Sequence[float | None]]) -> TintedTable:
    values = [(name, [float("nan") if v is None else v for v in row]) for name, row in zip(names, matrix, strict=True)]
    return tinted(title, caption, "brick", names, values, Tints(lambda v: MISSING if v != v else fixed(v, 2), SCALES["cosine"]))


def _details(document: Mapping[str, Any]) -> list[str]:
    lines = []
    for part in document["decompositions"]:
        what = (
            "each function's curve adds bricks by what leaving them out costs the function"
            if part["origin"] == "customized"
            else "each token keeps its most active neurons in every layer, coupling is that of the functions' sets"
        )
        tokens = "responses" if part["scored"] == "response" else "whole texts"
        lines.append(
            f"{part['origin'].capitalize()}: {plural(part['items'], 'text')}; {what}. Quality: loss of {tokens}, as a share of the way "
            "from no bricks to all."
        )
        lines += [f"{part['origin'].capitalize()}: {note}." for note in part["notes"]]
    return lines
