"""The page of a model's neurons: which serve a function, with the test and its controls, and the sections of other questions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from workbench.ground.files import write_bytes
from workbench.ground.numbers import MISSING, fixed, plural, signed
from workbench.neurons.damage import Damage
from workbench.neurons.features import FeaturesResult
from workbench.neurons.functions import FunctionRow, FunctionsResult, TaskTestRecord
from workbench.neurons.locate import KnowledgeResult
from workbench.neurons.masking import SparsityResult
from workbench.neurons.pages.cards import page_name, write_chosen_page, write_function_pages
from workbench.neurons.pages.questions import (
    Section,
    chosen_section,
    facts_section,
    features_section,
    layer_marks,
    partition_section,
    sparsity_section,
    with_ends,
)
from workbench.neurons.partition import PartitionResult
from workbench.neurons.profiles import ProfilesResult
from workbench.neurons.subject import ModelResult
from workbench.report.chart import Chart, Curve, Scales, chart
from workbench.report.files import with_tables
from workbench.report.page import filled
from workbench.report.tints import CHANGES, SHARES, TintedTable, Tints, tinted

SCRIPTS, STYLES = ("report.js", "downloads.js"), ("report.css", "curves.css", "heat.css", "neurons.css")


def render_neurons(results: Mapping[str, ModelResult], out: Path) -> Path:
    """Write the pages of all analyses of a model, and return the path of the one that was asked for.

    Args:
        results: Kind of analysis -> its result.
        out: HTML file of the page with all sections; pages of functions and neurons lie beside it.
    """
    functions, profiles = results.get("functions"), results.get("profiles")
    if isinstance(functions, FunctionsResult) and isinstance(profiles, ProfilesResult):
        sentences = {row.function: verdict_text(row, functions.unit) for row in functions.functions}
        write_function_pages(functions, profiles, sentences, out.parent)
    if isinstance(chosen := results.get("chosen"), ProfilesResult):
        write_chosen_page(chosen, out.parent)
    first = next(iter(results.values()))
    texts = [data for result in results.values() if (data := getattr(result, "data", None)) is not None]
    sections = [section for kind, result in results.items() for section in SECTIONS[kind][1](result)]
    context = {
        "title": f"Neurons of {first.model}",
        "digest": first.digest,
        "sections": sections,
        "warnings": list(dict.fromkeys(warning for data in texts for warning in data.warnings)),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    tables = [table for section in sections for table in section.saved()]
    write_bytes(out, with_tables(filled("neurons.html.j2", context, SCRIPTS, STYLES, __package__), tables).encode())
    return out


def functions_sections(result: FunctionsResult) -> list[Section]:
    """Return the sections of functions: the verdicts, the sets switched off, and the scores."""
    return [_verdicts(result), ablation_section(result), _scores(result)]


def _verdicts(result: FunctionsResult) -> Section:
    """Return the section that says for each function what is found."""
    data, settings = result.data, result.settings
    tasks = "; ".join(
        f"{name}: {', '.join(splits['train'])} choose, {', '.join(splits['heldout'])} judge"
        for name, splits in (data.tasks or {}).items()
    )
    return Section(
        "functions",
        "Functions",
        [f"{row.function}: {verdict_text(row, result.unit)}" for row in result.functions] + [planned_text(result.test)],
        ["function", "verdict", "tasks", "found", "most in layers", "largest effect", "findable from", "set off", "random off"],
        [verdict_cells(row) for row in result.functions],
        _VERDICT_NOTES,
        links={row.function: page_name(row.function) for row in result.functions},
        details=[
            f"Texts: {data.file}. {tasks}.",
            f"{sum(result.neurons.values()):,} {result.unit} in {plural(len(result.neurons), 'layer')}, {data.items:,} texts ({data.tokens or 0:,} "
            f"tokens). The test assigns {result.test.tasks} tasks to functions {result.test.draws:,} times, seed {settings.seed}; any {result.unit[:-1]} "
            f"is found by chance in {100 * result.test.alpha:g} % of models. Sets: the best {100 * settings.share:g} % of every layer.",
        ],
    )


_VERDICT_NOTES = {
    "found": "neurons whose effect exceeds the largest of all neurons and functions that chance gives (95 %, tasks assigned to functions anew)",
    "most in layers": "smallest range of layers with half of them",
    "largest effect": "mean activation (its root) on the function's tasks above that on other tasks, in standard deviations over tasks",
    "findable from": "effect of which 90 % of the neurons would be found; more tasks lower it",
    "set off": "change of the function's own perplexity on held-out tasks without its set, 95 % interval over tasks",
    "random off": "the same with random neurons of the same mean activation, median over draws",
}


def verdict_text(row: FunctionRow, unit: str) -> str:
    """Return the answer for one function as a sentence."""
    if row.smallest_effect is None:
        return f"no power. With {plural(row.tasks, 'task')}, no effect is large enough to be told from the wording of a task."
    if row.found:
        first, last = main_layers(row.found_layers)
        where = f"layer {first}" if first == last else f"layers {first} to {last}"
        found = f"found. {row.found:,} {unit if row.found > 1 else unit[:-1]} serve it, half of them in {where}."
    else:
        found = f"not found. An effect of {row.smallest_effect:.1f} standard deviations would have been; the largest is {row.largest_effect:.1f}."
    change, drawn = (math.inf if row.change is None else row.change), matched_changes_of(row)
    most = "more" if change > median(drawn) else "no more"
    harm = "more than without any" if change > max(drawn) else f"{most} than without most"
    return (
        f"{found} Without its set, its perplexity changes by {_percent(change)} %, {harm} of {len(drawn)} random sets of equal activation "
        f"(median {_percent(median(drawn))} %)."
    )


def matched_changes_of(row: FunctionRow) -> list[float]:
    """Return the changes without random neurons of equal activation; one that is null is infinite."""
    return [math.inf if change is None else change for change in row.matched]


def planned_text(test: TaskTestRecord) -> str:
    """Return which effects could be found with more tasks."""
    known = [f"from {effect:.1f} with {tasks}" for tasks, effect in test.planned.items() if effect is not None]
    return f"Tasks of every function and the effects that they would show: {', '.join(known)}."


def main_layers(layers: Mapping[str, int]) -> tuple[int, int]:
    """Return the first and last layer of the smallest range with half of the neurons."""
    places = sorted((int(layer), count) for layer, count in layers.items())
    half = sum(count for _, count in places) / 2
    ranges = [
        (last - first, first, last)
        for i, (first, _) in enumerate(places)
        for j, (last, _) in enumerate(places[i:], i)
        if sum(count for _, count in places[i : j + 1]) >= half
    ]
    _, first, last = min(ranges)
    return first, last


def verdict_cells(row: FunctionRow) -> list[str]:
    """Return the cells of a function's verdict."""
    first, last = main_layers(row.found_layers) if row.found else (0, 0)
    off = MISSING if row.change is None else _percent(row.change)
    ends = "" if row.low is None or row.high is None else f" [{_percent(row.low)}, {_percent(row.high)}]"
    return [
        row.function,
        row.verdict,
        str(row.tasks),
        f"{row.found:,}",
        (str(first) if first == last else f"{first}–{last}") if row.found else MISSING,
        f"{row.largest_effect:.1f}",
        MISSING if row.smallest_effect is None else f"{row.smallest_effect:.1f}",
        f"{off}{ends} %",
        f"{_percent(median(matched_changes_of(row)))} %",
    ]


