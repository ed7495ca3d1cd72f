"""The section of function scores on the page of a model's neurons."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from workbench.report.curves import Chart, Curve, Level, Scales, Tints, chart, tinted
from workbench.report.numbers import plural
from workbench.report.sections import Section
from workbench.report.tints import SHARES


def functions_section(document: Mapping[str, Any]) -> Section:
    """Return the section of function scores."""
    rows, nulls = document["functions"], document["nulls"]["train"]
    data, count = document["data"], sum(document["neurons"].values())
    unit, layers = document["unit"], len(document["neurons"])
    strongest = "task" if "task" in nulls else "item"
    proved = [row["function"] for row in rows if row["beyond"][strongest]["both"]]
    by_chance = _chance(document)
    rest = [row["function"] for row in rows if row["function"] not in proved]
    lead = [
        f"{count:,} {unit} in {plural(layers, 'layer')}, scored on {data['items']:,} texts ({data['tokens']:,} tokens). FuncScore is the "
        "average precision of a neuron's mean activation on a text against the text's function.",
        _claim(proved, rest, strongest),
    ]
    columns = ["function", "best per layer", "top 5‰", "mean", "chance"]
    columns += [f"beyond {null} null" for null in nulls] + [
        "on both splits",
        "overlap",
        "other functions",
        "length",
        "language",
        "wording",
    ]
    table = []
    for row in rows:
        features = row["confounders"]
        table.append(
            [
                row["function"],
                f"{row['best_median']:.2f} / {row['best_max']:.2f}",
                f"{row['top']:.2f}",
                f"{row['mean']:.3f}",
                f"{row['prevalence']:.3f}",
                *(f"{row['beyond'][null]['train']:,}" for null in nulls),
                f"{row['beyond'][strongest]['both']:,}",
                f"{row['overlap']:.2f}",
                f"{row['overlap_others']:.2f}",
                *(f"{features[name]:.2f}" for name in ("length", "language", "template")),
            ]
        )
    return Section(
        "functions",
        "Functions",
        lead,
        columns,
        table,
        _NOTES,
        _layer_charts(document),
        (
            ("main", "best neuron of a layer"),
            ("second", "5 in 1000 are better"),
            ("third", "mean of the layer"),
            *(
                (f"level {null}", f"best by chance, labels shuffled over {null}s ({100 * (1 - nulls[null]['level']):.3g} %)")
                for null in nulls
            ),
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
    "beyond item null": "neurons that beat the best neuron of a layer on labels shuffled over texts (99 %)",
    "beyond task null": "neurons that beat the best neuron of a layer on labels shuffled over whole tasks (99 %)",
    "on both splits": "of those under the last null, neurons that also beat it on the held-out tasks",
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


def _claim(proved: Sequence[str], rest: Sequence[str], null: str) -> str:
    """Return what the nulls allow to say."""
    if not proved:
        text = "No function has a neuron that beats chance on both splits of its tasks"
    else:
        text = f"Single neurons tell {_listed(proved)} from other functions on tasks that did not choose them"
    if rest and proved:
        text += f"; for {_listed(rest)} no neuron does"
    return text + (
        " (labels shuffled over whole tasks)."
        if null == "task"
        else " (labels shuffled over texts; no function has several tasks)."
    )


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _layer_charts(document: Mapping[str, Any]) -> list[Chart]:
    rows = document["layers"]["train"]
    layers = sorted({row["layer"] for row in rows})
    marks = [layer for layer in layers if layer % 5 == 0] if len(layers) > 12 else layers
    scales = Scales((layers[0], layers[-1]), (0, 1), (0, 0.5, 1), marks, "{:.2f}".format, lambda v: f"{v:.0f}")
    levels = [Level(f"labels shuffled over {null}s", limit["layer"], null) for null, limit in document["nulls"]["train"].items()]
    charts = []
    for row in document["functions"]:
        own = [entry for entry in rows if entry["function"] == row["function"]]
        curves = [
            Curve(name, [(entry["layer"], entry[key]) for entry in own], kind)
            for name, key, kind in (("mean", "mean", "third"), ("top 5‰", "top", "second"), ("best", "best", "main"))
        ]
        charts.append(
            chart(row["function"], curves, scales, levels, f"{row['layers_above_0.8']} of {len(layers)} layers above 0.8")
        )
    return charts


def _settings(document: Mapping[str, Any]) -> list[str]:
    s, data = document["settings"], document["data"]
    tasks = "; ".join(
        f"{name}: {', '.join(splits['train'])} choose, {', '.join(splits['heldout'])} judge"
        for name, splits in data["tasks"].items()
    )
    return [
        f"Texts: {data['file']}. {tasks}.",
        f"Score of a text: {'mean of |activation|' if s['score'] == 'mean_abs' else 'largest activation'} over the "
        f"{'prompt' if s['part'] == 'prompt' else 'whole text'} without the first {plural(s['skip'], 'token')}. Sets: the best "
        f"{100 * s['share']:g} % of {'every layer' if s['per'] == 'layer' else 'the model'}. {plural(s['draws'], 'shuffled labeling')} per null, "
        f"seed {s['seed']}. {document['residents']} neurons are among the {100 * s['resident']:g} % most active ones of their layer on every function.",
    ]
