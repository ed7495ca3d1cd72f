"""The tables of docs/neurons.md and docs/neurons-ablation.md: functions, masking and ablations of the starter base."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cells import block, cite, points, table
from neuron_set_tables import BRICKS, spread, together

from workbench.neurons.features import FeaturesResult
from workbench.neurons.functions import FunctionRow
from workbench.neurons.pages.page import score_cells, verdict_cells
from workbench.neurons.pages.questions import features_section

PROJECT = Path(__file__).resolve().parents[1]
NEURONS = "benchmarks/results/neurons.json"
SPLIT = "benchmarks/results/split-ffn.json"
FEATURES = "benchmarks/results/features.json"
NULLS = "benchmarks/results/neuron-nulls.json"
OVERHEAD = "benchmarks/results/analyze.json"
PUBLISHED = {"rows": "6 of 7 (Llama-3-8B), 7 of 7 (Mistral-7B)", "coupling": "0.08, 0.06"}


@block("neurons-functions", NEURONS)
def functions_block(found: dict[str, Any]) -> str:
    """The verdict on each function."""
    document = found["functions"]
    heads = ["function", "verdict", "found", "most in layers", "largest effect", "findable from", "set off", "random off"]
    cells = [verdict_cells(FunctionRow.model_validate(row)) for row in document["functions"]]
    rows = [[*of_row[:2], *of_row[3:]] for of_row in cells]
    note = (
        f"{sum(document['neurons'].values()):,} neurons, {document['data']['items']:,} texts of {document['test']['tasks']} tasks in "
        f"`evals/{document['data']['file']}`. "
    )
    if other := found.get("other"):
        counts = ", ".join(f"{row['function']} {row['found']}" for row in other["functions"])
        note += f"With {other['data']['items']:,} texts of {other['test']['tasks']} tasks from public collections: {counts}. "
    return "\n\n".join([table(heads, rows, left=2), note])


@block("neurons-scores", NEURONS)
def scores_block(found: dict[str, Any]) -> str:
    """Scores by function."""
    document = found["functions"]
    cells = [score_cells(FunctionRow.model_validate(row)) for row in document["functions"]]
    rows = [[*of_row[:5], f"{of_row[5]} ({of_row[6]})", of_row[7]] for of_row in cells]
    heads = ["function", "best per layer", "top 5‰", "mean", "chance", "overlap", "AUC of length"]
    note = "Best per layer: median over layers and largest. Overlap: of the sets that both splits choose, in brackets with other functions' sets. "
    return "\n\n".join([table(heads, rows, left=1), note])


@block("neurons-power", NEURONS)
def power_block(found: dict[str, Any]) -> str:
    """Effects that would be found with other numbers of tasks, as each file of texts says."""
    documents = [found["functions"], *([found["other"]] if "other" in found else [])]
    tasks = list(documents[0]["test"]["planned"])
    rows = []
    for document in documents:
        each = document["test"]["tasks"] // len(document["functions"])
        effects = [document["test"]["planned"][n] for n in tasks]
        rows.append([f"{each} tasks each", *("" if e is None else f"{e:.1f}" for e in effects)])
    note = "Effect, in standard deviations over tasks, of which 90 % of the neurons would be found with so many tasks of every function. "
    return "\n\n".join([table(["computed from", *(f"{n} tasks" for n in tasks)], rows, left=1), note])


@block("neurons-planted", NULLS)
def planted_block(found: dict[str, Any]) -> str:
    """What the test finds of planted neurons, and in models without any."""
    rows = []
    for row in found["worlds"]:
        level, recall = row["level"], row["recall"]
        named = [effect for effect in recall["named"] if effect is not None]
        low, high = f"{min(named):.1f}", f"{max(named):.1f}"
        above, below = (f"{_found_share(recall, side)} of {recall[side]}" for side in ("above", "below"))
        rows.append(
            [
                row["world"],
                f"{100 * level['share']:.1f}",
                low if low == high else f"{low}–{high}",
                above,
                below,
                str(recall["false"]),
            ]
        )
    first = found["worlds"][0]
    note = (
        f"False: percent of {first['level']['models']} models of {first['neurons']} neurons, none of which serves a function, in which any neuron is "
        f"found for any of seven functions. Found: percent of planted neurons whose effect is above, or below, the one that the test names; "
        f"{found['planted']} in each of {found['models']} models, with effects from {found['effects'][0]:g} to {found['effects'][1]:g}. Others: neurons "
        "that were not planted and are found in these models."
    )
    heads = ["tasks", "false", "named effect", "found above it", "found below it", "others"]
    return "\n\n".join([table(heads, rows, left=1), note])


def _found_share(recall: Mapping[str, Any], side: str) -> str:
    return f"{100 * recall[f'{side}_found'] / recall[side]:.0f} %" if recall[side] else "0"


@block("neurons-masking", NEURONS)
def masking_block(found: dict[str, Any]) -> str:
    """Rise of the loss by share masked."""
    document = found["sparsity"]
    curves = [curve for curve in document["curves"] if curve["function"] is None]
    heads = ["masked by", *(f"{point['percent']:g} %" for point in curves[0]["points"][1:]), "free up to"]
    rows = [[curve["indicator"], *(_rise(point) for point in curve["points"][1:]), f"{curve['free']:g} %"] for curve in curves]
    small = ", ".join(f"{points(d['mean_small'])} % by {d['indicator']}" for d in document["distributions"])
    note = (
        f"Rise of the loss in nats per token over {document['data']['items']} held-out texts of seven functions, with 95 % intervals over tasks. "
        f"Free: no more than {curves[0]['tolerance']:g}. Below a fifth of a token's largest neuron: {small}. At a truncation error of "
        f"{document['cett']['target']:g} in every layer (CETT), {points(document['cett']['mean_sparsity'])} % of the neurons are not needed. "
    )
    return "\n\n".join([table(heads, rows, left=1), note])


@block("neurons-ablation", NEURONS)
def ablation_block(found: dict[str, Any]) -> str:
    """The damage matrix and the summary of its controls."""
    document = found["functions"]["ablation"]
    names = document["functions"]
    matrix = table(
        ["switched off", *names],
        (
            [name, *(_percent(value, name == other) for other, value in zip(names, row, strict=True))]
            for name, row in zip(names, document["changes"], strict=True)
        ),
        left=1,
    )
    controls = {kind: document["controls"][kind] for kind in ("random", "matched")}
    tables = {"the functions' sets": document, **controls}
    rows = [[name, f"{t['dominant_rows']} of {len(names)}", _coupling(t)] for name, t in tables.items()]
    rows.append(["the paper's matrices", PUBLISHED["rows"], PUBLISHED["coupling"]])
    summary = table(["switched off", "own function harmed most", "coupling"], rows, left=1)
    note = (
        f"First table: change of perplexity in percent on {document['items']} texts of held-out tasks, with {100 * document['share']:.3g} % of the "
        "neurons off. Coupling: median over rows of the mean of the others divided by the diagonal, with its 95 % interval. Controls of equal size: random "
        "neurons, and random neurons of the same mean activation. "
    )
    return "\n\n".join([matrix, summary, note])


@block("neurons-features", FEATURES)
def features_block(found: dict[str, Any]) -> str:
    """Features of two small dictionaries beside the neurons of their layer."""
    rows: list[list[str]] = []
    notes = []
    for one in found["dictionaries"]:
        made, result = one["dictionary"], FeaturesResult.of(one["result"], FEATURES)
        for cells in features_section(result).rows:
            is_layer = cells[0] == _NEURONS
            if not (rows and is_layer):  # the neurons are the same for each dictionary
                rows.append([f"layer {result.dictionary.layer}" if is_layer else made["kind"], *cells[:2], cells[3], *cells[5:]])
        notes.append(
            f"The {made['kind']} explains {points(made['explained'])} % of the variance of held-out text ({made['k']} singular directions "
            f"{points(made['explained_by_k_directions'])} %). "
        )
    first = found["dictionaries"][0]["dictionary"]
    note = (
        f"Two dictionaries trained for this table, of {first['features']:,} top-k features (k = {first['k']}) on {first['tokens']:,} tokens of this "
        f"repository, {first['epochs']} epochs, on {found['dictionaries'][0]['result']['data']['items']} texts of `evals/abilities.jsonl`. {''.join(notes)}"
        "Score: FuncScore on one half of the tasks of the best hundredth of units on the other half. Differences with 95 % intervals over functions. "
    )
    heads = ["dictionary", "units", "number", "found", "score", "minus neurons", "more selective"]
    return "\n\n".join([table(heads, rows, left=2), note])


_NEURONS = "neurons of the layer"


@block("neurons-claims", NEURONS)
def claims_block(found: dict[str, Any]) -> str:
    """Write what section 4 of the paper finds on models of 7 and 8 billion parameters, and whether it holds here."""
    split = json.loads((PROJECT / SPLIT).read_text("utf-8"))  # a second results file
    functions, sparsity = found["functions"], found["sparsity"]
    ablation, rows = functions["ablation"], functions["functions"]
    curves = {
        curve["indicator"]: {p["percent"]: p for p in curve["points"]}
        for curve in sparsity["curves"]
        if curve["function"] is None
    }
    small = sparsity["distributions"][0]["mean_small"]
    masked = curves["activation"][70]
    gap = curves["activation"][80]["rise"] - curves["magnitude"][80]["rise"]
    best = {row["function"]: row["best_median"] for row in rows}
    high = [name for name in ("coding", "math", "translation") if best[name] > 0.8]
    counts = Counter(row["verdict"] for row in rows)
    matched = ablation["controls"]["matched"]
    harm = sum(row["change"] > max(row["matched"]) for row in rows)
    overlap, chance = ablation["overlap"]["mean"], ablation["overlap"]["chance"]
    oracle = {row["method"]: row for row in split["rows"] if row["selector"] == "oracle"}
    apart = oracle["cmoe"]["high"] < oracle["random"]["low"]
    claims = [
        ("80 % of a token's neurons are below a fifth of the largest", small >= 0.8, f"{points(small)} %"),
        ("masking 70 % by activation costs almost nothing", masked["high"] <= 0.1, f"{_rise(masked)} nats a token"),
        ("the output magnitude is the better indicator", gap > 0.1, f"{gap:+.2f} nats a token at 80 %".replace("-", "−")),
        (
            "the best neuron of most layers scores above .8 for coding, math and translation",
            len(high) == 3,
            "median over layers " + ", ".join(f"{best[name]:.2f}" for name in ("coding", "math", "translation")),
        ),
        (
            "single neurons serve each function (tested here)",
            counts["found"] == len(rows) or (None if counts["no power"] else False),
            ", ".join(f"{count} {verdict}" for verdict, count in counts.items()),
        ),
        (
            "each set harms its own function most (6 and 7 of 7)",
            ablation["dominant_rows"] >= 6,
            f"{ablation['dominant_rows']} of {len(rows)}; random neurons of the same activation {matched['dominant_rows']}",
        ),
        (
            "it harms it more than each of five such random sets (tested here)",
            harm == len(rows),
            f"{harm} of {len(rows)} functions",
        ),
        (
            "sets of two functions share fewer neurons than chance",
            overlap < chance,
            f"{overlap:.3f}, by chance {chance:.3f}",
        ),
        (
            "neurons form experts: fewer are needed than of random groups",
            apart or (None if oracle["cmoe"]["rise"] < oracle["random"]["rise"] else False),
            f"with three quarters of the experts, the loss rises by {_rise(oracle['cmoe'])}, random groups {_rise(oracle['random'])}",
        ),
    ]
    both, each, gap = together(json.loads((PROJECT / BRICKS).read_text("utf-8")))
    edge, (_, lowest, highest) = 0.1 * each, gap
    within = True if max(-lowest, highest) <= edge else False if lowest > edge or highest < -edge else None
    claims.append(
        (
            "two sets switched off harm their functions as much as each alone does, added (tested here)",
            within,
            f"{both:.2f} and {each:.2f} nats a token, difference {spread(*gap)}",
        )
    )
    words = {True: "holds", False: "does not", None: "cannot be told"}
    rows = [[claim, words[holds], seen] for claim, holds, seen in claims]
    note = f"95 % intervals over tasks. Experts: {cite(split, SPLIT)} Two sets: [neuron-bricks.json](../{BRICKS}). All others: "
    return table(["claim", "here", "measured"], rows, left=3) + "\n\n" + note


@block("neurons-time", NEURONS)
def time_block(found: dict[str, Any]) -> str:
    """Time of the parts."""
    seconds = found["seconds"]
    note = f" {found['note']}" if found.get("note") else ""
    whole = seconds["open"] + seconds["functions"]
    return f"The analysis with its pages takes {whole / 60:.1f} minutes, `--sparsity` {seconds['sparsity'] / 60:.1f}.{note}"


@block("neurons-overhead", OVERHEAD)
def overhead_block(found: dict[str, Any]) -> str:
    """Cost of the streaming pass."""
    memory = " and ".join(f"{mb:g} MB with {texts} texts" for texts, mb in found["memory"].items())
    return (
        f"One pass that scores every neuron takes {found['overhead']:.2f} times the CPU time of a plain forward pass without the head "
        f"({found['texts_per_second']:.1f} texts a second in one thread), and adds {memory} to the peak memory."
    )


def _rise(point: Mapping[str, Any]) -> str:
    if point["low"] is None:
        return f"{point['rise']:.3f}"
    return f"{point['rise']:.3f} [{point['low']:.3f}, {point['high']:.3f}]".replace("-", "−")


def _percent(value: float | None, own: bool) -> str:
    text = "" if value is None else f"{100 * value:,.0f}".replace("-", "−")
    return f"**{text}**" if own else text


def _coupling(summary: Mapping[str, Any]) -> str:
    if summary["coupling"] is None:
        return ""
    low, high = summary["interval"]
    return f"{summary['coupling']:.2f}" + ("" if low is None or high is None else f" [{low:.2f}, {high:.2f}]")