def _percent(value: float) -> str:
    if math.isinf(value):
        return "∞"
    return signed(100 * value, 0, thousands=",")


def _scores(result: FunctionsResult) -> Section:
    """Return the section of function scores."""
    settings = result.settings
    by_chance = random_overlap(settings.share, list(result.neurons.values()))
    overlap = tinted(
        "Overlap of the functions' sets",
        f"Share of the neurons of two sets that are the same; {settings.share:.2f} by chance.",
        "set of",
        list(result.overlap),
        [(name, [row[other] for other in result.overlap]) for name, row in result.overlap.items()],
        Tints("{:.2f}".format, SHARES, neutral="not above what 97.5 % of random sets share", band=lambda *_: by_chance),
    )
    return Section(
        "scores",
        "Scores",
        [
            f"FuncScore: the average precision of a {result.unit[:-1]}'s mean activation on the {'prompt' if settings.part == 'prompt' else 'whole text'} "
            "against the text's function. The best of thousands is above chance for any labels, so scores are no test."
        ],
        ["function", "best per layer", "top 5‰", "mean", "chance", "overlap", "other functions", "length", "language", "wording"],
        [score_cells(row) for row in result.functions],
        _SCORE_NOTES,
        _layer_charts(result),
        (("main", "best neuron of a layer"), ("second", "5 in 1000 are better"), ("third", "mean of the layer")),
        (overlap,),
    )


