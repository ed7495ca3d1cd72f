"""The page of a model's neurons: a section for each analysis, beside its tests and controls."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from workbench.files import write_bytes
from workbench.neurons.ablation import AblationResult
from workbench.neurons.damage import Damage
from workbench.neurons.function_scores import RESIDENT
from workbench.neurons.functions import FunctionRow, FunctionsResult
from workbench.neurons.locate import KnowledgeResult
from workbench.neurons.masking import MaskCurve, SparsityResult
from workbench.neurons.partition import PartitionResult
from workbench.neurons.sparsity import Distribution
from workbench.neurons.subject import ModelResult
from workbench.report.chart import Chart, Curve, Level, Scales, chart
from workbench.report.files import with_tables
from workbench.report.neurons_more import Section, facts_section, layer_marks, partition_section, with_ends
from workbench.report.numbers import MISSING, listed, plural
from workbench.report.page import filled
from workbench.report.tints import CHANGES, SHARES, TintedTable, Tints, tinted

SCRIPTS, STYLES = ("report.js", "downloads.js"), ("report.css", "curves.css", "heat.css", "neurons.css")
HIGHEST = 2.0
"""Rise of the loss in nats at the top of charts; larger ones lie on the edge."""
NAMED, LETTERS = 5, 8
"""Largest number of models whose names fit below a chart, and letters of each."""


def render_neurons(results: Mapping[str, ModelResult], out: Path) -> Path:
    """Write a self-contained page of all analyses of a model, and return its path.

    Args:
        results: Kind of analysis -> its result.
        out: The HTML file.
    """
    first = next(iter(results.values()))
    texts = [data for result in results.values() if (data := getattr(result, "data", None)) is not None]
    sections = [SECTIONS[kind][1](result) for kind, result in results.items()]
    context = {
        "title": f"Neurons of {first.model}",
        "digest": first.digest,
        "sections": sections,
        "warnings": list(dict.fromkeys(warning for data in texts for warning in data.warnings)),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    tables = [table for section in sections for table in section.saved()]
    write_bytes(out, with_tables(filled("neurons.html.j2", context, SCRIPTS, STYLES), tables).encode())
    return out


def functions_section(result: FunctionsResult) -> Section:
    """Return the section of function scores."""
    data, settings = result.data, result.settings
    by_chance = random_overlap(settings.share, list(result.neurons.values()))
    columns = ["function", "best per layer", "top 5‰", "mean", "chance", "found", "largest effect", "findable from", "overlap"]
    columns += ["other functions", "length", "language", "wording"]
    overlap = tinted(
        "Overlap of the functions' sets",
        f"Share of the neurons of two sets that are the same; {settings.share:.2f} by chance.",
        "set of",
        list(result.overlap),
        [(name, [row[other] for other in result.overlap]) for name, row in result.overlap.items()],
        Tints("{:.2f}".format, SHARES, neutral="not above what 97.5 % of random sets share", band=lambda *_: by_chance),
    )
    tasks = "; ".join(
        f"{name}: {', '.join(splits['train'])} choose, {', '.join(splits['heldout'])} judge"
        for name, splits in (data.tasks or {}).items()
    )
    return Section(
        "functions",
        "Functions",
        [
            f"{sum(result.neurons.values()):,} {result.unit} in {plural(len(result.neurons), 'layer')}, scored on {data.items:,} texts "
            f"({data.tokens or 0:,} tokens). FuncScore is the average precision of a neuron's mean activation on a text against the text's "
            "function.",
            _found_claim(result.functions, result.unit),
        ],
        columns,
        [function_cells(row) for row in result.functions],
        _FUNCTION_NOTES,
        _layer_charts(result),
        (("main", "best neuron of a layer"), ("second", "5 in 1000 are better"), ("third", "mean of the layer")),
        (overlap,),
        [
            f"Texts: {data.file}. {tasks}.",
            f"Score of a text: mean of |activation| over the {'prompt' if settings.part == 'prompt' else 'whole text'} without the first token. "
            f"Sets: the best {100 * settings.share:g} % of every layer. The test assigns {result.test.tasks} tasks to functions "
            f"{result.test.draws:,} times, seed {settings.seed}. {result.residents} neurons are among the {100 * RESIDENT:g} % most active ones of "
            "their layer on every function.",
        ],
    )


_FUNCTION_NOTES = {
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


def random_overlap(share: float, layers: Sequence[int]) -> tuple[float, float]:
    """Return the range of overlaps of random sets, from 0 to the value that 97.5 % of them do not exceed.

    The number of common neurons in a layer is hypergeometric: k of N neurons in both sets share k²/N on average, with the variance
    k²·(N − k)² / (N²·(N − 1)).

    Args:
        share: Share of every layer in a set.
        layers: Number of neurons of each layer.
    """
    sizes = [(max(1, round(share * n)), n) for n in layers]
    variance = sum(k**2 * (n - k) ** 2 / (n**2 * (n - 1)) for k, n in sizes if n > 1)
    total = sum(k for k, _ in sizes)
    return 0.0, sum(k**2 / n for k, n in sizes) / total + 1.96 * math.sqrt(variance) / total


def function_cells(row: FunctionRow) -> list[str]:
    """Return the cells of a function: scores beside chance, what the test finds, overlap of sets, and AUC of plain features."""
    return [
        row.function,
        f"{row.best_median:.2f} / {row.best_max:.2f}",
        f"{row.top:.2f}",
        f"{row.mean:.3f}",
        f"{row.prevalence:.3f}",
        *found_cells(row),
        f"{row.overlap:.2f}",
        f"{row.overlap_others:.2f}",
        *(f"{row.confounders[name]:.2f}" for name in ("length", "language", "template")),
    ]


def found_cells(row: FunctionRow) -> tuple[str, str, str]:
    """Return what the test finds for a function: number of neurons, largest effect, and effect from which a neuron is found."""
    if row.smallest_effect is None:
        return "no power", f"{row.largest_effect:.1f}", ""
    return f"{row.found:,}", f"{row.largest_effect:.1f}", f"{row.smallest_effect:.1f}"


def _found_claim(rows: Sequence[FunctionRow], unit: str) -> str:
    """Return what the test allows to say."""
    tested = [row for row in rows if row.smallest_effect is not None]
    parts = []
    if found := [row.function for row in tested if row.found]:
        parts.append(
            f"Single {unit} serve {listed(found)}: on their tasks they are more active than chance explains in the whole model"
        )
    if none := [row.function for row in tested if not row.found]:
        parts.append(f"For {listed(none)} none is found; effects below that of the column 'findable from' stay unseen")
    if powerless := [row.function for row in rows if row.smallest_effect is None]:
        parts.append(f"For {listed(powerless)} the test has no power: it needs more tasks")
    return ". ".join(parts) + "."


def _layer_charts(result: FunctionsResult) -> list[Chart]:
    rows = result.layers["train"]
    layers = sorted({row.layer for row in rows})
    scales = Scales((layers[0], layers[-1]), (0, 1), (0, 0.5, 1), layer_marks(layers), "{:.2f}".format, "{:.0f}".format)
    charts = []
    for row in result.functions:
        own = [entry for entry in rows if entry.function == row.function]
        curves = [
            Curve("mean", [(entry.layer, entry.mean) for entry in own], "third"),
            Curve("top 5‰", [(entry.layer, entry.top) for entry in own], "second"),
            Curve("best", [(entry.layer, entry.best) for entry in own], "main"),
        ]
        charts.append(chart(row.function, curves, scales, (), f"{row.layers_above_08} of {len(layers)} layers above 0.8"))
    return charts


def sparsity_section(result: SparsityResult) -> Section:
    """Return the section of distributions and masking."""
    curves, tolerance, cett = result.curves, result.settings.tolerance, result.cett
    small = " and ".join(f"{100 * d.mean_small:.0f} % by {d.indicator}" for d in result.distributions)
    free = " and ".join(f"{curve.free:g} % by {curve.indicator}" for curve in curves if curve.function is None)
    lead = [
        f"Of the neurons of a token, {small} lie below a fifth of the largest one. The paper finds 80 % for models of 7 and 8 billion parameters.",
        f"Masking the least active neurons of every token and layer raises the loss by no more than {tolerance:g} nats up to {free}. "
        "The paper finds 70 % by activation and 80 % by output magnitude.",
    ]
    if cett.mean_sparsity is not None:
        lead.append(
            f"At a truncation error of {cett.target:g} in every layer (CETT), {100 * cett.mean_sparsity:.0f} % of the neurons of a token are not needed."
        )
    rows = [
        [
            curve.function or "all",
            curve.indicator,
            *(with_ends(f"{p.rise:.2f}", p.low, p.high) if p.percent else "0" for p in curve.points),
            f"{curve.free:g} %",
        ]
        for curve in sorted(curves, key=lambda c: (c.function is not None, c.function))
    ]
    return Section(
        "sparsity",
        "Sparsity",
        lead,
        ["function", "masked by", *(f"{point.percent:g} %" for point in curves[0].points), "free up to"],
        rows,
        {"free up to": f"largest share whose loss rises by no more than {tolerance:g} nats"},
        [*(_distribution(d) for d in result.distributions), *_masking(curves, tolerance)],
        (("main", "activation"), ("other", "output magnitude"), ("third", "single layers"), ("level", "tolerance")),
        (),
        [
            f"Texts: {result.data.file}, {plural(result.data.items, 'held-out text')}. Table: rise of the loss in nats per token "
            "with its 95 % interval over tasks. Output magnitude: |activation| times the norm of the neuron's output column."
        ],
    )


_INDICATORS = {"activation": "main", "magnitude": "other"}


def _distribution(found: Distribution) -> Chart:
    """Draw the shares of neurons below a value by layer, at every fifth point of the grid, and their mean."""
    mean = [sum(column) / len(column) for column in zip(*found.cdf, strict=True)]
    named = [*((f"layer {n}", row, "third") for n, row in zip(found.layers, found.cdf, strict=True))]
    named.append(("mean of the layers", mean, _INDICATORS[found.indicator]))
    curves = [Curve(name, list(zip(found.grid[::5], row[::5], strict=True)), kind) for name, row, kind in named]
    scales = Scales((0, 1), (0, 1), (0, 0.5, 1), (0, 0.2, 0.5, 1), "{:.2f}".format)
    return chart(f"share of neurons below, by {found.indicator}", curves, scales, note="normalized")


def _masking(curves: Sequence[MaskCurve], tolerance: float) -> list[Chart]:
    percents = [point.percent for point in curves[0].points]
    scales = Scales((0, max(percents)), (0, HIGHEST), (0, 1, 2), percents[::2], "{:.2f}".format, "{:g} %".format)
    charts = []
    for name in sorted({curve.function for curve in curves}, key=lambda n: (n is not None, n)):
        own = [curve for curve in curves if curve.function == name]
        lines = [Curve(c.indicator, [(p.percent, p.rise) for p in c.points], _INDICATORS[c.indicator]) for c in own]
        level = Level("tolerance", tolerance, "")
        charts.append(chart(name or "all functions", lines, scales, [level], f"free up to {own[0].free:g} %"))
    return charts


def ablation_section(result: AblationResult) -> Section:
    """Return the section of the damage matrix and its controls."""
    names, controls = result.functions, result.controls
    yes = [name for name, own in zip(names, result.dominant, strict=True) if own]
    claim = f"{len(yes)} of {len(names)} sets harm their own function most"
    if no := [name for name in names if name not in yes]:
        claim += f"; not so those of {', '.join(no)}"
    if matched := controls.get("matched"):
        claim += f". Of random neurons with the same mean activation, {matched.dominant_rows} of {len(names)} do"
    rows = [["the functions' sets", f"{result.dominant_rows} of {len(names)}", coupling_text(result), ""]]
    for kind, table in controls.items():
        exceeds = f"{sum(share >= 0.95 for share in table.exceeds)} of {len(names)}"
        rows.append([kind, f"{table.dominant_rows} of {len(names)}", coupling_text(table), exceeds])
    caption = f"mean overlap of two sets {result.overlap.mean:.2f}, by chance {result.overlap.chance:.2f}"
    return Section(
        "ablation",
        "Ablation",
        [
            f"Each function's {100 * result.share:g} % of the neurons are switched off, and the perplexity of every function is measured on "
            f"{result.items} texts of tasks that did not choose them.",
            f"{claim}.",
            "The paper's matrices have 6 of 7 (Llama-3-8B) and 7 of 7 dominant rows (Mistral-7B), and a coupling of 0.08 and 0.06 by this "
            "definition.",
        ],
        ["switched off", "own function harmed most", "coupling", "sets harm their own function more"],
        rows,
        {
            "own function harmed most": "rows whose diagonal is the largest number",
            "coupling": "median over rows of the mean of the others divided by the diagonal, with its 95 % interval over tasks",
            "sets harm their own function more": "functions whose set harms them more than this control in 95 % of the resamplings",
        },
        (),
        (),
        [_matrix("The functions' sets", result, caption), *(_matrix(_CONTROLS[kind], table) for kind, table in controls.items())],
        [
            "Numbers: change of perplexity in percent, (PPL off − PPL) / PPL. A row is a set that is switched off, a column a function that is "
            "measured; tints are on a logarithmic scale, the same for all pages."
        ],
    )


_CONTROLS = {"random": "Control: random neurons", "matched": "Control: random neurons of the same mean activation"}


def coupling_text(table: Damage) -> str:
    """Return a coupling with its interval; a dash if it is undefined."""
    return MISSING if table.coupling is None else with_ends(f"{table.coupling:.2f}", *table.interval)


def _matrix(title: str, table: Damage, caption: str = "") -> TintedTable:
    values = [(name, [100 * (v or 0.0) for v in row]) for name, row in zip(table.functions, table.changes, strict=True)]
    if all(row == values[0][1] for _, row in values):  # one set is the control of all functions
        values = [("all functions", values[0][1])]

    def uncertain(row: int, column: int) -> tuple[float, float] | None:
        """Return a range that holds the value if its interval includes 0; an end that is None is infinite."""
        low, high = table.low[row][column], table.high[row][column]
        return (-math.inf, math.inf) if low is not None and low <= 0 and (high is None or high >= 0) else None

    neutral = "the 95 % interval includes 0, or the change is below 1 %"
    tints = Tints(lambda v: f"{v:,.0f}".replace("-", "−"), CHANGES, " %", neutral, uncertain)
    return tinted(title, caption, "off", table.functions, values, tints)


SECTIONS: dict[str, tuple[type[ModelResult], Callable[[Any], Section]]] = {
    "functions": (FunctionsResult, functions_section),
    "sparsity": (SparsityResult, sparsity_section),
    "ablation": (AblationResult, ablation_section),
    "partition": (PartitionResult, partition_section),
    "knowledge": (KnowledgeResult, facts_section),
}
"""Kind of analysis, whose file is KIND.json -> its result and its section of the page."""
