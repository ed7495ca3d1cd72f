"""The section of function scores on the page of a model's neurons."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from workbench.report.chart import Chart, Curve, Scales, chart
from workbench.report.numbers import plural
from workbench.report.sections import Section
from workbench.report.tints import SHARES, Tints, tinted


def functions_section(document: Mapping[str, Any]) -> Section:
    """Return the section of function scores."""
    rows = document["functions"]
    data, count = document["data"], sum(document["neurons"].values())
    unit, layers = document["unit"], len(document["neurons"])
    by_chance = _chance(document)
    lead = [
        f"{count:,} {unit} in {plural(layers, 'layer')}, scored on {data['items']:,} texts ({data['tokens']:,} tokens). FuncScore is the "
        "average precision of a neuron's mean activation on a text against the text's function.",
        _claim(rows, unit),
    ]
    columns = ["function", "best per layer", "top 5‰", "mean", "chance", "found", "largest effect", "findable from", "overlap"]
    columns += ["other functions", "length", "language", "wording"]
    return Section(
        "functions",
        "Functions",
        lead,
        columns,
        [function_cells(row) for row in rows],
        _NOTES,
        _layer_charts(document),
        (
            ("main", "best neuron of a layer"),
            ("second", "5 in 1000 are better"),
            ("third", "mean of the layer"),
        ),
        (
            tinted(
                "Overlap of the functions' sets",
                f"Share of the neurons of two sets that are the same; {document['settings']['share']:.2f} by chance.",
                "set of",
                list(document["overlap"]),
                [(name, [row[other] for other in document["overlap"]]) for name, row in document["overlap"].items()],
                Tints(
                    "{:.2f}".format,
                    SHARES,
                    neutral="not above what 97.5 % of random sets share",
                    band=lambda row, column: by_chance,
                ),
            ),
        ),
        _settings(document),
    )


_NOTES = {
    "best per layer": "score of the best neuron of a layer: median over layers / largest",
    "top 5‰": "score that 5 in 1000 neurons of a layer exceed, mean over layers",
    "chance": "share of the function's texts: the expected score of a random neuron",
    "found": "neurons that serve the function: their effect exceeds the largest of all neurons and functions that chance gives (95 %, tasks "
    "assigned to functions anew)",
    "largest effect": "mean activation (its root) on the function's tasks above that on other tasks, in standard deviations over tasks",
    "findable from": "smallest effect with which a neuron is found; more tasks lower it",
    "overlap": "share of the set chosen on the train tasks that the held-out tasks would choose too",
    "other functions": "the same with the sets that the held-out tasks choose for other functions",
    "length": "AUC of the prompt's length alone",
    "language": "AUC of the share of letters outside ASCII alone",
    "wording": "AUC of the first three words alone",
}


def _chance(document: Mapping[str, Any]) -> tuple[float, float]:
    """Return the range of overlaps of random sets, from 0 to the value that 97.5 % of them do not exceed.

    The number of common neurons in a layer is hypergeometric: k of N neurons in both sets share k²/N on average, with the variance
    k²·(N − k)² / (N²·(N − 1)).
    """
    share, counts = document["settings"]["share"], list(document["neurons"].values())
    if document["settings"]["per"] != "layer":
        counts = [sum(counts)]
    sizes = [(max(1, round(share * n)), n) for n in counts]
    variance = sum(k**2 * (n - k) ** 2 / (n**2 * (n - 1)) for k, n in sizes if n > 1)
    total = sum(k for k, _ in sizes)
    return 0.0, sum(k**2 / n for k, n in sizes) / total + 1.96 * math.sqrt(variance) / total


def function_cells(row: Mapping[str, Any]) -> list[str]:
    """Return the cells of a function: scores beside chance, what the test finds, overlap of sets, and AUC of plain features."""
    return [
        row["function"],
        f"{row['best_median']:.2f} / {row['best_max']:.2f}",
        f"{row['top']:.2f}",
        f"{row['mean']:.3f}",
        f"{row['prevalence']:.3f}",
        *found_cells(row),
        f"{row['overlap']:.2f}",
        f"{row['overlap_others']:.2f}",
        *(f"{row['confounders'][name]:.2f}" for name in ("length", "language", "template")),
    ]


def found_cells(row: Mapping[str, Any]) -> tuple[str, str, str]:
    """Return what the test finds for a function: number of neurons, largest effect, and effect from which a neuron is found."""
    smallest = row["smallest_effect"]
    found = f"{row['found']:,}" if smallest is not None else "no power"
    return found, f"{row['largest_effect']:.1f}", f"{smallest:.1f}" if smallest is not None else ""


def _claim(rows: Sequence[Mapping[str, Any]], unit: str) -> str:
    """Return what the test allows to say."""
    tested = [row for row in rows if row["smallest_effect"] is not None]
    found = [row["function"] for row in tested if row["found"]]
    none = [row["function"] for row in tested if not row["found"]]
    parts = []
    if found:
        parts.append(
            f"Single {unit} serve {_listed(found)}: on their tasks they are more active than chance explains in the whole model"
        )
    if none:
        parts.append(f"For {_listed(none)} none is found; effects below that of the column 'findable from' stay unseen")
    if powerless := [row["function"] for row in rows if row["smallest_effect"] is None]:
        parts.append(f"For {_listed(powerless)} the test has no power: it needs more tasks")
    return ". ".join(parts) + "."


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _layer_charts(document: Mapping[str, Any]) -> list[Chart]:
    rows = document["layers"]["train"]
    layers = sorted({row["layer"] for row in rows})
    marks = [layer for layer in layers if layer % 5 == 0] if len(layers) > 12 else layers
    scales = Scales((layers[0], layers[-1]), (0, 1), (0, 0.5, 1), marks, "{:.2f}".format, lambda v: f"{v:.0f}")
    charts = []
    for row in document["functions"]:
        own = [entry for entry in rows if entry["function"] == row["function"]]
        curves = [
            Curve(name, [(entry["layer"], entry[key]) for entry in own], kind)
            for name, key, kind in (("mean", "mean", "third"), ("top 5‰", "top", "second"), ("best", "best", "main"))
        ]
        charts.append(chart(row["function"], curves, scales, (), f"{row['layers_above_0.8']} of {len(layers)} layers above 0.8"))
    return charts


def _settings(document: Mapping[str, Any]) -> list[str]:
    s, t, data = document["settings"], document["test"], document["data"]
    tasks = "; ".join(
        f"{name}: {', '.join(splits['train'])} choose, {', '.join(splits['heldout'])} judge"
        for name, splits in data["tasks"].items()
    )
    return [
        f"Texts: {data['file']}. {tasks}.",
        f"Score of a text: {'mean of |activation|' if s['score'] == 'mean_abs' else 'largest activation'} over the "
        f"{'prompt' if s['part'] == 'prompt' else 'whole text'} without the first {plural(s['skip'], 'token')}. Sets: the best "
        f"{100 * s['share']:g} % of {'every layer' if s['per'] == 'layer' else 'the model'}. The test assigns {t['tasks']} tasks to "
        f"functions {t['draws']:,} times, seed {s['seed']}. {document['residents']} neurons are among the {100 * s['resident']:g} % most active ones of their layer on every function.",
    ]