_SCORE_NOTES = {
    "best per layer": "score of the best neuron of a layer: median over layers / largest",
    "top 5‰": "score that 5 in 1000 neurons of a layer exceed, mean over layers",
    "chance": "share of the function's texts: the expected score of a random neuron",
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


def score_cells(row: FunctionRow) -> list[str]:
    """Return the cells of a function's scores: beside chance, overlap of sets, and AUC of plain features."""
    return [
        row.function,
        f"{row.best_median:.2f} / {row.best_max:.2f}",
        f"{row.top:.2f}",
        f"{row.mean:.3f}",
        f"{row.prevalence:.3f}",
        f"{row.overlap:.2f}",
        f"{row.overlap_others:.2f}",
        *(f"{row.confounders[name]:.2f}" for name in ("length", "language", "template")),
    ]


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
        charts.append(chart(row.function, curves, scales))
    return charts


def ablation_section(result: FunctionsResult) -> Section:
    """Return the section of the damage matrix and its controls."""
    ablation = result.ablation
    names, controls = ablation.functions, ablation.controls
    yes = [name for name, own in zip(names, ablation.dominant, strict=True) if own]
    claim = f"{len(yes)} of {len(names)} sets harm their own function most"
    if no := [name for name in names if name not in yes]:
        claim += f"; not so those of {', '.join(no)}"
    if matched := controls.get("matched"):
        claim += f". Of random neurons with the same mean activation, {matched.dominant_rows} of {len(names)} do"
    rows = [["the functions' sets", f"{ablation.dominant_rows} of {len(names)}", coupling_text(ablation), ""]]
    for kind, table in controls.items():
        exceeds = f"{sum(share >= 0.95 for share in table.exceeds)} of {len(names)}"
        rows.append([kind, f"{table.dominant_rows} of {len(names)}", coupling_text(table), exceeds])
    caption = f"mean overlap of two sets {ablation.overlap.mean:.2f}, by chance {ablation.overlap.chance:.2f}"
    return Section(
        "ablation",
        "Switched off",
        [
            f"Each function's {100 * ablation.share:.3g} % of the neurons are switched off, and the perplexity of every function is measured on "
            f"{ablation.items} texts of tasks that did not choose them.",
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
        [
            _matrix("The functions' sets", ablation, caption),
            *(_matrix(_CONTROLS[kind], table) for kind, table in controls.items()),
        ],
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
    tints = Tints(lambda v: fixed(v, 0, thousands=","), CHANGES, " %", neutral, uncertain)
    return tinted(title, caption, "off", table.functions, values, tints)


SECTIONS: dict[str, tuple[type[ModelResult], Callable[[Any], list[Section]]]] = {
    "functions": (FunctionsResult, functions_sections),
    "profiles": (ProfilesResult, lambda _: []),
    "chosen": (ProfilesResult, lambda result: [chosen_section(result)]),
    "features": (FeaturesResult, lambda result: [features_section(result)]),
    "sparsity": (SparsityResult, lambda result: [sparsity_section(result)]),
    "partition": (PartitionResult, lambda result: [partition_section(result)]),
    "knowledge": (KnowledgeResult, lambda result: [facts_section(result)]),
}
"""Kind of analysis, whose file is KIND.json -> its result and its sections of the page, of which the terminal prints the first."""
